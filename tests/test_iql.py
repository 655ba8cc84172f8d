"""The IQL family: its losses against FQL's official code and independent numpy, TrigFlow, the toy, and MaxQ's bias."""

import pathlib
import types

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_algo, small_args
from modes import learned_actions, mode_shares
from test_paper import gelu, numpy_critics, numpy_flow, numpy_mlp, one_state

import common

# What agents/iql.py and agents/ifql.py of github.com/seohongpark/fql computed from `fql_inputs`: losses, gradients (in
# the order of our parameters) and actions. Its parameters were ours, but for three differences of convention: its time
# runs the other way, so its flow saw 1 - t; it sums the two critics' losses, where ours is their mean; and its ifql has
# no alpha, which is 1 here.
FQL = np.load(pathlib.Path(__file__).with_name("fql.npz"))


def fql_inputs(name):
    """Arguments, state, batch, noise and t from a seed, for networks of any sizes: what FQL's code was given."""
    rng = np.random.default_rng(7)
    draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)
    algo = load_algo(name)
    small = {"env_name": "cube-single-play", "hidden_dims": (8, 6), "alpha": 3.0 if name == "iql" else 1.0}
    args = algo.Args(**small, discount=0.99)
    state = algo.init(args, 5, 3, 0)
    state = state._replace(target_critic=jax.tree.map(lambda p: 0.5 * draw(*p.shape), state.target_critic))
    for network in ("critic", "value", "actor"):
        train_state = getattr(state, network)
        params = jax.tree.map(lambda p: 0.5 * draw(*p.shape), train_state.params)
        state = state._replace(**{network: train_state.replace(params=params)})
    action = jnp.array(rng.uniform(-1, 1, (16, 3)), jnp.float32)
    mask = jnp.array(rng.integers(2, size=16), jnp.float32)
    batch = common.Dataset(draw(16, 5), action, draw(16), mask, draw(16, 5), action)
    return args, state, batch, draw(16, 3), jnp.array(rng.uniform(size=(16, 1)), jnp.float32)


def losses_and_gradients(name, monkeypatch):
    """{name: array} of the three losses and their flat gradients, with the noise and t of `fql_inputs`."""
    algo, (args, state, batch, noise, t) = load_algo(name), fql_inputs(name)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: noise.reshape(shape))
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: t.reshape(shape))
    found, key = {}, jax.random.PRNGKey(0)
    for network, more in (("critic", ()), ("value", ()), ("actor", (key,))):
        loss = getattr(algo, f"{network}_loss")
        params = getattr(state, network).params
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (found[f"{network}_loss"], _), gradient = value_and_grad(params, args, state, batch, *more)
        found[f"{network}_gradient"] = jax.flatten_util.ravel_pytree(gradient)[0]
    return found


def chosen_actions(name, monkeypatch):
    """What the policy does in the first state: the Gaussian's mean, or the best by Q of 16 actions from the noise."""
    algo, (args, state, batch, noise, _) = load_algo(name), fql_inputs(name)
    obs = batch.obs[0]
    if name == "iql":
        states = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
        return algo.act(args, states, obs[None, None], jnp.zeros((1, 1, 2), jnp.uint32))[0, 0]
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: noise.reshape(shape))
    return algo.max_q(state, obs, len(noise), jax.random.PRNGKey(0))


@pytest.mark.parametrize("name", ["iql", "ifql"])
def test_losses_gradients_and_actions_are_those_of_fql(name, monkeypatch):
    with monkeypatch.context() as patch:
        found = losses_and_gradients(name, patch) | {"action": chosen_actions(name, patch)}
    found["critic_loss"], found["critic_gradient"] = 2 * found["critic_loss"], 2 * found["critic_gradient"]
    assert {f"{name}.{key}" for key in found} == {key for key in FQL if key.startswith(f"{name}.")}
    for key, value in found.items():
        expected = FQL[f"{name}.{key}"]
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=key)


@pytest.mark.parametrize(
    "name, values",
    [
        ("iql", {"alpha": 1}),  # the temperature of AWR, not the weight of a behaviour loss
        ("diql", {"alpha": 1, "delta": 0.03}),
        ("ifql", {"alpha": 300, "num_samples": 32}),
        ("difql", {"alpha": 300, "num_samples": 32, "delta": 0.03}),
        ("trigflow", {"alpha": 300, "num_samples": 32}),
        ("dtrigflow", {"alpha": 300, "num_samples": 32, "delta": 0.03}),
        ("etrigflow", {"alpha": 300, "num_samples": 32}),
    ],
)
def test_the_papers_values_are_taken(name, values):
    args = vars(small_args(name))
    values |= {"expectile": 0.9, "discount": 0.99}
    assert {key: args[key] for key in values} == values
    assert {"delta", "num_samples"} & args.keys() == {"delta", "num_samples"} & values.keys()


@pytest.mark.parametrize("name, tanh", [("iql", False), ("iql", True), ("diql", False)])
def test_awr_against_numpy(name, tanh, dataset, batch):
    """Eqs. 2 and 18: the weight is the data action's, and at most 100; the action cloned is a or a*."""
    algo, args = load_algo(name), small_args(name, alpha=10.0, tanh=tanh)
    state = one_state(name, args, dataset)
    large = jax.tree.map(lambda p: 3 * p, state.actor.params)  # a mean away from 0
    loss, metrics = algo.actor_loss(large, args, state, batch, jax.random.PRNGKey(0))
    v = numpy_mlp(state.value.params["params"]["MLP_0"], np.asarray(batch.obs, np.float64), layer_norm=True)[..., 0]
    q = numpy_critics(state.critic.params, batch.obs, batch.action).min(0)
    weight = np.minimum(np.exp(10 * (q - v)), 100)
    assert (weight == 100).any() and (weight < 10).any()
    action = algo.optimal_action(args, state, batch)[0] if name == "diql" else batch.action
    hidden = gelu(numpy_mlp(large["params"]["MLP_0"], np.asarray(batch.obs, np.float64)))
    mean = numpy_mlp({"Dense_0": large["params"]["Dense_0"]}, hidden)
    mean = np.tanh(mean) if tanh else mean
    log_prob = (-0.5 * (np.asarray(action) - mean) ** 2 - 0.5 * np.log(2 * np.pi)).sum(-1)
    np.testing.assert_allclose(loss, -(weight * log_prob).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["awr_weight"], weight.mean(), rtol=1e-4)
    act = algo.act(args, jax.tree.map(lambda leaf: leaf[None], state), batch.obs[None], None)[0]
    np.testing.assert_allclose(act, state.actor.apply_fn(state.actor.params, batch.obs), atol=1e-6)


@pytest.mark.parametrize("name", ["trigflow", "dtrigflow", "etrigflow"])
def test_trigflow_losses_against_numpy(name, dataset, batch):
    """Eqs. 5-7, 20 and 21: a_t = cos(t) a + sin(t) z, t in [0, pi / 2], f = cos(t) a_t - sin(t) F(a_t, t)."""
    algo, args = load_algo(name), small_args(name)
    state, key = one_state(name, args, dataset), jax.random.PRNGKey(4)
    loss, metrics = algo.actor_loss(state.actor.params, args, state, batch, key)
    action = algo.optimal_action(args, state, batch)[0] if name == "dtrigflow" else batch.action
    noise_key, time_key = jax.random.split(key)
    noise, t = jax.random.normal(noise_key, action.shape), jax.random.uniform(time_key, (len(action), 1)) * np.pi / 2
    action, noise, t = (np.asarray(x, np.float64) for x in (action, noise, t))
    noisy = np.cos(t) * action + np.sin(t) * noise
    denoised = np.cos(t) * noisy - np.sin(t) * numpy_flow(state.actor.params, batch.obs, noisy, t)
    mean = ((denoised - action) ** 2).mean()
    np.testing.assert_allclose(metrics["diffusion_loss"], mean, rtol=1e-4)
    assert (np.abs(denoised) > 1).any()  # Q sees it as it is
    q = numpy_critics(state.critic.params, batch.obs, denoised).min(0).mean() * (name == "etrigflow")
    np.testing.assert_allclose(loss, 300 * mean - q, rtol=1e-5)


def test_denoising_at_time_0_is_the_identity(dataset, batch):
    state = one_state("trigflow", small_args("trigflow"), dataset)
    denoise = lambda t: state.actor.apply_fn(
        state.actor.params, batch.obs, batch.action, jnp.full((32, 1), t), method="denoise"
    )
    np.testing.assert_array_equal(denoise(0.0), batch.action)
    assert (denoise(0.5) != batch.action).all()


@pytest.mark.parametrize("steps, rtol", [(10, 0.15), (1000, 0.002)])
def test_ddim_with_the_exact_network_of_a_gaussian_recovers_it(steps, rtol, monkeypatch):
    """F* = E[cos(t) z - sin(t) a_0 | a_t] for a_0 ~ N(0.2, 0.5^2); DDIM maps noise to mean + std noise."""
    mean, std, times = 0.2, 0.5, []

    def exact(self, obs, action, t):
        times.append(float(t[0, 0]))
        excess = (action - jnp.cos(t) * mean) / ((std * jnp.cos(t)) ** 2 + jnp.sin(t) ** 2)
        return jnp.cos(t) * jnp.sin(t) * excess - jnp.sin(t) * (mean + std**2 * jnp.cos(t) * excess)

    policy = load_algo("trigflow").TrigFlowPolicy
    monkeypatch.setattr(policy, "__call__", exact)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.array([[-1.0], [0.0], [1.0]]))
    low, middle, high = policy((), 1, steps).apply({}, jnp.zeros((3, 1)), None, method="sample")[:, 0]
    np.testing.assert_allclose(times, np.linspace(np.pi / 2, 0, steps, endpoint=False), atol=1e-5)
    np.testing.assert_allclose(middle, mean, rtol=rtol)
    np.testing.assert_allclose((high - low) / 2, std, rtol=rtol)


@pytest.mark.parametrize("name, num_updates", [("iql", 500), ("ifql", 2000), ("trigflow", 5000)])
def test_flow_and_diffusion_recover_the_modes_that_a_gaussian_cannot(name, num_updates):
    shares = mode_shares(learned_actions(name, num_updates=num_updates))
    if name == "iql":
        assert shares.sum() == 0
    else:
        assert shares.sum() > 0.8 and shares.min() > 0.15


def test_one_sample_of_max_q_is_the_policy(dataset, batch):
    algo, args = load_algo("ifql"), small_args("ifql")
    state, key = one_state("ifql", args, dataset), jax.random.PRNGKey(1)
    action = algo.max_q(state, batch.obs, 1, key)
    sample = state.actor.apply_fn(state.actor.params, batch.obs[None], key, method="sample")[0]
    np.testing.assert_array_equal(action, sample)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_proposition_3(noise):
    """Of more samples, MaxQ selects a higher Q. Where Q is noisy, the more so the farther from the best action, as it
    is where data are scarce, that is noise: Q passes the best value there is, and the true value falls."""
    algo = load_algo("ifql")
    true = lambda action: -jnp.sum(action**2, axis=-1)  # at most 0

    def noisy_q(params, obs, action):  # a fixed number for each action, independent of its neighbours'
        bits = jax.lax.bitcast_convert_type(action, jnp.uint32)
        draw = lambda bits: jax.random.normal(jax.random.fold_in(jax.random.fold_in(params, bits[0]), bits[1]))
        error = jax.vmap(draw)(bits.reshape(-1, 2)).reshape(action.shape[:-1])
        return jnp.broadcast_to(true(action) + noise * (0.1 - 3 * true(action)) * error, (2, *action.shape[:-1]))

    uniform = lambda params, obs, key, method: jax.random.uniform(key, (*obs.shape[:-1], 2), minval=-1)
    q_key, key = jax.random.split(jax.random.PRNGKey(3))
    critic = types.SimpleNamespace(apply_fn=noisy_q, params=q_key)
    state = types.SimpleNamespace(critic=critic, actor=types.SimpleNamespace(apply_fn=uniform, params=None))
    actions = [algo.max_q(state, jnp.zeros((2000, 1)), n, key) for n in (1, 4, 16, 64, 256)]
    q = np.array([noisy_q(q_key, None, action).mean() for action in actions])
    value = np.array([true(action).mean() for action in actions])
    assert (np.diff(q) > 0).all()
    if noise:
        assert (np.diff(value) < 0).all() and q[-1] > 5
    else:
        assert (np.diff(value) > 0).all()
        np.testing.assert_allclose(q, value, rtol=1e-5)
