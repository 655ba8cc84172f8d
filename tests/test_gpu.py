"""Every program lowers for an NVIDIA GPU, on a machine that has none, and differently from how it does for a CPU."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ALGOS, ROOT, load_algo, small_args

import common

pytestmark = pytest.mark.slow


def lowered(name, platform):
    """The StableHLO of train and of act, for three seeds."""
    algo, args = load_algo(name), small_args(name, seeds=(1, 2, 3))
    spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    dataset = common.Dataset(spec(99, 5), spec(99, 3), spec(99), spec(99), spec(99, 5), spec(99, 3))
    states = jax.eval_shape(jax.vmap(functools.partial(algo.init, args, 5, 3)), spec(3, dtype=jnp.uint32))
    export = functools.partial(jax.export.export, platforms=[platform])
    train = export(algo.train)(args, 10, dataset, states)
    act = export(algo.act)(args, states, spec(3, 4, 5), spec(3, 4, 2, dtype=jnp.uint32))
    return train.mlir_module(), act.mlir_module()


# Of the choice between CPU and GPU, which is made when lowering, two cases are left that choose nothing: one of two
# constants that are the same, and one of a single branch. So "}, {", which parts branches, is there once.
@pytest.mark.parametrize("name", ALGOS)
def test_train_and_act_lower_for_a_gpu(name):
    """All seeds in one batch, in one loop, with nothing that waits for the host."""
    train, act = lowered(name, "cuda")
    assert not re.search("custom_call|callback|infeed|outfeed", train + act)
    assert train.count("stablehlo.while") == 1 and "stablehlo.while" not in act
    assert train.count("stablehlo.case") == 2 and train.count("}, {") == 1


@pytest.mark.parametrize("name, choices", [("dmfql", 0), ("rebrac", 1)])  # rebrac's: whether its actor learns
def test_train_lowers_for_a_cpu_with_one_seed_after_another(name, choices):
    train, _ = lowered(name, "cpu")
    loops = train.count("stablehlo.while") - train.count("func.func private @threefry2x32")  # a loop each, on a CPU
    assert loops == 2  # over the seeds, and over the updates of each
    assert train.count("stablehlo.case") == 2 + choices and train.count("}, {") == 1 + choices


def test_importing_an_algorithm_opens_no_device():
    """A worker process does, and a GPU has no room for a context per worker."""
    code = "import common; common.load_algo('dmfql'); from jax._src import xla_bridge"
    code += "; assert not xla_bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
