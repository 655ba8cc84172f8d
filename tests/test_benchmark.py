"""What benchmark.py measures: an update's operations, and the other codes, driven as their own main.py does."""

import concurrent.futures
import re
import sys
import types

import benchmark
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ALGOS, load_algo, make_states, small_args

import common


@pytest.mark.slow
def test_xla_counts_every_product_of_an_update_once():
    """iql: actor, V and both critics forward and backward, V(s') and both targets forward. Q(s, a) and V(s) serve their
    own losses and the weight of AWR, by common.XLA_OPTIONS."""
    args = small_args("iql", hidden_dims=(64, 64))  # batches of 32
    obs_dim, action_dim = 28, 5
    obs, action, scalar = jnp.zeros((9, obs_dim)), jnp.zeros((9, action_dim)), jnp.zeros(9)
    dataset = common.Dataset(obs, action, scalar, scalar, obs, action)
    state = jax.tree.map(lambda array: array[0], make_states("iql", args, dataset))
    update = jax.jit(lambda state: load_algo("iql").update(args, dataset, state, None)).lower(state)
    once, twice = (update.compile(options).cost_analysis()["flops"] for options in (common.XLA_OPTIONS, {}))
    forward = lambda inputs, outputs: 2 * 32 * 64 * (inputs + 64 + outputs)
    trained = lambda inputs, outputs: 3 * forward(inputs, outputs) - 2 * 32 * 64 * inputs  # not back to the inputs
    critic, value = (obs_dim + action_dim, 1), (obs_dim, 1)
    products = trained(obs_dim, action_dim) + trained(*value) + 2 * trained(*critic) + forward(*value)
    products += 2 * forward(*critic)
    assert products < once < 1.4 * products  # the rest is Adam's and the activations'
    assert once + 2 * forward(*critic) < twice


@pytest.fixture(autouse=True)
def few_transitions(monkeypatch):
    monkeypatch.setattr(benchmark, "TRANSITIONS", 100)


class Agent(flax.struct.PyTreeNode):
    """Counts transitions and full updates."""

    params: jax.Array
    network = property(lambda self: self)
    create = classmethod(lambda cls, *args: cls(jnp.zeros(2)))

    def update(self, batch, full_update=True):
        return self.replace(params=self.params + jnp.array([len(batch["actions"]), full_update])), None


class Buffer:
    create_from_initial_dataset = classmethod(lambda cls, data, size: cls())
    sample = lambda self, n: dict.fromkeys(("observations", "actions"), np.zeros((n, 3)))


@pytest.mark.parametrize("scan, full_updates", [(False, 20), (True, 40)])
def test_other_codes_take_a_batch_per_update(scan, full_updates, monkeypatch):
    modules = {"agents": {"agents": {"rebrac": Agent}}, "utils.datasets": {"ReplayBuffer": Buffer}}
    modules |= {"agents.rebrac": {"get_config": lambda: {"batch_size": 32, "actor_freq": 2}}}
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    args = benchmark.Args(fql_dir="", doal_dir="", num_updates=40)
    theirs = benchmark.Theirs(args, "rebrac", scan)
    assert theirs.train() > 0
    np.testing.assert_array_equal(theirs.agent.params, [32 * 40, full_updates])
    assert theirs.data.return_next_actions


@pytest.mark.slow
def test_a_row_has_a_figure_for_what_was_asked(monkeypatch, capsys):
    pool = lambda workers, context, *start: concurrent.futures.ThreadPoolExecutor(workers, "", *start)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", pool)
    small = small_args("fql", seeds=(0, 1))
    monkeypatch.setattr(common, "resolve", lambda *args: small)
    benchmark.main(benchmark.Args(("fql",), 2, num_updates=20, turns=2))
    head, _, row = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[-3:]
    )
    assert head == benchmark.COLUMNS and row[0] == "fql" and float(row[1]) > 0 and row[3:] == [""] * 4
    assert re.fullmatch(r"\S+ \(\S+ to \S+\)", row[2])


def test_what_cannot_be_timed_is_refused():
    assert benchmark.FQL.keys() <= benchmark.DOAL.keys() == set(ALGOS)
    for changes in ({"num_updates": 30}, {"turns": 0}):
        with pytest.raises(common.Error, match="30|turns"):
            benchmark.main(benchmark.Args(**changes))
