"""The algorithms the paper compares with: back-propagation against finite differences, FQL and ReBRAC against numbers
recorded from the official code, and when ReBRAC's actor moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_same, load_algo, small_args
from test_algos import definitions
from test_paper import gelu, numpy_critics, numpy_flow, numpy_mlp, one_state

import common


def fixed_inputs(name, **changes):
    """Arguments, a state with a random number for every parameter, a batch and a key: the same wherever it runs."""
    rng, args = np.random.default_rng(4), small_args(name, **changes)
    draw = lambda leaf: jnp.asarray(1.4 * rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 4))
    state = load_algo(name).init(args, 5, 3, 0)
    random = lambda net: (
        net.replace(params=jax.tree.map(draw, net.params)) if hasattr(net, "params") else (jax.tree.map(draw, net))
    )
    state = state._replace(**{field: random(getattr(state, field)) for field in state._fields if field != "key"})
    action = lambda: common.clip_action(1.2 * rng.uniform(-1, 1, (32, 3)))
    obs, next_obs = rng.normal(size=(2, 32, 5))
    batch = common.Dataset(obs, action(), -rng.uniform(size=32), rng.uniform(size=32) < 0.8, next_obs, action())
    return args, state, jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), batch), jax.random.PRNGKey(6)


def fingerprint(loss, gradient):
    """A loss, and its gradient's length and part along a random direction."""
    gradient = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient)])
    direction = np.random.default_rng(8).normal(size=gradient.size)
    return float(loss), np.linalg.norm(gradient), gradient @ direction / np.linalg.norm(direction)


# What FQL's agents/fql.py and agents/rebrac.py (github.com/seohongpark/fql, March 2025) give on `fixed_inputs` with the
# noise that our losses draw. Their t is 1 - t: so their flow's first layer got the time's row negated and added to its
# bias, and the gradient is by our parameters. The loss of "flow" is their flow's, of "actor" all else of their actor's.
RECORDED = [
    ("fql", {"alpha": 2.0, "q_agg": "min"}, "critic", (14.93584, 33.94184, 0.8120739)),
    ("fql", {"alpha": 2.0, "q_agg": "mean"}, "critic", (2.255072, 12.79606, 0.07986463)),
    ("fql", {"alpha": 2.0, "q_agg": "min"}, "flow", (2.440964, 3.662023, 0.04062264)),
    ("fql", {"alpha": 2.0, "q_agg": "min"}, "actor", (8.822498, 24.77329, -0.352714)),
    ("rebrac", {}, "critic", (4.606018, 20.29443, -0.3197611)),
    ("rebrac", {}, "actor", (0.5881462, 2.101667, 0.07465143)),
    ("rebrac", {"tanh": False}, "critic", (4.734076, 20.59203, -0.3188746)),
    ("rebrac", {"tanh": False}, "actor", (1.43446, 5.325707, 0.353157)),
]
NOISY = {"alpha_actor": 0.3, "alpha_critic": 0.2, "policy_noise": 1.0}  # so that noise_clip clips


@pytest.mark.parametrize("name, changes, part, recorded", RECORDED)
def test_losses_and_gradients_are_the_official_ones(name, changes, part, recorded):
    args, state, batch, key = fixed_inputs(name, **(NOISY if name == "rebrac" else {}), **changes)
    loss = lambda params: getattr(load_algo(name), f"{part}_loss")(params, args, state, batch, key)[0]
    found = fingerprint(*jax.value_and_grad(loss)(getattr(state, part).params))
    np.testing.assert_allclose(found, recorded, rtol=1e-4, atol=1e-6 * recorded[1])


def test_bptt_against_finite_differences():
    """Eq. 10: the gradient through all ten flow steps, the clip and the critics, along a random direction per leaf."""
    args, state, batch, key = fixed_inputs("mfql_bptt", alpha=2.0)
    critic, (obs, action) = state.critic.params, (np.asarray(array, np.float64) for array in batch[:2])
    sample_key, noise_key, time_key = jax.random.split(key, 3)
    start, noise = (np.asarray(jax.random.normal(k, action.shape), np.float64) for k in (sample_key, noise_key))
    t = np.asarray(jax.random.uniform(time_key, (len(action), 1)), np.float64)

    def loss(params):
        sample = start
        for k in range(10):
            sample = sample + numpy_flow(params, obs, sample, np.full((len(obs), 1), 1 - k / 10)) / 10
        sample = np.clip(sample, -1, 1)
        q = numpy_critics(critic, obs, sample).mean(axis=0)
        velocity = numpy_flow(params, obs, (1 - t) * action + t * noise, t)
        return 2.0 * ((velocity - (action - noise)) ** 2).mean() - q.mean(), sample

    actor_loss = load_algo("mfql_bptt").actor_loss
    value, gradient = jax.value_and_grad(lambda p: actor_loss(p, args, state, batch, key)[0])(state.actor.params)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.actor.params)
    expected, sample = loss(params)
    assert 0.1 < (np.abs(sample) == 1).mean() < 0.9  # some actions are clipped, and pass no gradient
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    leaves, structure = jax.tree.flatten(params)
    rng, eps = np.random.default_rng(1), 1e-6
    for i, leaf_gradient in enumerate(jax.tree.leaves(gradient)):
        step = eps * rng.normal(size=leaves[i].shape)
        ends = [jax.tree.unflatten(structure, [*leaves[:i], leaves[i] + s, *leaves[i + 1 :]]) for s in (step, -step)]
        difference = loss(ends[0])[0] - loss(ends[1])[0]
        length = np.linalg.norm(leaf_gradient) * np.linalg.norm(step)
        np.testing.assert_allclose(2 * np.sum(leaf_gradient * step), difference, rtol=1e-3, atol=1e-4 * length)


def test_mfql_bptt_changes_the_actor_loss_and_nothing_else():
    old, new = definitions("mfql"), definitions("mfql_bptt")
    assert old.keys() == new.keys()
    assert [key for key in new if new[key] != old[key]] == ["actor_loss"]


def numpy_policy(params, obs):
    """ReBRAC's policy before tanh."""
    hidden, out = gelu(numpy_mlp(params["params"]["MLP_0"], np.asarray(obs))), params["params"]["Dense_0"]
    return hidden @ np.asarray(out["kernel"], np.float64) + np.asarray(out["bias"])


def test_fql_logs_its_three_losses(dataset):
    args = small_args("fql")
    _, metrics = load_algo("fql").update(args, dataset, one_state("fql", args, dataset), None)
    assert metrics.keys() == {"critic_loss", "q", "flow_loss", "distill_loss", "actor_q"}


def test_fql_acts_by_its_student_in_one_step():
    args, state, batch, _ = fixed_inputs("fql")
    obs, keys = np.asarray(batch.obs[:6]).reshape(1, 6, 5), jax.random.split(jax.random.PRNGKey(0), 6)[None]
    action = load_algo("fql").act(args, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state), obs, keys)
    noise = np.stack([jax.random.normal(key, (3,)) for key in keys[0]])
    expected = numpy_mlp(state.actor.params["params"]["MLP_0"], np.concatenate([obs[0], noise], -1))
    assert (np.abs(expected) > 1).any()
    np.testing.assert_allclose(action[0], np.clip(expected, -1, 1), atol=1e-5)


def test_rebrac_target_against_numpy():
    """Eq. 11 at the paper's values: noise of 0.2 within 0.5 on the target actor's action, the smaller target critic."""
    args, state, batch, key = fixed_inputs("rebrac", alpha_critic=0.7, env_name="scene-play")
    assert (args.alpha_actor, args.discount, args.tanh) == (0.1, 0.99, True)
    noise = np.clip(0.2 * np.asarray(jax.random.normal(key, batch.action.shape), np.float64), -0.5, 0.5)
    next_action = np.clip(np.tanh(numpy_policy(state.target_actor, batch.next_obs)) + noise, -1, 1)
    penalty = 0.7 * ((next_action - batch.next_action) ** 2).sum(-1)
    next_q = numpy_critics(state.target_critic, batch.next_obs, next_action).min(0) - penalty
    target = np.asarray(batch.reward) + 0.99 * np.asarray(batch.mask) * next_q
    q = numpy_critics(state.critic.params, batch.obs, batch.action)
    loss, _ = load_algo("rebrac").critic_loss(state.critic.params, args, state, batch, key)
    np.testing.assert_allclose(loss, ((q - target) ** 2).mean(), rtol=1e-5)


@pytest.mark.parametrize("tanh", [True, False])
def test_rebrac_acts_by_its_mode(tanh):
    args, state, batch, key = fixed_inputs("rebrac", tanh=tanh)
    obs = np.asarray(batch.obs[:6]).reshape(1, 6, 5)
    states = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
    action = load_algo("rebrac").act(args, states, obs, jnp.stack([key] * 6)[None])
    expected = numpy_policy(state.actor.params, obs)
    assert (np.abs(expected) > 1).any()
    np.testing.assert_allclose(action, np.tanh(expected) if tanh else np.clip(expected, -1, 1), atol=1e-5)


def test_rebrac_starts_near_zero(dataset):
    """The policy's output layer alone starts at a scale of 0.01: uniform within sqrt(3 * 0.01 / fan_avg)."""
    params = one_state("rebrac", small_args("rebrac"), dataset).actor.params["params"]
    for layer, scale in ((params["MLP_0"]["Dense_0"], 1), (params["MLP_0"]["Dense_1"], 1), (params["Dense_0"], 0.01)):
        bound = np.sqrt(3 * scale / np.mean(layer["kernel"].shape))
        assert 0.8 * bound < np.abs(layer["kernel"]).max() <= bound


@pytest.mark.parametrize("frequency", [2, 3])
def test_rebrac_learns_its_actor_every_so_many_updates(frequency, dataset):
    """The critic learns in every update. In every second, as FQL counts them, the actor gets a gradient and both
    targets move, towards the networks before their step; in between, Adam steps the actor by a zero gradient."""
    algo, args = load_algo("rebrac"), small_args("rebrac", policy_frequency=frequency)
    state, steps = one_state("rebrac", args, dataset), jax.jit(functools.partial(algo.update, args, dataset))
    shift = functools.partial(jax.tree.map, lambda p: 1.1 * p + 0.01)
    state = state._replace(target_actor=shift(state.target_actor), target_critic=shift(state.target_critic))
    adam = optax.adam(args.learning_rate)
    close = functools.partial(np.testing.assert_allclose, atol=2e-6)
    for number in range(1, 7):
        old, (state, _) = state, steps(state, None)
        due = number % frequency == 0
        _, batch_key, _, actor_key = jax.random.split(old.key, 4)
        batch = common.sample_batch(dataset, batch_key, args.batch_size)
        gradient = jax.grad(lambda p: algo.actor_loss(p, args, old, batch, actor_key)[0])(old.actor.params)  # noqa: B023
        gradient = jax.tree.map(lambda g: g * due, gradient)  # noqa: B023
        step, _ = adam.update(gradient, old.actor.opt_state)
        assert_same(state.actor.params, optax.apply_updates(old.actor.params, step), close)
        assert number < frequency or any(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(step))
        assert not (np.asarray(jax.tree.leaves(old.critic.params)[0]) == jax.tree.leaves(state.critic.params)[0]).all()
        for net in ("actor", "critic"):
            target, online = getattr(old, f"target_{net}"), getattr(old, net).params
            moved = jax.tree.map(lambda target, p: 0.995 * target + 0.005 * p, target, online)
            assert_same(getattr(state, f"target_{net}"), moved if due else target, functools.partial(close, atol=2e-7))
