"""What holds of every file in algos/: how alike they are, and how they train."""

import collections
import difflib
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ALGOS, PAIRS, ROOT, load_algo, make_states, slow_except, small_args
from reference import definitions, each_text, inputs, stacked

import common

# What differs from file to file, because there the algorithms do; all else is the same wherever it stands. The IQL
# family has a network more, V; fql has one more, its flow; rebrac has a target more, and updates that leave the actor
# as it is: AgentState, init, update. Neither a Gaussian nor fql nor rebrac acts by MaxQ: act.
OWN = set("docstring PAPER_COLUMNS Args AgentState init critic_loss flow_loss actor_loss update act".split())


@pytest.mark.parametrize("base, name", PAIRS)
def test_a_d_file_adds_doal_and_nothing_else(base, name):
    files = [(ROOT / "algos" / f"{stem}.py").read_text().splitlines() for stem in (base, name)]
    diff = [line for line in difflib.unified_diff(*files, n=0, lineterm="") if line[:3] not in ("---", "+++")]
    assert len([line for line in diff if line[0] in "+-"]) <= 25
    old, new = definitions(base), definitions(name)
    clones = "flow_loss" if "flow_loss" in new else "actor_loss"
    differ = {key for key in new if new[key] != old.get(key)}
    assert differ == {"docstring", "PAPER_COLUMNS", "Args", "optimal_action", clones} and set(old) <= set(new)


@pytest.mark.parametrize("base, name", [("mfql", "mfql_bptt"), ("trigflow", "etrigflow")])
def test_a_file_that_climbs_q_changes_the_actor_loss_and_nothing_else(base, name):
    old, new = definitions(base), definitions(name)
    assert old.keys() == new.keys()
    assert [key for key in new if new[key] != old[key]] == ["docstring", "PAPER_COLUMNS", "actor_loss"]


def test_definitions_of_one_name_are_one_text():
    texts = collections.defaultdict(set)
    for name in ALGOS:
        for key, text in definitions(name).items():
            texts[key].add(text)
    assert {key for key in texts if len(texts[key]) > 1} <= OWN


def test_the_iql_family_learns_its_values_in_one_text():
    """Where the texts of OWN may differ, they do so for the policy's sake alone."""
    texts = lambda key, *has: {definitions(name)[key] for name in ALGOS if set(has) <= definitions(name).keys()}
    for key in ("AgentState", "critic_loss", "update"):
        assert len(texts(key, "value_loss")) == 1
    for policy in ("GaussianPolicy", "FlowPolicy", "TrigFlowPolicy"):
        assert len(texts("init", "value_loss", policy)) == 1
    assert len(texts("act", "max_q")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", each_text("update"))
def test_a_seed_learns_the_same_alone_and_among_others(name):
    """Also where a call of `train` does fewer updates: one program that is compiled once."""
    algo, (together, _, dataset, _), alone = load_algo(name), inputs(name, seeds=(7, 8)), small_args(name, seeds=(8,))
    states, metrics = algo.train(together, 20, dataset, make_states(name, together, dataset))
    state, first = algo.train(alone, 10, dataset, make_states(name, alone, dataset))
    with jax.no_tracing():
        state, second = algo.train(alone, 10, dataset, state)
    for leaf, both in zip(jax.tree.leaves(state), jax.tree.leaves(states)):
        np.testing.assert_array_equal(leaf[0], both[1])
    for key, metric in metrics.items():
        assert metric.shape == (2,) and np.isfinite(metric).all()
        np.testing.assert_allclose((first[key] + second[key]) / 2, metric[1:], rtol=1e-5)
    assert any((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(states.actor.params))  # the seeds differ


PLACE = """
import common, numpy
dataset, states = common.place(numpy.zeros(9), numpy.zeros((4, 5)))
assert [shard.data.shape for shard in dataset.addressable_shards] == [(9,), (9,)]
assert [shard.data.shape for shard in states.addressable_shards] == [(2, 5), (2, 5)]
"""


def test_devices_have_all_data_and_an_equal_share_of_the_seeds():
    """Of three devices, two share four seeds."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    subprocess.run([sys.executable, "-c", PLACE], cwd=ROOT, env=env, check=True)


@pytest.mark.parametrize("name", each_text("act"))
def test_actions_of_a_slot_depend_on_its_own_observation_and_key(name):
    args, state, batch, _ = inputs(name)
    act = functools.partial(load_algo(name).act, args, jax.tree.map(lambda leaf: np.stack([leaf, leaf]), state))
    obs, keys = batch.obs[:6].reshape(2, 3, 5), np.arange(12, dtype=np.uint32).reshape(2, 3, 2)
    action = act(obs, keys)
    assert action.shape == (2, 3, 3) and np.abs(action).max() <= 1
    last = np.array([[False] * 3, [False, False, True]])
    np.testing.assert_array_equal(np.any(act(obs + last[..., None], keys) != action, axis=-1), last)
    random = any("def sample(" in text for text in definitions(name).values())  # the others act by a mean
    np.testing.assert_array_equal(np.any(act(obs, keys + last[..., None]) != action, axis=-1), last & random)


@pytest.mark.parametrize("name", each_text("Critic"))
def test_the_two_critics_start_apart(name):
    params = load_algo(name).init(small_args(name), 5, 3, 0).critic.params
    assert all((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(params) if leaf.ndim == 3)  # biases are 0


@pytest.mark.parametrize("name", ALGOS)
def test_every_draw_has_a_key_of_its_own(name, monkeypatch):
    algo, (args, state, dataset, _), keys = load_algo(name), inputs(name), []
    for function in ("split", "normal", "uniform", "randint"):
        call = getattr(jax.random, function)
        note = lambda key, *args, call=call, **kwargs: keys.append(key) or call(key, *args, **kwargs)
        monkeypatch.setattr(jax.random, function, note)

    def keys_of_two_updates(dataset, state):
        for _ in range(2):
            state, _ = algo.update(args, dataset, state, None)
        return keys

    keys = jax.jit(keys_of_two_updates)(dataset, state)
    shared = 2 if name == "fql" else 0  # its flow and its student start from the same noise
    assert len(keys) >= 4 and len(np.unique(keys, axis=0)) == len(keys) - shared


def test_every_transition_is_drawn():
    three = jax.tree.map(jnp.arange, common.Dataset(*[3] * 6))
    assert set(np.array(common.sample_batch(three, jax.random.PRNGKey(0), 100).obs)) == {0, 1, 2}


# Numbers that say how long a run is, how it is scored and what it is made of; training or acting reads all others.
AROUND = {"num_updates", "eval_episodes", "eval_seed", "num_workers", "generate_episodes"}


@pytest.mark.parametrize("name", slow_except(ALGOS, "dmfrebrac", "diql"))
def test_every_number_changes_what_is_learned_or_done(name):
    def after_two_updates(**changes):
        algo, (args, state, dataset, key) = load_algo(name), inputs(name, hidden_dims=(8,), **changes)
        action = algo.act.__wrapped__(args, stacked(state), dataset.obs[None], jnp.tile(key, (1, 32, 1)))
        for _ in range(2):  # op by op: nothing is compiled anew for another number
            state, _ = algo.update(args, dataset, state, None)
        return jax.tree.leaves((action, state))

    before, args = after_two_updates(), vars(small_args(name))
    for flag in {flag for flag, value in args.items() if type(value) in (int, float)} - AROUND:
        other = 2 * args[flag] if args[flag] >= 1 else args[flag] / 2 or 0.5
        assert any((new != old).any() for new, old in zip(after_two_updates(**{flag: other}), before)), flag
