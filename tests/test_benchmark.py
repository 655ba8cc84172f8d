"""What benchmark.py measures: an update's operations, and the other codes, driven as their own main.py does."""

import concurrent.futures
import sys
import types

import benchmark
import flax
import jax
import jax.numpy as jnp
import pytest
from conftest import small_args

import common

benchmark.TRANSITIONS = 100


@pytest.mark.slow
def test_ours_is_timed_and_every_product_of_an_update_counted_once(monkeypatch):
    """iql: actor, V and both critics forward and backward, V(s') and both targets forward. Q(s, a) and V(s) serve their
    own losses and the weight of AWR, by common.XLA_OPTIONS."""
    small = small_args("iql", hidden_dims=(64, 64))  # batches of 32
    monkeypatch.setattr(common, "resolve", lambda *args: small)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", concurrent.futures.ThreadPoolExecutor)
    bench = benchmark.Args(num_updates=20, turns=1)
    row = benchmark.compare(bench, "iql")
    assert float(row[1]) > 0 and float(row[2].split()[0]) > 0 and row[3:] == [""] * 4
    ours = benchmark.make(benchmark.Ours, bench, "iql")
    obs_dim, action_dim = ours.dataset.obs.shape[-1], ours.dataset.action.shape[-1]
    forward = lambda inputs, outputs: 2 * 32 * 64 * (inputs + 64 + outputs)
    trained = lambda inputs, outputs: 3 * forward(inputs, outputs) - 2 * 32 * 64 * inputs  # not back to the inputs
    products = trained(obs_dim, action_dim) + trained(obs_dim, 1) + 2 * trained(obs_dim + action_dim, 1)
    products += forward(obs_dim, 1) + 2 * forward(obs_dim + action_dim, 1)
    assert products < ours.flops < 1.3 * products  # the rest is Adam's and the activations'


class Agent(flax.struct.PyTreeNode):
    params: jax.Array  # counts transitions and full updates
    network = property(lambda self: self)
    create = classmethod(lambda cls, *args: cls(jnp.zeros(2)))

    def update(self, batch, full_update=True):
        return self.replace(params=self.params + jnp.array([len(batch["actions"]), full_update])), None


class Buffer:
    create_from_initial_dataset = classmethod(lambda cls, data, size: cls())
    sample = lambda self, n: dict.fromkeys(("observations", "actions"), jnp.zeros((n, 3)))


@pytest.mark.parametrize("scan, full_updates", [(False, 20), (True, 40)])
def test_other_codes_take_a_batch_per_update(scan, full_updates, monkeypatch):
    modules = {"agents": {"agents": {"rebrac": Agent}}, "utils.datasets": {"ReplayBuffer": Buffer}}
    modules |= {"agents.rebrac": {"get_config": lambda: {"batch_size": 32, "actor_freq": 2}}}
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    theirs = benchmark.Theirs(benchmark.Args(fql_dir="", doal_dir="", num_updates=40), "rebrac", scan)
    assert theirs.train() > 0 and theirs.data.return_next_actions
    assert theirs.agent.params.tolist() == [32 * 40, full_updates]
