"""What XLA gets and makes of the programs; also for an NVIDIA GPU, on a machine that has none."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ALGOS, ROOT, load_algo, small_args

import common

spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
DATASET = common.Dataset(spec(99, 5), spec(99, 3), spec(99), spec(99), spec(99, 5), spec(99, 3))


def specs(name, num_seeds, **changes):
    """Small arguments, and the shapes of the states."""
    args = small_args(name, seeds=tuple(range(num_seeds)), **changes)
    init = functools.partial(load_algo(name).init, args, 5, 3)
    return args, jax.eval_shape(jax.vmap(init), spec(num_seeds, dtype=jnp.uint32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGOS)
def test_train_and_act_export_for_a_gpu(name):
    """JAX exports no program that calls back to the host."""
    algo, (args, states) = load_algo(name), specs(name, 3)
    export = functools.partial(jax.export.export, platforms=["cuda"])
    export(algo.train)(args, 10, DATASET, states)
    export(algo.act)(args, states, spec(3, 4, 5), spec(3, 4, 2, dtype=jnp.uint32))


@pytest.mark.parametrize("platform, loops", [("cuda", False), ("cpu", True)])
def test_seeds_are_one_batch_on_a_gpu_and_a_loop_on_a_cpu(platform, loops):
    each = jax.jit(functools.partial(common.for_each_seed, lambda dataset, state: dataset @ state))
    exported = jax.export.export(each, platforms=[platform])(spec(9, 5), spec(3, 5))
    assert ("stablehlo.while" in exported.mlir_module()) == loops


@pytest.mark.slow
def test_iql_computes_q_and_v_of_the_batch_once():
    """They serve their own losses and the weight of AWR; without common.XLA_OPTIONS each is computed twice."""
    args, states = specs("iql", 1, hidden_dims=(64, 64))
    state = jax.tree.map(lambda leaf: spec(*leaf.shape[1:], dtype=leaf.dtype), states)
    update = jax.jit(functools.partial(load_algo("iql").update, args)).lower(DATASET, state, None)
    with_options, without = (update.compile(each).cost_analysis()["flops"] for each in (common.XLA_OPTIONS, {}))
    print(with_options, without, with_options / without)
    assert with_options < 0.9 * without


def test_importing_an_algorithm_opens_no_device():
    """A worker process does, and a GPU has no room for a context per worker."""
    env = os.environ | {"JAX_PLATFORMS": "none"}  # a platform that nobody can open
    code = "import common; common.load_algo('dmfql')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
