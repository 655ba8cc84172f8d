"""The paper's claims and equations, against autodiff and independent numpy."""

import functools
import inspect

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ALGOS, PAIRS, assert_same, load_algo, make_states, small_args

import common

D_ALGOS = [name for _, name in PAIRS]
QL_ALGOS = ["mfql", "dmfql", "mfrebrac", "dmfrebrac", "mfql_bptt"]
FLOW_ALGOS = [*QL_ALGOS, "ifql", "difql"]
MAXQ_ALGOS = [*FLOW_ALGOS, "trigflow", "dtrigflow", "etrigflow"]


def one_state(name, args, dataset):
    return jax.tree.map(lambda leaf: leaf[0], make_states(name, args, dataset))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_mlp(params, x, layer_norm=False):
    """The MLP of every network, in float64 numpy."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    depth = sum(name.startswith("Dense") for name in params)
    for i in range(depth):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        if i < depth - 1:
            x = gelu(x)
            if layer_norm:
                x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
                x = x * params[f"LayerNorm_{i}"]["scale"] + params[f"LayerNorm_{i}"]["bias"]
    return x


def numpy_critics(params, obs, action):
    x = np.concatenate([obs, action], -1).astype(np.float64)
    members = [jax.tree.map(lambda p, i=i: p[i], params["params"]["VmapMLP_0"]) for i in (0, 1)]
    return np.stack([numpy_mlp(member, x, layer_norm=True)[..., 0] for member in members])


def numpy_flow(params, obs, action, t):
    return numpy_mlp(params["params"]["MLP_0"], np.concatenate([obs, action, t], -1).astype(np.float64))


def numpy_sample(name, params, obs, noise, steps):
    """Eq. 4: a_{t - dt} = a_t + dt v(a_t, t), from t = 1 to t = 0; or Eq. 8, from t = pi / 2 to t = 0."""
    action = np.asarray(noise, np.float64)
    times = np.linspace(np.pi / 2 if "trigflow" in name else 1, 0, steps + 1)
    for k, t in zip(times, times[1:]):
        output = numpy_flow(params, obs, action, np.full((*obs.shape[:-1], 1), k))
        action = np.cos(k - t) * action - np.sin(k - t) * output if "trigflow" in name else action + (k - t) * output
    return np.clip(action, -1, 1)


@pytest.mark.parametrize(
    "name, task, expected",
    [
        ("dmfrebrac", "scene-play", "delta 0.1 num_samples 4 alpha_critic 0.01 alpha 300 discount 0.99"),
        ("dmfrebrac", "pen-cloned-v1", "delta 0.0003 num_samples 32 alpha_critic 0.5 alpha 10000"),
        ("dmfql", "cube-double-play-singletask-task4-v0", "delta 0.03 num_samples 4 alpha 300 num_updates 1000000"),
        ("mfql", "humanoidmaze-large-navigate", "num_samples 16 alpha 30 discount 0.99 num_target_samples 4"),
        ("difql", "puzzle-4x4-play", "delta 0.03 num_samples 64 alpha 1000 discount 0.99 expectile 0.9"),
        ("diql", "antsoccer-arena-navigate", "delta 0.1 alpha 1 discount 0.99"),
        ("etrigflow", "door-expert-v1", "num_samples 2 alpha 30000 num_updates 500000"),
        ("fql", "antmaze-large-navigate", "alpha 10 q_agg min discount 0.99"),
        ("rebrac", "relocate-expert-v1", "alpha_actor 0.05 alpha_critic 0.01 num_updates 500000"),
    ],
)
def test_values_are_the_papers(name, task, expected):
    args = common.resolve(load_algo(name).Args(env_name=task), common.load_task(task), load_algo(name).COLUMNS)
    words = expected.split()
    assert {flag: str(getattr(args, flag)) for flag in words[::2]} == dict(zip(words[::2], words[1::2]))
    assert (args.hidden_dims, args.batch_size, args.learning_rate, args.tau) == ((512,) * 4, 256, 3e-4, 0.005)
    given = load_algo(name).Args(env_name=task, discount=0.5)
    assert common.resolve(given, common.load_task(task), load_algo(name).COLUMNS).discount == 0.5


def test_proposition_1(dataset, batch):
    """BRAC's gradient, as rebrac.py takes it, is that of cloning a + grad_a Q(s, pi(s)) / (2 alpha) (Eqs. 12-14)."""
    algo, args = load_algo("rebrac"), small_args("rebrac", alpha_actor=0.7)
    state = one_state("rebrac", args, dataset)
    policy = lambda params: state.actor.apply_fn(params, batch.obs)
    q = lambda action: state.critic.apply_fn(state.critic.params, batch.obs, action).min(axis=0)
    params, action = state.actor.params, policy(state.actor.params)
    alpha = args.alpha_actor * jnp.abs(q(action)).mean()  # the loss divides Q by its scale
    target = batch.action + jax.grad(lambda action: q(action).sum())(action) / (2 * alpha)
    brac = lambda params: algo.actor_loss(params, args, state, batch, None)[0]
    cloning = lambda params: args.alpha_actor * jnp.sum((policy(params) - target) ** 2, axis=-1).mean()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    assert_same(jax.grad(brac)(params), jax.grad(cloning)(params), close)


@pytest.mark.parametrize("name", D_ALGOS)
def test_proposition_2(name, dataset, batch):
    """The optimal action lies up the gradient of Q, at a distance whose mean over the batch is delta (Eqs. 15, 17),
    where neither safeguard acts: small actions, and no gradient much longer than the others."""
    algo, args = load_algo(name), small_args(name, delta=0.3)
    state = one_state(name, args, dataset)
    batch = jax.tree.map(lambda array: array[:8], batch._replace(action=0.3 * batch.action))
    action, norm = algo.optimal_action(args, state, batch)
    assert np.abs(action).max() < 1
    step = np.asarray(action - batch.action, np.float64)
    np.testing.assert_allclose(np.linalg.norm(step, axis=-1).mean(), 0.3, rtol=1e-4)

    eps, obs, data = 1e-5, np.asarray(batch.obs), np.asarray(batch.action, np.float64)
    q = lambda a: numpy_critics(state.critic.params, obs, a).mean(axis=0)
    moved = lambda d: eps * np.eye(data.shape[-1])[d]
    gradient = np.stack([(q(data + moved(d)) - q(data - moved(d))) / (2 * eps) for d in range(data.shape[-1])], -1)
    norms = np.linalg.norm(gradient, axis=-1)
    mean_norm = norms.mean()
    assert norms.max() < mean_norm + 2 * norms.std()
    np.testing.assert_allclose(norm, mean_norm, rtol=1e-3)
    np.testing.assert_allclose(step, 0.3 * gradient / mean_norm, atol=1e-4)


@pytest.mark.parametrize("name", D_ALGOS)
def test_optimal_action_of_a_flat_critic_is_the_data_action(name, dataset, batch):
    algo, args = load_algo(name), small_args(name)
    state = one_state(name, args, dataset)
    flat = state._replace(critic=state.critic.replace(params=jax.tree.map(jnp.zeros_like, state.critic.params)))
    action, norm = algo.optimal_action(args, flat, batch)
    np.testing.assert_allclose(norm, 1e-5, rtol=1e-4)
    np.testing.assert_array_equal(action, batch.action)


@pytest.mark.parametrize("name", D_ALGOS)
def test_a_gradient_far_longer_than_the_others_is_shortened(name, dataset, batch):
    """To the mean + 2 std of the norms, by which the step is not measured anew: its mean falls below delta."""
    algo, args = load_algo(name), small_args(name, delta=0.01)
    state = one_state(name, args, dataset)
    long = lambda params, obs, action: (jnp.where(jnp.arange(32) == 3, 30, 1) * action.sum(-1))[None]
    state = state._replace(critic=state.critic.replace(apply_fn=long))
    batch = batch._replace(action=0 * batch.action)
    step = np.asarray(algo.optimal_action(args, state, batch)[0])
    norms = np.sqrt(5) * np.where(np.arange(32) == 3, 30, 1)
    lengths = 0.01 / norms.mean() * np.minimum(norms, norms.mean() + 2 * norms.std())
    np.testing.assert_allclose(np.linalg.norm(step, axis=-1), lengths, rtol=1e-4)
    assert lengths.mean() < 0.009 and lengths[3] < 0.5 * 0.01 * norms[3] / norms.mean()


@pytest.mark.parametrize("name", D_ALGOS)
def test_optimal_action_is_clipped_and_does_not_hide_nan(name, dataset, batch):
    algo, args = load_algo(name), small_args(name, delta=100.0)
    state = one_state(name, args, dataset)
    assert np.abs(algo.optimal_action(args, state, batch)[0]).max() == 1
    broken = state._replace(
        critic=state.critic.replace(params=jax.tree.map(lambda p: p * jnp.nan, state.critic.params))
    )
    assert np.isnan(algo.optimal_action(args, broken, batch)[0]).all()


@pytest.mark.parametrize("name", MAXQ_ALGOS)
def test_sampling_against_numpy(name, dataset, batch):
    """Ten equal steps of Euler (Eq. 4) or DDIM (Eq. 8) from noise, clipped."""
    args = small_args(name)
    state, key = one_state(name, args, dataset), jax.random.PRNGKey(1)
    noise = jax.random.normal(key, batch.action.shape)
    action = state.actor.apply_fn(state.actor.params, batch.obs, key, method="sample")
    np.testing.assert_allclose(action, numpy_sample(name, state.actor.params, batch.obs, noise, 10), atol=1e-5)


@pytest.mark.parametrize("name", MAXQ_ALGOS)
def test_max_q_against_numpy(name, dataset, batch):
    """MaxQ takes, of n policy actions, the one with the highest minimum of the two critics (Eq. 9)."""
    algo, args = load_algo(name), small_args(name)
    state, key = one_state(name, args, dataset), jax.random.PRNGKey(2)
    action = algo.max_q(state, batch.obs, 5, key)
    obs = np.broadcast_to(batch.obs, (5, *batch.obs.shape))
    actions = numpy_sample(name, state.actor.params, obs, jax.random.normal(key, (5, *batch.action.shape)), 10)
    q = numpy_critics(state.critic.params, obs, actions).min(0)
    np.testing.assert_allclose(action, actions[q.argmax(0), np.arange(len(batch.obs))], atol=1e-5)


@pytest.mark.parametrize("name", QL_ALGOS)
def test_critic_loss_against_numpy(name, dataset, batch):
    """Eq. 22, and Eq. 23 where the policy's next action is drawn towards the data's."""
    algo, args = load_algo(name), small_args(name, **({"alpha_critic": 0.3} if "rebrac" in name else {}))
    state, key = one_state(name, args, dataset), jax.random.PRNGKey(3)
    state = state._replace(target_critic=jax.tree.map(lambda p: 1.1 * p + 0.01, state.target_critic))
    batch = batch._replace(mask=batch.mask.at[::2].set(0))
    loss, metrics = algo.critic_loss(state.critic.params, args, state, batch, key)
    next_action = algo.max_q(state, batch.next_obs, 4, key)
    next_q = numpy_critics(state.target_critic, batch.next_obs, next_action).mean(0)
    if "rebrac" in name:
        next_q = next_q - 0.3 * ((np.asarray(next_action) - np.asarray(batch.next_action)) ** 2).sum(-1)
    target = np.asarray(batch.reward) + 0.99 * np.asarray(batch.mask) * next_q
    q = numpy_critics(state.critic.params, batch.obs, batch.action)
    np.testing.assert_allclose(loss, ((q - target) ** 2).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], q.mean(), rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in FLOW_ALGOS if name != "mfql_bptt"])  # whose is in test_baselines.py
def test_actor_loss_against_numpy(name, dataset, batch):
    """Eqs. 3, 16 and 19: flow matching towards a or a*, alpha times the mean over batch and action dims."""
    algo, args = load_algo(name), small_args(name)
    state, key = one_state(name, args, dataset), jax.random.PRNGKey(4)
    loss, metrics = algo.actor_loss(state.actor.params, args, state, batch, key)
    action = algo.optimal_action(args, state, batch)[0] if name in D_ALGOS else batch.action
    noise_key, time_key = jax.random.split(key)
    noise, t = jax.random.normal(noise_key, action.shape), jax.random.uniform(time_key, (len(action), 1))
    action, noise, t = (np.asarray(x, np.float64) for x in (action, noise, t))
    velocity = numpy_flow(state.actor.params, batch.obs, (1 - t) * action + t * noise, t)
    mean = ((velocity - (action - noise)) ** 2).mean()
    np.testing.assert_allclose(metrics["flow_loss"], mean, rtol=1e-4)
    np.testing.assert_allclose(loss, 300 * mean, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in ALGOS if name != "rebrac"])  # whose is in test_baselines.py
def test_update_against_numpy(name, dataset):
    """One update: every gradient at the old parameters, Adam's first step, the target towards the old critic."""
    algo, args = load_algo(name), small_args(name)
    state = one_state(name, args, dataset)
    state = state._replace(target_critic=jax.tree.map(lambda p: 1.1 * p + 0.01, state.target_critic))
    new, _ = algo.update(args, dataset, state, None)
    losses = {net: getattr(algo, f"{net}_loss") for net in ("critic", "value", "flow", "actor") if hasattr(state, net)}
    draws = [net for net, loss in losses.items() if "key" in inspect.signature(loss).parameters]
    _, batch_key, *keys = jax.random.split(state.key, 2 + len(draws))
    batch, keys = common.sample_batch(dataset, batch_key, args.batch_size), dict(zip(draws, keys))
    for net, loss in losses.items():
        old, more = getattr(state, net).params, [keys[net]] if net in keys else []
        gradient = jax.grad(loss, has_aux=True)(old, args, state, batch, *more)[0]
        adam = jax.tree.map(lambda p, g: p - 3e-4 * g / (jnp.abs(g) + 1e-8), old, gradient)
        assert_same(getattr(new, net).params, adam, functools.partial(np.testing.assert_allclose, atol=2e-6))
    moved = jax.tree.map(lambda target, old: 0.995 * target + 0.005 * old, state.target_critic, state.critic.params)
    assert_same(new.target_critic, moved, functools.partial(np.testing.assert_allclose, atol=2e-7))


@pytest.mark.parametrize("base, name", PAIRS)
def test_delta_0_is_the_baseline_bit_for_bit(base, name, dataset):
    algo, args = load_algo(name), small_args(name, delta=0.0, seeds=(1, 2))
    base_args = small_args(base, seeds=(1, 2))
    expected, _ = load_algo(base).train(base_args, 50, dataset, make_states(base, base_args, dataset))
    found, _ = algo.train(args, 50, dataset, make_states(name, args, dataset))
    assert_same(found, expected)
    args = small_args(name, seeds=(1, 2))
    moved, _ = algo.train(args, 50, dataset, make_states(name, args, dataset))
    pairs = zip(jax.tree.leaves(moved.actor.params), jax.tree.leaves(expected.actor.params))
    assert any((a != b).any() for a, b in pairs)  # with the paper's delta it is another algorithm


# Figure 2: calls of a network in one update: forward policy, forward value, backward policy, backward value. A critic
# (of two members) counts as one network. To MFQL-BPTT's ten backward policy calls the flow matching adds its own. The
# IQL family calls Q', Q, V(s), V(s') forward and Q, V(s) backward; then AWR asks for Q and V(s) once more, and
# ETrigFlow for Q both ways.
CALLS = {"mfql": (11, 3, 1, 1), "dmfql": (11, 4, 1, 2), "mfrebrac": (11, 3, 1, 1), "dmfrebrac": (11, 4, 1, 2)}
CALLS |= {"iql": (1, 6, 1, 2), "diql": (1, 7, 1, 3), "ifql": (1, 4, 1, 2), "difql": (1, 5, 1, 3)}
CALLS |= {"trigflow": (1, 4, 1, 2), "dtrigflow": (1, 5, 1, 3), "etrigflow": (1, 5, 1, 3)}
CALLS |= {"mfql_bptt": (21, 4, 11, 2), "fql": (13, 3, 2, 2), "rebrac": (2, 3, 1, 2)}


def network_calls(jaxpr, batch_size):
    """Counts passes by the products of the second layer: a backward pass makes one whose result has a row per
    transition."""
    counts = dict.fromkeys(["forward policy", "forward value", "backward policy", "backward value"], 0)
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            for name, count in network_calls(inner, batch_size).items():
                counts[name] += count
        stack = str(equation.source_info.name_stack)
        if equation.primitive.name == "dot_general" and stack.endswith("Dense_1"):
            way = "backward" if "transpose" in stack else "forward"
            if batch_size in equation.outvars[0].aval.shape:
                counts[f"{way} {'policy' if 'Policy' in stack else 'value'}"] += 1
    return counts


@pytest.mark.parametrize("name", ALGOS)
def test_network_calls_per_update(name, dataset):
    args = small_args(name, batch_size=123)
    state = one_state(name, args, dataset)
    jaxpr = jax.make_jaxpr(functools.partial(load_algo(name).update, args))(dataset, state, None)
    assert tuple(network_calls(jaxpr.jaxpr, 123).values()) == CALLS[name]
