"""The paper's claims and equations, against autodiff and independent numpy.

Where a test runs on `each_text`, files that share a definition letter for letter are tested once.
"""

import collections
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import PAIRS, load_algo, make_states, slow_except, small_args
from pictures import learn_modes, mode_shares
from reference import definitions, each_text, inputs

D_ALGOS = [name for _, name in PAIRS]
CLONING = {"actor_loss": "actor", "flow_loss": "flow"}  # a loss that clones actions: its network


def test_proposition_1():
    """BRAC's gradient, as rebrac.py takes it, is that of cloning a + grad_a Q(s, pi(s)) / (2 alpha) (Eqs. 12-14)."""
    args, state, batch, _ = inputs("rebrac", alpha_actor=0.7)
    policy = lambda params: state.actor.apply_fn(params, batch.obs)
    q = lambda action: state.critic.apply_fn(state.critic.params, batch.obs, action).min(axis=0)
    params, action = state.actor.params, policy(state.actor.params)
    alpha = args.alpha_actor * jnp.abs(q(action)).mean()  # the loss divides Q by its scale
    target = batch.action + jax.grad(lambda action: q(action).sum())(action) / (2 * alpha)
    brac = lambda params: load_algo("rebrac").actor_loss(params, args, state, batch, None)[0]
    cloning = lambda params: args.alpha_actor * jnp.sum((policy(params) - target) ** 2, axis=-1).mean()
    reference.assert_close(jax.jit(jax.grad(brac))(params), jax.jit(jax.grad(cloning))(params), 1e-5)


@pytest.mark.parametrize("name", each_text("optimal_action", "Eq. 17"))
def test_proposition_2(name):
    """The optimal action lies up the gradient of Q, at a distance whose mean over the batch is delta (Eqs. 15, 17),
    where neither safeguard acts: small actions, and no gradient much longer than the others."""
    args, state, batch, _ = inputs(name, delta=0.3)
    batch = jax.tree.map(lambda array: array[:8], batch._replace(action=0.3 * batch.action))
    action, norm = load_algo(name).optimal_action(args, state, batch)
    assert np.abs(action).max() < 1
    step = np.asarray(action - batch.action, np.float64)
    np.testing.assert_allclose(np.linalg.norm(step, axis=-1).mean(), 0.3, rtol=1e-4)

    q = lambda a: reference.critics(state.critic.params, batch.obs, a).mean(axis=0)
    data, moves = np.asarray(batch.action, np.float64), 1e-5 * np.eye(batch.action.shape[-1])
    gradient = np.stack([(q(data + move) - q(data - move)) / 2e-5 for move in moves], axis=-1)
    norms = np.linalg.norm(gradient, axis=-1)
    assert norms.max() < norms.mean() + 2 * norms.std()
    np.testing.assert_allclose(norm, norms.mean(), rtol=1e-3)
    np.testing.assert_allclose(step, 0.3 * gradient / norms.mean(), atol=1e-4)


@pytest.mark.parametrize("name", each_text("optimal_action"))
def test_optimal_action_where_q_is_steep_or_flat_or_nan(name):
    args, state, batch, _ = inputs(name, delta=100.0)
    optimal_action = lambda change: load_algo(name).optimal_action(
        args, reference.with_parameters(state, {"critic": jax.tree.map(change, state.critic.params)}), batch
    )
    assert np.abs(optimal_action(lambda p: p)[0]).max() == 1
    action, norm = optimal_action(jnp.zeros_like)
    np.testing.assert_allclose(norm, 1e-5, rtol=1e-4)
    np.testing.assert_array_equal(action, batch.action)
    assert np.isnan(optimal_action(lambda p: p * jnp.nan)[0]).all()


@pytest.mark.parametrize("base, name", slow_except(PAIRS, ("mfql", "dmfql")))
def test_delta_0_is_the_baseline_bit_for_bit(base, name):
    trained = {}
    for algo, changes in ((base, {}), (name, {"delta": 0.0})):
        args, _, dataset, _ = inputs(algo, seeds=(7, 8), hidden_dims=(16,), **changes)
        states, _ = load_algo(algo).train(args, 20, dataset, make_states(algo, args, dataset))
        trained[algo] = jax.tree.leaves(states)
    jax.tree.map(np.testing.assert_array_equal, trained[name], trained[base])


def test_proposition_3():
    """Of more samples, MaxQ selects a higher Q. Where Q is noisy, the more so the farther from the best action, as it
    is where data are scarce, that is noise: Q passes the best value there is, and the true value falls."""
    true = lambda action: -jnp.sum(action**2, axis=-1)  # at most 0
    noise = lambda action: jnp.sin(1e4 * action.sum(axis=-1))  # as good as independent of its neighbours'
    noisy_q = lambda params, obs, action: (true(action) + (0.1 - 3 * true(action)) * noise(action))[None]
    uniform = lambda params, obs, key, method: jax.random.uniform(key, (*obs.shape[:-1], 2), minval=-1)
    critic, actor = (types.SimpleNamespace(apply_fn=call, params=None) for call in (noisy_q, uniform))
    state, key = types.SimpleNamespace(critic=critic, actor=actor), jax.random.PRNGKey(3)
    actions = [load_algo("ifql").max_q(state, jnp.zeros((1000, 1)), n, key) for n in (1, 16, 256)]
    q = np.array([noisy_q(None, None, action).mean() for action in actions])
    value = np.array([true(action).mean() for action in actions])
    assert (np.diff(q) > 0).all() and q[-1] > 3 and (np.diff(value) < 0).all()


@pytest.mark.parametrize("name", each_text("FlowPolicy", "Eq. 4") + each_text("TrigFlowPolicy", "Eq. 8"))
def test_max_q_against_numpy(name):
    """MaxQ takes, of n policy actions, the one with the highest minimum of the two critics (Eq. 9). Each is made from
    noise in ten equal steps of Euler (Eq. 4) or DDIM (Eq. 8), and clipped."""
    args, state, batch, key = inputs(name, flow_steps=10)
    action = load_algo(name).max_q(state, batch.obs, 5, key)
    obs, noise = np.broadcast_to(batch.obs, (5, *batch.obs.shape)), jax.random.normal(key, (5, *batch.action.shape))
    actions = reference.sample(state.actor.params, obs, noise, 10, "TrigFlowPolicy" in definitions(name))
    assert 0.1 < (np.abs(actions) == 1).mean() < 0.9
    q = reference.critics(state.critic.params, obs, actions).min(axis=0)
    np.testing.assert_allclose(action, actions[q.argmax(axis=0), np.arange(len(batch.obs))], atol=1e-5)


@pytest.mark.parametrize("name", each_text("critic_loss", "Eq. 22") + each_text("critic_loss", "Eq. 23"))
def test_critic_loss_against_numpy(name):
    """The online critics choose the next action and the target ones value it (Eq. 22); Eq. 23 draws it towards the
    data's."""
    algo, penalty = load_algo(name), "Eq. 23" in definitions(name)["critic_loss"]
    args, state, batch, key = inputs(name, **{"alpha_critic": 0.3} if penalty else {})
    next_action = np.asarray(algo.max_q(state, batch.next_obs, 4, key))
    next_q = reference.critics(state.target_critic, batch.next_obs, next_action).mean(axis=0)
    next_q = next_q - 0.3 * penalty * ((next_action - np.asarray(batch.next_action)) ** 2).sum(axis=-1)
    target = np.asarray(batch.reward) + 0.99 * np.asarray(batch.mask) * next_q
    q = reference.critics(state.critic.params, batch.obs, batch.action)
    loss, metrics = algo.critic_loss(state.critic.params, args, state, batch, key)
    np.testing.assert_allclose(loss, ((q - target) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["q"], q.mean(), rtol=1e-4)


@pytest.mark.parametrize(
    "loss, name", [(loss, name) for loss in CLONING for name in each_text(loss, "Flow matching (Eq. 3)")]
)
def test_flow_matching_against_numpy(loss, name):
    """Eqs. 3, 16 and 19: flow matching towards a or a*, alpha times the mean over batch and action dims."""
    algo, (args, state, batch, key) = load_algo(name), inputs(name)
    params = getattr(state, CLONING[loss]).params
    found, metrics = getattr(algo, loss)(params, args, state, batch, key)
    action = algo.optimal_action(args, state, batch)[0] if name in D_ALGOS else batch.action
    assert (action != batch.action).any() == (name in D_ALGOS)
    noise_key, time_key = jax.random.split(key)
    noise, t = jax.random.normal(noise_key, action.shape), jax.random.uniform(time_key, (len(action), 1))
    action, noise, t = (np.asarray(x, np.float64) for x in (action, noise, t))
    velocity = reference.velocity(params, batch.obs, (1 - t) * action + t * noise, t)
    mean = ((velocity - (action - noise)) ** 2).mean()
    np.testing.assert_allclose(metrics["flow_loss"], mean, rtol=1e-5)
    np.testing.assert_allclose(found, (300 if loss == "actor_loss" else 1) * mean, rtol=1e-5)  # FQL's flow has no alpha


@pytest.mark.parametrize(
    "name, tanh", [(name, tanh) for name in each_text("actor_loss", "Advantage") for tanh in (False, True)]
)
def test_awr_against_numpy(name, tanh):
    """Eqs. 2 and 18: the weight is the data action's, and at most 100; the action cloned is a or a*."""
    algo, (args, state, batch, _) = load_algo(name), inputs(name, alpha=10.0, tanh=tanh)
    loss, metrics = algo.actor_loss(state.actor.params, args, state, batch, None)
    v = reference.value(state.value.params, batch.obs)
    q = reference.critics(state.critic.params, batch.obs, batch.action).min(axis=0)
    weight = np.minimum(np.exp(10 * (q - v)), 100)
    assert (weight == 100).any() and (weight < 10).any()
    action = algo.optimal_action(args, state, batch)[0] if name in D_ALGOS else batch.action
    mean = reference.policy(state.actor.params, batch.obs)
    mean = np.tanh(mean) if tanh else mean
    log_prob = (-0.5 * (np.asarray(action) - mean) ** 2 - 0.5 * np.log(2 * np.pi)).sum(axis=-1)
    np.testing.assert_allclose(loss, -(weight * log_prob).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["awr_weight"], weight.mean(), rtol=1e-5)
    acts = algo.act(args, reference.stacked(state), batch.obs[None], jnp.zeros((1, 32, 2)))[0]
    np.testing.assert_allclose(acts, np.clip(mean, -1, 1), atol=1e-5)


@pytest.mark.parametrize("name", each_text("actor_loss", "TrigFlow (Eq. 6)") + each_text("actor_loss", "Eq. 20"))
def test_trigflow_losses_against_numpy(name):
    """Eqs. 5-7, 20 and 21: a_t = cos(t) a + sin(t) z, t in [0, pi / 2], f = cos(t) a_t - sin(t) F(a_t, t)."""
    algo, (args, state, batch, key) = load_algo(name), inputs(name, alpha=3.0)
    loss, metrics = algo.actor_loss(state.actor.params, args, state, batch, key)
    action = algo.optimal_action(args, state, batch)[0] if name in D_ALGOS else batch.action
    noise_key, time_key = jax.random.split(key)
    noise, t = jax.random.normal(noise_key, action.shape), jax.random.uniform(time_key, (len(action), 1)) * np.pi / 2
    action, noise, t = (np.asarray(x, np.float64) for x in (action, noise, t))
    noisy = np.cos(t) * action + np.sin(t) * noise
    denoised = np.cos(t) * noisy - np.sin(t) * reference.velocity(state.actor.params, batch.obs, noisy, t)
    mean = ((denoised - action) ** 2).mean()
    np.testing.assert_allclose(metrics["diffusion_loss"], mean, rtol=1e-5)
    assert (np.abs(denoised) > 1).any()  # Q sees it as it is
    climbs = "Eq. 20" in definitions(name)["actor_loss"]
    q = reference.critics(state.critic.params, batch.obs, denoised).min(axis=0).mean() if climbs else 0
    np.testing.assert_allclose(loss, 3 * mean - q, rtol=1e-5)


def test_bptt_against_numpy():
    """Eq. 10: through all ten flow steps, the clip and the critics. (The gradient is compared with the authors'.)"""
    args, state, batch, key = inputs("mfql_bptt", alpha=2.0, flow_steps=10)
    sample_key, noise_key, time_key = jax.random.split(key, 3)
    action = np.asarray(batch.action, np.float64)
    start, noise = (np.asarray(jax.random.normal(k, action.shape), np.float64) for k in (sample_key, noise_key))
    t = np.asarray(jax.random.uniform(time_key, (len(action), 1)), np.float64)
    sample = reference.sample(state.actor.params, batch.obs, start, 10)
    assert 0.1 < (np.abs(sample) == 1).mean() < 0.9  # some actions are clipped
    q = reference.critics(state.critic.params, batch.obs, sample).mean(axis=0)
    velocity = reference.velocity(state.actor.params, batch.obs, (1 - t) * action + t * noise, t)
    loss, _ = load_algo("mfql_bptt").actor_loss(state.actor.params, args, state, batch, key)
    np.testing.assert_allclose(loss, 2.0 * ((velocity - (action - noise)) ** 2).mean() - q.mean(), rtol=1e-5)


@pytest.mark.parametrize("name", each_text("GaussianPolicy") + each_text("DeterministicPolicy"))
def test_a_gaussian_and_rebracs_policy_start_near_zero(name):
    """The policy's output layer alone starts at a scale of 0.01: uniform within sqrt(3 * 0.01 / fan_avg)."""
    params = load_algo(name).init(small_args(name), 5, 3, 0).actor.params["params"]
    for layer, scale in ((params["MLP_0"]["Dense_0"], 1), (params["MLP_0"]["Dense_1"], 1), (params["Dense_0"], 0.01)):
        bound = np.sqrt(3 * scale / np.mean(layer["kernel"].shape))
        assert 0.8 * bound < np.abs(layer["kernel"]).max() <= bound


# Figure 2: calls of a network in one update: forward policy, forward value, backward policy, backward value. A critic
# (of two members) counts as one network. To MFQL-BPTT's ten backward policy calls the flow matching adds its own. The
# IQL family calls Q', Q, V(s), V(s') forward and Q, V(s) backward; then AWR asks for Q and V(s) once more, and
# ETrigFlow for Q both ways.
CALLS = {"mfql": (11, 3, 1, 1), "dmfql": (11, 4, 1, 2), "mfrebrac": (11, 3, 1, 1), "dmfrebrac": (11, 4, 1, 2)}
CALLS |= {"iql": (1, 6, 1, 2), "diql": (1, 7, 1, 3), "ifql": (1, 4, 1, 2), "difql": (1, 5, 1, 3)}
CALLS |= {"trigflow": (1, 4, 1, 2), "dtrigflow": (1, 5, 1, 3), "etrigflow": (1, 5, 1, 3)}
CALLS |= {"mfql_bptt": (21, 4, 11, 2), "fql": (13, 3, 2, 2), "rebrac": (2, 3, 1, 2)}


@pytest.mark.parametrize("name", CALLS)
def test_an_update_calls_networks_as_often_as_figure_2_says(name, monkeypatch):
    """Forward when a network is called, and backward when a gradient passes through what it returned."""
    ten_steps = {"flow_steps": 10} if hasattr(load_algo(name).Args, "flow_steps") else {}
    algo, (args, state, dataset, _), calls = load_algo(name), inputs(name, **ten_steps), collections.Counter()

    def count(network, kind):
        call, through = network.__call__, jax.custom_vjp(lambda output: output)
        backward = lambda _, gradient: calls.update([f"backward {kind}"]) or (gradient,)
        through.defvjp(lambda output: (output, None), backward)
        forward = lambda self, *inputs: calls.update([f"forward {kind}"]) or through(call(self, *inputs))
        monkeypatch.setattr(network, "__call__", forward)

    for network in vars(algo).values():
        if isinstance(network, type) and issubclass(network, nn.Module) and network is not algo.MLP:
            count(network, "policy" if network.__name__.endswith("Policy") else "value")
    jax.eval_shape(functools.partial(algo.update, args), jax.tree.map(jnp.asarray, dataset), state, None)
    ways = [f"{way} {kind}" for way in ("forward", "backward") for kind in ("policy", "value")]
    assert tuple(calls[way] for way in ways) == CALLS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name, num_updates", [("iql", 500), ("ifql", 1000), ("trigflow", 2000)])
def test_flow_and_diffusion_find_the_modes_that_a_gaussian_cannot(name, num_updates):
    shares = mode_shares(learn_modes(name, num_updates, batch_size=128))
    if name == "iql":
        assert shares.sum() == 0
    else:  # after so few updates; the picture in docs/ is of more
        assert shares.sum() > 0.5 and shares.min() > 0.05
