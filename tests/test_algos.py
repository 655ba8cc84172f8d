"""What holds of every file in algos/: how alike they are, and how they train."""

import ast
import collections
import difflib
import functools

import jax
import numpy as np
import pytest
from conftest import ALGOS, FULLEST, PAIRS, ROOT, assert_same, load_algo, make_states, small_args

import common

# Definitions that differ from file to file, because there the algorithms do; all others are the same wherever they
# stand. The IQL family has a network more, V; fql has one more, its flow; rebrac has a target more, and updates that
# leave the actor as it is: AgentState, init, update. Neither a Gaussian nor fql nor rebrac acts by MaxQ: act.
OWN = {"Args", "AgentState", "init", "critic_loss", "actor_loss", "update", "act"}


def definitions(name):
    """{name of a function or class: its text} of an algorithm's file."""
    text = (ROOT / "algos" / f"{name}.py").read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    first = lambda node: min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    return {node.name: "\n".join(text.splitlines()[first(node) : node.end_lineno]) for node in nodes}


@pytest.mark.parametrize("base, name", PAIRS)
def test_a_d_file_adds_doal_and_nothing_else(base, name):
    files = [(ROOT / "algos" / f"{stem}.py").read_text().splitlines() for stem in (base, name)]
    diff = [line for line in difflib.unified_diff(*files, n=0, lineterm="") if line[:3] not in ("---", "+++")]
    assert len([line for line in diff if line[0] in "+-"]) <= 25
    old, new = definitions(base), definitions(name)
    assert {key for key in new if new[key] != old.get(key)} == {"Args", "optimal_action", "actor_loss"}
    assert set(old) <= set(new)


def test_definitions_of_one_name_are_one_text():
    texts = collections.defaultdict(set)
    for name in ALGOS:
        for key, text in definitions(name).items():
            texts[key].add(text)
    assert {key for key in texts if len(texts[key]) > 1} <= OWN


def test_the_iql_family_learns_its_values_in_one_text():
    """Where the texts of OWN may differ, they do so for the policy's sake alone."""
    family = [name for name in ALGOS if "value_loss" in definitions(name)]
    assert family == sorted(["iql", "diql", "ifql", "difql", "trigflow", "dtrigflow", "etrigflow"])
    for key in ("AgentState", "critic_loss", "update"):
        assert len({definitions(name)[key] for name in family}) == 1
    for names in (("iql", "diql"), ("ifql", "difql"), ("trigflow", "dtrigflow", "etrigflow")):
        assert len({definitions(name)["init"] for name in names}) == 1
    sampling = [name for name in ALGOS if "max_q" in definitions(name)]
    assert len({definitions(name)["act"] for name in sampling}) == 1


def test_definitions_stand_in_one_order():
    orders = [list(definitions(name)) for name in ALGOS]
    for first in orders:
        for second in orders:
            shared = set(first) & set(second)
            assert [key for key in first if key in shared] == [key for key in second if key in shared]


@pytest.mark.parametrize("name", FULLEST)
def test_a_seed_is_the_same_alone_and_among_others(name, dataset):
    together, alone = small_args(name, seeds=(7, 8, 9)), small_args(name, seeds=(8,))
    states, metrics = load_algo(name).train(together, 10, dataset, make_states(name, together, dataset))
    state, metric = load_algo(name).train(alone, 10, dataset, make_states(name, alone, dataset))
    assert_same((states, metrics), (state, metric), lambda a, b: np.testing.assert_array_equal(a[1], b[0]))
    leaves = jax.tree.leaves(states.actor.params)
    assert any((np.asarray(leaf)[0] != np.asarray(leaf)[1]).any() for leaf in leaves)  # the seeds differ


@pytest.mark.parametrize("name", ["dmfrebrac", "rebrac"])
def test_seeds_in_one_batch_as_on_a_gpu_give_the_same_numbers(name, dataset, monkeypatch):
    algo, args = load_algo(name), small_args(name, seeds=(7, 8))
    one_after_another = jax.device_get(algo.train(args, 10, dataset, make_states(name, args, dataset)))
    algo.train.clear_cache()
    with monkeypatch.context() as patch:
        patch.setattr(common.jax, "default_backend", lambda: "gpu")
        batch = algo.train(args, 10, dataset, make_states(name, args, dataset))
    algo.train.clear_cache()
    assert_same(batch, one_after_another, functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5))


@pytest.mark.parametrize("name", FULLEST)
def test_chunks_do_not_change_the_numbers_nor_compile_again(name, dataset):
    algo, args = load_algo(name), small_args(name, seeds=(3, 4))
    algo.train.clear_cache()
    states, _ = algo.train(args, 20, dataset, make_states(name, args, dataset))
    whole = jax.device_get(states)
    states = make_states(name, args, dataset)
    for _ in range(4):
        states, metrics = algo.train(args, 5, dataset, states)
    assert algo.train._cache_size() == 2  # 20 updates, and 5
    assert_same(states, whole)
    assert all(metric.shape == (2,) and np.isfinite(metric).all() for metric in metrics.values())


@pytest.mark.parametrize("name", ALGOS)
def test_the_losses_fall_on_real_data(name, dataset):
    algo, args = load_algo(name), small_args(name, hidden_dims=(64, 64), batch_size=64)
    states, first = algo.train(args, 20, dataset, make_states(name, args, dataset))
    for _ in range(20):
        states, last = algo.train(args, 20, dataset, states)
    for loss in first.keys() & {"flow_loss", "diffusion_loss", "distill_loss", "bc_loss"}:
        assert last[loss][0] < 0.6 * first[loss][0]
    if "value_loss" in first:
        assert last["v"][0] < first["v"][0] - 0.1
    assert last["q"][0] < first["q"][0] - 0.1  # every reward is -1 until the cube lies at its goal


@pytest.mark.parametrize("name", ALGOS)
def test_actions_of_a_slot_depend_on_its_own_observation_and_key(name, dataset):
    algo, args = load_algo(name), small_args(name, seeds=(1, 2))
    states = make_states(name, args, dataset)
    obs, keys = (
        np.asarray(dataset.obs[:6]).reshape(2, 3, -1),
        jax.random.split(jax.random.PRNGKey(0), 6).reshape(2, 3, 2),
    )
    action = algo.act(args, states, obs, keys)
    assert action.shape == (2, 3, dataset.action.shape[-1]) and np.abs(action).max() <= 1
    other = obs.copy()
    other[1, 2] += 1
    changed = np.asarray(algo.act(args, states, other, keys) != action).any(-1)
    np.testing.assert_array_equal(changed, [[False] * 3, [False, False, True]])
    changed = np.asarray(algo.act(args, states, obs, keys.at[1, 2].add(1)) != action).any(-1)
    random = name not in ("iql", "diql", "rebrac")  # the others act by a mean
    np.testing.assert_array_equal(changed, [[False] * 3, [False, False, random]])
