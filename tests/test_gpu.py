"""What XLA gets and makes of the programs; also for an NVIDIA GPU, on a machine that has none."""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ALGOS, ROOT, load_algo
from reference import inputs

import common


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGOS)
def test_train_and_act_export_for_a_gpu(name):
    """JAX exports no program that calls back to the host."""
    algo, (args, state, dataset, _) = load_algo(name), inputs(name, seeds=(1, 2, 3))
    states = jax.tree.map(lambda leaf: np.stack(3 * [leaf]), state)
    export = functools.partial(jax.export.export, platforms=["cuda"])
    export(algo.train)(args, 10, dataset, states)
    export(algo.act)(args, states, np.zeros((3, 4, 5), np.float32), np.zeros((3, 4, 2), np.uint32))


@pytest.mark.parametrize("platform, loops", [("cuda", False), ("cpu", True)])
def test_seeds_are_one_batch_on_a_gpu_and_a_loop_on_a_cpu(platform, loops):
    each = jax.jit(functools.partial(common.for_each_seed, lambda dataset, state: dataset @ state))
    exported = jax.export.export(each, platforms=[platform])(np.ones((9, 5)), np.ones((3, 5)))
    assert ("stablehlo.while" in exported.mlir_module()) == loops


@pytest.mark.slow
def test_iql_computes_q_and_v_of_the_batch_once():
    """They serve their own losses and the weight of AWR; without common.XLA_OPTIONS each is computed twice."""
    args, state, batch, _ = inputs("iql", hidden_dims=(64, 64))
    update = jax.jit(functools.partial(load_algo("iql").update, args)).lower(batch, state, None)
    with_options, without = (update.compile(each).cost_analysis()["flops"] for each in (common.XLA_OPTIONS, {}))
    assert with_options < 0.9 * without


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU, and JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("name", ["dmfrebrac", "ifql", "rebrac"])
def test_kernels_side_by_side_give_the_bytes_of_one_after_the_other(name):
    """XLA is not to choose kernels by timing them here: by that, two compilations differ."""
    algo, (args, state, dataset, _) = load_algo(name), inputs(name, seeds=(1, 2))
    states = jax.tree.map(lambda leaf: np.stack(2 * [leaf]), state)
    lowered, results = jax.jit(algo.train.__wrapped__, static_argnums=(0, 1)).lower(args, 250, dataset, states), []
    for mode in ("SERIALIZE", "CONCURRENT", "CONCURRENT"):
        options = {"xla_gpu_command_buffer_scheduling_mode": mode, "xla_gpu_autotune_level": 0}
        results.append(lowered.compile(common.XLA_OPTIONS | options)(dataset, states))
    for each in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], each)


def test_importing_an_algorithm_opens_no_device():
    """A worker process does, and a GPU has no room for a context per worker."""
    env = os.environ | {"JAX_PLATFORMS": "none"}  # a platform that nobody can open
    code = "import common; common.load_algo('dmfql')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
