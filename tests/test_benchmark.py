"""The floor that benchmark.py measures against counts every matrix product of an update."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_algo, make_states, small_args

import benchmark
import common


def count(function, *args):
    """FLOPs of the matrix products of `function(*args)`."""
    closed = jax.make_jaxpr(function)(*args)
    found, _ = benchmark.products(closed, list(range(len(closed.jaxpr.invars))))
    return sum(share * benchmark.flops(*product) for *product, share in found.values())


def test_a_product_is_counted_once_and_half_in_a_condition():
    x, y = jnp.ones((3, 4)), jnp.ones((4, 4))
    one = 2 * 3 * 4 * 4
    assert count(lambda x, y: (x @ y) @ y, x, y) == 2 * one
    assert count(lambda x, y: (jax.nn.gelu(x @ y), jax.nn.gelu(x @ y) @ y), x, y) == 2 * one
    assert count(lambda x, y: x @ y + (2 * x) @ y, x, y) == 2 * one
    assert count(lambda x, y: jax.lax.cond(x.sum() > 0, lambda: x @ y, lambda: x), x, y) == one / 2
    batch = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    assert count(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), *batch) == 2 * 2 * 3 * 4 * 5


def test_the_floor_counts_every_pass_of_every_network(dataset):
    """iql: the actor, V and both critics forward and backward; V(s') and both target critics forward. What AWR weighs
    by, V(s) and Q(s, a), is in the losses of V and the critics already."""
    args = small_args("iql")
    state = jax.tree.map(lambda array: array[0], make_states("iql", args, dataset))
    obs_dim, action_dim = dataset.obs.shape[-1], dataset.action.shape[-1]
    shapes = (obs_dim, action_dim), (obs_dim, 1), (obs_dim + action_dim, 1)
    layers = lambda *dims: [2 * 32 * a * b for a, b in zip(dims, dims[1:])]  # small_args: a batch of 32, 24 and 16 wide
    actor, value, critic = (layers(inputs, 24, 16, outputs) for inputs, outputs in shapes)
    trained = lambda layers: sum(layers) + sum(layers) + sum(layers[1:])  # forward; back to weights; back to inputs
    expected = trained(actor) + trained(value) + 2 * trained(critic) + sum(value) + 2 * sum(critic)
    assert count(lambda state: load_algo("iql").update(args, dataset, state, None), state) == expected


def test_the_floor_of_acting_counts_every_step_of_every_sample(dataset):
    """ifql: flow_steps passes of the actor and one of both critics, for num_samples actions of each observation."""
    args, module = small_args("ifql"), load_algo("ifql")
    obs_dim, action_dim = dataset.obs.shape[-1], dataset.action.shape[-1]
    layers = lambda *dims: sum(2 * a * b for a, b in zip(dims, dims[1:]))  # small_args: 24 and 16 wide
    actor, critic = layers(obs_dim + action_dim + 1, 24, 16, action_dim), layers(obs_dim + action_dim, 24, 16, 1)
    obs, keys = jnp.zeros((1, 3, obs_dim)), jnp.zeros((1, 3, 2), jnp.uint32)
    floor = benchmark.floor_of(functools.partial(module.act, args, make_states("ifql", args, dataset)), obs, keys)
    expected = 3 * args.num_samples * (args.flow_steps * actor + 2 * critic)
    assert floor.gflop * 1e9 == pytest.approx(expected, rel=1e-9)


def test_a_start_that_fails_is_no_measurement(monkeypatch, tmp_path):
    np.savez(tmp_path / "data.npz", terminals=np.ones(1))
    about = {"path": tmp_path / "data.npz", "transitions": 1}
    monkeypatch.setattr(common, "load_dataset", lambda *a, **k: (None, about))
    with pytest.raises(subprocess.CalledProcessError) as error:
        benchmark.whole_runs("no_such_file", 1, benchmark.Args(num_transitions=1, run_updates=50))
    assert error.value.cmd[-1] == "10"  # the first start, not the whole run of 50 updates after it


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"algos": ("nope",)}, "there is no algos/nope.py"),
        ({"algos": ()}, "nothing is to be timed"),
        ({"env_name": "nope"}, "there is no task 'nope'"),
        ({"num_seeds": (1, 0)}, "--num-seeds 0 is impossible"),
        ({"turns": 0}, "--turns 0 is impossible"),
        ({"run_updates": 15}, "give a multiple of 10"),
        ({"fql_dir": "nope"}, "nope is no clone of the official FQL code"),
        ({"out": "/proc/nope/x"}, "cannot write /proc/nope/x.json"),
    ],
)
def test_what_cannot_be_timed_is_refused(changes, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.Error, match=sentence):
        benchmark.main(benchmark.Args(**changes))
    assert not list(tmp_path.glob("*/*"))


def test_fqls_code_is_timed_without_our_flags():
    code = "import benchmark, os; benchmark.import_common(); print(os.environ.get('XLA_FLAGS', ''))"
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    assert not subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", ["iql", "diql"])
def test_what_two_losses_ask_for_is_computed_once(name, dataset):
    """Q(s, a) and V(s), for their own losses and for the weight of AWR: by common.XLA_FLAGS."""
    args = small_args(name)
    state = jax.tree.map(lambda array: array[0], make_states(name, args, dataset))
    update = lambda state: load_algo(name).update(args, dataset, state, None)
    closed = jax.make_jaxpr(update)(state)
    asked, _ = benchmark.products(closed, list(range(len(closed.jaxpr.invars))))
    computed = re.findall(r" dot\(", jax.jit(update).lower(state).compile().as_text())
    assert len(asked) / 2 < len(computed) <= len(asked)
