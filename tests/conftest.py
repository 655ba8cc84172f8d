"""What the tests share: a home folder of their own, a little real data in it, and every algorithm as a module."""

import functools
import os
import pathlib
import signal

if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":  # also where there is a GPU, unless it is asked for
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # much is compiled, little computed

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adroit
import common

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run in the background, which ignores it
ROOT = pathlib.Path(__file__).resolve().parent.parent
TASK = "cube-single-play"
FILES = ("train.csv", "eval.csv", "episodes.csv", "checkpoint.msgpack")  # a run's; the same of a resumed one
EPISODES = 3
load_algo = functools.cache(common.load_algo)
ALGOS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
PAIRS = [(name, f"d{name}") for name in ALGOS if f"d{name}" in ALGOS]


def slow_except(cases, *quick):
    """The cases of a test, all marked slow but the quick ones."""
    marks = lambda case: () if case in quick else pytest.mark.slow
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks(case)) for case in cases]


def small_args(name, **changes):
    """Arguments of an algorithm with small networks and batches and few steps of a flow, the rest as the paper has
    it."""
    small = {"env_name": TASK, "hidden_dims": (24, 16), "batch_size": 32}
    small |= {"flow_steps": 3} if hasattr(load_algo(name).Args, "flow_steps") else {}
    args = load_algo(name).Args(**(small | changes))
    return common.resolve(args, common.load_task(args.env_name), load_algo(name).PAPER_COLUMNS)


def make_states(name, args, dataset):
    """The states of all seeds before the first update, [seeds, ...]."""
    init = functools.partial(load_algo(name).init, args, dataset.obs.shape[-1], dataset.action.shape[-1])
    return jax.jit(jax.vmap(init))(jnp.array(args.seeds, jnp.uint32))


class LocalEnvironments(common.Slots):
    """`common.Environments` in this process."""

    def __init__(self, task, num_seeds, slots_per_seed, num_workers=1):
        self.num_slots = num_seeds * slots_per_seed
        super().__init__(task, range(self.num_slots))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def random_rows(obs_dim, action_dim, largest):
    """Rows of two episodes of 200 steps, of random numbers."""
    rng = np.random.default_rng(0)
    rows = {"observations": rng.normal(size=(400, obs_dim)), "rewards": rng.normal(size=400)}
    return rows | {"actions": rng.uniform(-largest, largest, (400, action_dim))}, np.arange(400) % 200 == 199


def write_hdf5(path, rows):
    with h5py.File(path, "w") as file:
        for key, values in rows.items():
            file[key] = values
    return path


def write_hand(hand, path):
    """Writes such rows as D4RL's files are."""
    env = adroit.make_env(hand)
    rows, ends = random_rows(*env.observation_space.shape, *env.action_space.shape, 1)
    write_hdf5(path, rows | {"terminals": 0 * ends, "timeouts": ends})


def write_pendulum(path):
    """Writes such rows as a user's own file is; the last ones, where no transition starts, have more reward."""
    rows, ends = random_rows(3, 1, 2)
    np.savez(path, **rows | {"rewards": rows["rewards"] + 9 * ends}, terminals=ends, masks=np.ones(400))


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """A home folder for the session, in place of the user's; pytest's workers share it."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "jax"))  # what several tests or scripts compile is kept
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        jax.config.update("jax_compilation_cache_dir", str(home / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        yield home


@pytest.fixture(autouse=True)
def handlers():
    """The signals' handlers of before are put back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data_path(home):
    """A few generated episodes."""
    return pathlib.Path(common.load_dataset(common.load_task(TASK), None, EPISODES)[1]["path"])
