"""What every algorithm shares: the tasks with the paper's values, their data, and evaluation.

Nothing in here knows an algorithm.
"""

import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import typing
import urllib.request
import zipfile

os.environ.setdefault("MUJOCO_GL", "disabled")  # keeps OpenGL out of processes that draw nothing
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a run needs 2 GB of a GPU, so several can share one

import filelock
import gymnasium
import h5py
import jax
import numpy as np
from gymnasium.vector.utils import CloudpickleWrapper
from tqdm import tqdm

import adroit

if len(os.fsencode(tempfile.gettempdir())) > 70:
    tempfile.tempdir = "/tmp"  # multiprocessing puts a socket there, whose path must be short
ROOT = pathlib.Path(__file__).resolve().parent
gymnasium.logger.min_level = gymnasium.logger.ERROR  # it would warn that OGBench's action spaces are cast to float32


class Error(SystemExit, Exception):
    """Something the user can fix. It ends a script with its one sentence and exit code 1, without a traceback; a search
    or a notebook catches it like any Exception."""

    def __init__(self, sentence: str):
        super().__init__("error: " + sentence.removeprefix("error: "))  # one from another process has it already


# ------------------------------------------------------------------------------------------------------------ tasks
# The paper's Table 5 (delta, num_samples and alpha_critic of its IQL-based and Q-learning-based algorithms), and what
# its other columns were run with: FQL's own alpha, q_agg and discount (Park et al., 2025c); ETrigFlow's and MFQL-BPTT's
# alpha, which is FQL's over the authors' IQL delta; AWR's alpha; ReBRAC's. docs/algorithms.md says where each is from.
# fmt: off
COLUMNS = ("iql_delta", "iql_num_samples", "ql_delta", "ql_num_samples", "alpha_critic", "alpha", "q_agg", "discount",
           "alpha_over_delta", "awr_alpha", "rebrac_alpha_actor", "rebrac_alpha_critic")
TABLE = {
    #                                IQL:     n    QL:   n            FQL:                    alpha/  AWR: ReBRAC:
    #                                delta       delta       a_critic alpha  q_agg  discount    delta alpha actor critic
    "antmaze-large-navigate":       (  0.1,   4,   0.03,   4,  0.01,     10, "min",  0.99,     333,  10,  0.003, 0.01),
    "humanoidmaze-medium-navigate": (  0.1,  32,    0.1,  32,  0.01,     30, "mean", 0.995,     300,  10,  0.01,  0.01),
    "humanoidmaze-large-navigate":  ( 0.03,   8,   0.03,  16,  0.001,    30, "mean", 0.995,    1000,  10,  0.01,  0.01),
    "antsoccer-arena-navigate":     (  0.1,  16,    0.1,  16,  0.1,      10, "mean", 0.995,     100,   1,  0.01,  0.01),
    "cube-single-play":             ( 0.03,  32,   0.03,   2,  0.01,    300, "mean", 0.99,   10000,   1,  1,     0),
    "cube-double-play":             (  0.1,  16,   0.03,   4,  0.1,     300, "mean", 0.99,    3000, 0.3,  0.1,   0),
    "scene-play":                   (  0.1,  32,    0.1,   4,  0.01,    300, "mean", 0.99,    3000,  10,  0.1,   0.01),
    "puzzle-3x3-play":              ( 0.03,   4,   0.03,   2,  0.01,   1000, "mean", 0.99,   33333,  10,  0.3,   0.01),
    "puzzle-4x4-play":              ( 0.03,  64,   0.03,   4,  0.01,   1000, "mean", 0.99,   33333,   3,  0.3,   0.01),
    "pen-human-v1":                 (0.001,   8, 0.0003,   4,  0.5,   10000, "min",  0.99,   10**7, 0.5,  0.1,   0.5),
    "pen-cloned-v1":                (0.001,  16, 0.0003,  32,  0.5,   10000, "min",  0.99,   10**7, 0.5,  0.05,  0.5),
    "pen-expert-v1":                (0.001,  64, 0.0003,  32,  0.01,   3000, "min",  0.99, 3000000, 0.5,  0.01,  0.01),
    "door-expert-v1":               (0.003,   2,  0.003,  16,  0.01,  30000, "min",  0.99,   10**7, 0.5,  0.05,  0.01),
    "hammer-expert-v1":             (0.003,   2,  0.003,   4,  0.01,  30000, "min",  0.99,   10**7, 0.5,  0.01,  0.01),
    "relocate-expert-v1":           (0.003,   2, 0.0003,   4,  0.01,  30000, "min",  0.99,   10**7, 0.5,  0.05,  0.01),
}
# fmt: on
PAPER = {task: dict(zip(COLUMNS, row, strict=True)) for task, row in TABLE.items()}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task has data to learn from and an environment that scores what was learned. This class is for a user's own
    gymnasium environment; OGBench's and D4RL's tasks are below.

    Its file is an .npz of rows: observations, actions, rewards, masks (1 - terminal) and terminals (1 in the last row
    of each episode, where no transition starts). With next_observations, each row is a transition.
    """

    name: str  # as --env-name gives it
    env_id: str  # of its environment, in gymnasium or adroit.py
    file: str = ""  # name of the published data
    paper: dict = dataclasses.field(default_factory=dict)  # its row of PAPER
    spec: gymnasium.envs.registration.EnvSpec | None = None  # of the user's own, which workers may not have registered

    num_updates = None  # the paper's number of updates
    unit = "return"  # of a score
    scored_from = 1.0  # a run's score is the mean of its evaluations from this fraction of its updates on
    keys = ("rewards",)  # of the file, besides observations, actions and terminals
    url = ""  # of the folder that has the published file
    folder = ("", "")  # where it is kept: the environment variable that says it, and the default

    def make_env(self, **kwargs) -> gymnasium.Env:
        """The environment whose episodes are the score; actions in [-1, 1]."""
        env = gymnasium.make(self.spec, **kwargs)
        space, (middle, half) = env.action_space, middle_and_half(env.action_space)
        rescale = lambda action: np.clip(middle + half * action, space.low, space.high).astype(space.dtype)
        return gymnasium.wrappers.TransformAction(env, rescale, gymnasium.spaces.Box(-1, 1, space.shape))

    def score(self, episode_return: float, info: dict) -> float:
        """An episode's score, from its return and its last step's info."""
        return episode_return

    def load(self, path: pathlib.Path) -> "Dataset":
        """The transitions of a file as numpy arrays. Raises ValueError, saying what it is, if it is unusable."""
        raw = read_file(path, self, self.make_env().env)
        raw.setdefault("masks", 1 - raw["terminals"])
        dataset = to_transitions(raw)
        if "next_observations" in raw and 2 * len(dataset.obs) <= len(raw["terminals"]):
            raise ValueError("has a next action in less than half of its rows: an episode's must be in "
                             "order, the next_observations of one being the observations of the next")  # fmt: skip
        if raw["rewards"].any() and not dataset.reward.any() or dataset.mask.all() and not raw["masks"].all():
            raise ValueError("has rewards or zero masks (by default 1 - terminals) only in the last rows of "
                             "episodes, where no transition starts without next_observations and mask 0")  # fmt: skip
        return dataset


class OGBench(Task):
    """An OGBench single task, scored by success. OGBench relabels the data with the task's rewards and masks."""

    num_updates, unit, scored_from, keys = 1_000_000, "% success", 0.8, ("qpos",)
    url = "https://rail.eecs.berkeley.edu/datasets/ogbench"
    folder = ("OGBENCH_DATASET_DIR", "~/.ogbench/data")

    def make_env(self, **kwargs) -> gymnasium.Env:
        """OGBench 1.2 judges success at s by default; here it is judged at s', as in the version the paper used."""
        import ogbench  # noqa: F401 (registers its environments)

        return gymnasium.make(self.env_id, success_timing="post", disable_env_checker=True, **kwargs)

    def score(self, episode_return: float, info: dict) -> float:
        return 100.0 * info["success"]

    def load(self, path: pathlib.Path) -> "Dataset":
        from ogbench.relabel_utils import relabel_dataset

        env = self.make_env()
        raw = read_file(path, self, env)
        env.reset()
        relabel_dataset(self.env_id, env, raw)
        return to_transitions(raw)


class D4RL(Task):
    """One of D4RL's Adroit hands, scored by its normalized return."""

    num_updates, unit, scored_from, keys = 500_000, "normalized return", 1.0, ("rewards", "timeouts")
    url = "http://rail.eecs.berkeley.edu/datasets/offline_rl/hand_dapg_v1"
    folder = ("D4RL_DATASET_DIR", "~/.d4rl/datasets")

    def make_env(self, **kwargs) -> gymnasium.Env:
        return adroit.make_env(self.env_id, **kwargs)

    def score(self, episode_return: float, info: dict) -> float:
        return adroit.normalized_score(self.env_id, episode_return)

    def load(self, path: pathlib.Path) -> "Dataset":
        """Those of d4rl's `qlearning_dataset`: none starts in the last row, or where an episode ended in a timeout, for
        the observation after it was not stored. A terminal row's next state is of the next episode, and masked."""
        raw = read_file(path, self, self.make_env())
        raw["timeouts"][-1:] = 1
        rows = {key: raw[key] for key in ("observations", "actions", "rewards")}
        return to_transitions(rows | {"terminals": raw["timeouts"], "masks": 1 - raw["terminals"]})


def check_env(env: gymnasium.Env):
    """Raises ValueError if its spaces, a reset and a step show that evaluation cannot play `env`."""
    space, actions = env.observation_space, env.action_space
    for name, each in (("observations", space), ("actions", actions)):
        if not isinstance(each, gymnasium.spaces.Box) or len(each.shape) != 1:
            raise ValueError(f"its {name} are a {type(each).__name__} of shape {each.shape}, and must be vectors (Box)")
    if not (actions.is_bounded() and (actions.low < actions.high).all() and actions.dtype.kind == "f"):
        raise ValueError("its actions must be real numbers between bounds")
    if env.spec.max_episode_steps is None:
        raise ValueError("its episodes may never end: give max_episode_steps to gymnasium.register")
    first, _ = env.reset(seed=0)
    second, reward, *_ = env.step(((actions.low + actions.high) / 2).astype(actions.dtype))
    for obs in (first, second):
        if np.shape(obs) != space.shape or not np.isfinite(obs).all():
            raise ValueError(f"its observations must be finite and of shape {space.shape}, and one is {obs}")
    if np.shape(reward) or not np.isfinite(np.float64(reward)):
        raise ValueError(f"its rewards must be finite numbers, and one is {reward}")


def load_task(name: str, dataset_path: str | None = None) -> Task:
    """The task called `name`: one of the paper's, an OGBench `*-singletask*-v0` id, an Adroit dataset, or, with a
    `dataset_path`, any gymnasium id. Raises Error if there is none, or if this MuJoCo simulates it differently."""
    if name in adroit.TASKS:
        try:
            adroit.check_mujoco()
        except ValueError as error:
            raise Error(str(error))
        return D4RL(name, adroit.TASKS[name], f"{name}.hdf5", PAPER.get(name, {}))
    try:
        import ogbench  # noqa: F401 (registers its environments)
    except ImportError as error:
        raise Error(f"OGBench cannot be imported ({error}): use Python 3.11 or 3.12, and requirements.txt installs it")
    if name in PAPER:
        return OGBench(name, f"{name.rpartition('-')[0]}-singletask-v0", f"{name}-v0.npz", PAPER[name])
    found = re.fullmatch(
        r"(?!visual|powderworld)([\w-]+)-(navigate|stitch|explore|play|noisy)-singletask(-task\d)?-v0", name
    )
    if found and (env_id := f"{found[1]}-singletask{found[3] or ''}-v0") in gymnasium.registry:
        return OGBench(name, env_id, f"{found[1]}-{found[2]}-v0.npz", PAPER.get(f"{found[1]}-{found[2]}", {}))
    if dataset_path is not None and (name in gymnasium.registry or ":" in name):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # where module:id is looked for, in the workers as well
        try:
            env = gymnasium.make(name)  # imports the module first
            check_env(env)
        except Exception as error:  # of the user's code, too
            raise Error(f"{name} cannot be played ({error}): fix that, or give another --env-name")
        return Task(name, name, spec=gymnasium.registry[env.unwrapped.spec.id])
    near = difflib.get_close_matches(name, PAPER | adroit.TASKS, 3, 0.5) or PAPER
    raise Error(f"there is no task {name!r}: give one like {', '.join(near)}, a single task of OGBench in states like "
                f"scene-play-singletask-task2-v0, or, with --dataset-path, any gymnasium id")  # fmt: skip


def read_record(folder: str | pathlib.Path) -> dict:
    """What a run wrote to args.json in its folder. Raises Error if there is none."""
    try:
        record = json.loads((pathlib.Path(folder) / "args.json").read_text())
        return {key: record[key] for key in ("algo", "args", "data")} | record
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Error(f"{folder} is no run's folder ({error}): give one like runs/<task>/<algo>/<time>")


def read_args(record: dict, Args):
    """The arguments of a record, as an `Args`. Raises Error if the code has other flags."""
    try:
        return Args(**{flag: tuple(v) if isinstance(v, list) else v for flag, v in record["args"].items()})
    except TypeError as error:
        raise Error(f"this run has other flags than the code ({error}): check out its commit, {record['commit']}")


def check_numbers(args):
    """Raises Error if a number in the dataclass `args` is impossible: an integer below 1, another number below 0."""
    for field in dataclasses.fields(args):
        value, whole = getattr(args, field.name), int in (field.type, *typing.get_args(field.type))
        low, high = (1, 10**9) if whole else (0, math.inf)
        if field.name in ("seeds", "eval_seed"):
            low, high = 0, 2**32 - 1
        elif field.name in ("discount", "tau", "expectile", "learning_rate"):
            high = 1
        for number in value if isinstance(value, tuple) else (value,):
            flag = f"--{field.name.replace('_', '-')}"
            if whole and type(number) is float:  # of a notebook
                raise Error(f"{flag} {number} is impossible: it is a whole number, like {number:.0f}")
            if type(number) in (int, float) and not low <= number <= high:  # a NaN is in no range
                raise Error(f"{flag} {number} is impossible: it must be from {low} to {high}")


def resolve(args, task: Task, columns: dict[str, str]):
    """`args` with the paper's values for `task` in place of None: `columns` is {flag: its column of PAPER}.

    Raises Error if the paper has no value for a flag that needs one, or if a value is impossible.
    """
    values = {"num_updates": task.num_updates} | {flag: task.paper.get(column) for flag, column in columns.items()}
    values = {flag: value for flag, value in values.items() if getattr(args, flag) is None}
    if missing := [f"--{flag.replace('_', '-')}" for flag, value in values.items() if value is None]:
        raise Error(f"the paper has no values for {task.name}: give {' '.join(missing)}")
    plain = lambda value: value.item() if isinstance(value, np.generic) else value
    values = vars(args) | values
    for flag, value in values.items():  # lists, ranges and NumPy's numbers, as a hyperparameter search gives them
        values[flag] = tuple(map(plain, value)) if np.ndim(value) else plain(value)
    args = dataclasses.replace(args, **values)
    check_numbers(args)
    if not args.seeds or len(set(args.seeds)) < len(args.seeds) or not args.hidden_dims:
        raise Error("--seeds takes one or more different numbers, and --hidden-dims one or more widths")
    if args.num_updates % 10:
        raise Error(f"--num-updates {args.num_updates} is impossible (each tenth is evaluated): give a multiple of 10")
    if args.dataset_path is not None and args.generate_episodes and args.resume is None:  # else made here, then moved
        raise Error("--dataset-path and --generate-episodes exclude each other: give one of them")
    if args.dataset_path is not None:  # a run is resumed from any folder
        args = dataclasses.replace(args, dataset_path=os.path.abspath(os.path.expanduser(args.dataset_path)))
    return args


def prepare(args, file: str, columns: dict[str, str]):
    """What the algorithm in `file` is to do: its arguments in full (see `resolve`; with --resume, that run's) and its
    Task. Raises Error, before anything is made, if an argument is impossible or a device is not available."""
    if args.resume is not None:
        record, defaults = read_record(args.resume), type(args)()
        if record["algo"] != pathlib.Path(file).stem:
            raise Error(f"{args.resume} is a run of {record['algo']}: resume it by algos/{record['algo']}.py")
        if args != dataclasses.replace(defaults, resume=args.resume, dataset_path=args.dataset_path):
            raise Error(f"--resume takes all other flags from {args.resume}/args.json: leave them out, except "
                        f"--dataset-path if the data have moved")  # fmt: skip
        saved, data = read_args(record, type(args)), record["data"]["path"]
        path = args.dataset_path or (data if os.path.exists(data) else saved.dataset_path)
        args = dataclasses.replace(saved, resume=args.resume, dataset_path=path)
    task = load_task(args.env_name, args.dataset_path)
    args = resolve(args, task, columns)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second where jax has no plugin for it
        platforms = os.environ.get("JAX_PLATFORMS")
        raise Error(f"JAX_PLATFORMS={platforms} is not available here ({str(error) or 'no such device'}): unset it")
    if args.folder is not None and args.resume is None:  # refused, if another run is in it, or a part of one
        folder = pathlib.Path(os.path.expanduser(args.folder))
        if {".json", ".csv", ".msgpack"} & {path.suffix for path in folder.glob("*")}:
            again = shlex.quote(str(folder))
            raise Error(f"{folder} is there already: resume it by --resume {again}, or give another --folder")
        args = dataclasses.replace(args, folder=str(folder))
    if args.capture_video:  # better now than after the run
        rendering_backend()
        if type(task) is Task and "rgb_array" not in task.make_env().metadata.get("render_modes", ()):
            raise Error(f"{task.name} has no render mode rgb_array: add it, or leave --capture-video out")
    if not jax.config.jax_compilation_cache_dir and "HOME" in os.environ:  # keeps what this machine compiles
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(f"~/.cache/doal/{platform.node()}"))
    return args, task


def load_algo(name: str):
    """The module of algos/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "algos" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------------- data
class Dataset(typing.NamedTuple):
    """Transitions, or a batch of them: float32, [transitions, ...]."""

    obs: jax.Array  # [transitions, obs_dim]
    action: jax.Array  # [transitions, action_dim], clipped to +-(1 - 1e-5)
    reward: jax.Array  # [transitions]
    mask: jax.Array  # [transitions], 1 - terminal: 0 where nothing follows
    next_obs: jax.Array  # [transitions, obs_dim]
    next_action: jax.Array  # [transitions, action_dim], that taken at next_obs (any where mask is 0), clipped


def sample_batch(dataset: Dataset, key: jax.Array, batch_size: int) -> Dataset:
    """`batch_size` transitions drawn uniformly with replacement."""
    index = jax.random.randint(key, (batch_size,), 0, len(dataset.obs))
    return jax.tree.map(lambda array: array[index], dataset)


def load_dataset(task: Task, dataset_path: str | None = None, generate_episodes: int | None = None):
    """The Dataset of `task`, as numpy arrays, and its origin: a dict of path, source, sha256 and transitions.

    It is read from `dataset_path` (a file, or a folder with the published one), or generated with `generate_episodes`
    episodes, or downloaded; the last two happen once. Actions are clipped to +-(1 - 1e-5), as in FQL's code. Raises
    Error if the file is not available, damaged or of another task.
    """
    folder = pathlib.Path(os.path.expanduser(os.environ.get(*task.folder)))
    if dataset_path is not None:
        source, path = "given", pathlib.Path(dataset_path)
        path = path / task.file if path.is_dir() else path
    elif generate_episodes:
        if not can_generate(task.file):
            raise Error(f"{task.name} cannot be generated (only the play sets of cube, scene and puzzle can): "
                        f"leave --generate-episodes out, and the published data are downloaded")  # fmt: skip
        stem = task.file.removesuffix(".npz")
        source, path = "generated", folder / f"{stem}-generated{generate_episodes}.npz"
    else:
        source, path = "published", folder / task.file
    if source != "given" and str(folder).startswith("~"):  # there is no HOME
        raise Error(f"there is no home folder for data: name one by {task.folder[0]}, or a file by --dataset-path")
    try:
        if source != "given" and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{path}.lock"):  # if several runs start at once, one makes the file
                if not path.exists() and source == "published":
                    download(f"{task.url}/{task.file}", path)
                elif not path.exists():
                    program = [sys.executable, ROOT / "scripts" / "generate.py", stem, str(generate_episodes), path]
                    if subprocess.run(program).returncode:
                        raise Error(f"{path} was not made: see above or, if nothing is said there, give it more memory")
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        dataset = task.load(path)
    except OSError as error:
        where = "" if source == "given" else f", or data in another folder by {task.folder[0]}"
        raise Error(f"cannot read or write {error.filename or path} ({error.strerror or error}): "
                    f"fix that, or give a file by --dataset-path (also with --resume){where}")  # fmt: skip
    except KeyboardInterrupt:  # before there is a run that could be resumed
        print("stopped; give the same command again", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except ValueError as error:
        made = "move it away, and it is made or downloaded again"
        raise Error(f"{path} {error}: {'name another file by --dataset-path' if source == 'given' else made}")
    clip = lambda action: np.clip(action, -1 + 1e-5, 1 - 1e-5)
    dataset = dataset._replace(action=clip(dataset.action), next_action=clip(dataset.next_action))
    return dataset, {"path": str(path), "source": source, "sha256": sha256, "transitions": len(dataset.obs)}


def can_generate(file: str) -> bool:
    """Whether a published dataset can be generated here. Mazes need trained walkers; "noisy" sets are not supported."""
    return re.fullmatch(r"(cube|scene|puzzle)\b.*-play-v0\.npz", file) is not None


def download(url: str, path: pathlib.Path):
    """Downloads `url` to `path`, which appears whole or not at all. Raises Error if the host cannot be reached."""
    temporary = path.with_name(f"{path.name}.tmp")
    print(f"downloading {url}", flush=True)
    try:
        with tqdm(unit="B", unit_scale=True, desc=path.name) as bar:

            def progress(blocks, block_size, size):
                bar.total = size
                bar.update(blocks * block_size - bar.n)

            urllib.request.urlretrieve(url, temporary, progress)  # raises URLError if it is cut short
        temporary.replace(path)
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        remedy = f"put the file at {path} by hand"
        if path.suffix == ".npz":
            remedy += " (a mirror: https://huggingface.co/datasets/zhouzypaul/ogbench_datasets)"
        if can_generate(path.name):
            remedy += ", or make data here by --generate-episodes 1000"
        raise Error(f"cannot download {url} ({error}): {remedy}")
    finally:
        temporary.unlink(missing_ok=True)


def middle_and_half(space: gymnasium.spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """`middle + half * action` takes [-1, 1] to the bounds of `space`."""
    low, high = space.low.astype(float), space.high.astype(float)
    return (low + high) / 2, (high - low) / 2


def read_file(path: pathlib.Path, task: Task, env: gymnasium.Env) -> dict[str, np.ndarray]:
    """The arrays of a file that `task` learns from (D4RL's are .hdf5, all others .npz), with the actions of `env`
    rescaled to [-1, 1]. Raises ValueError if they are missing or malformed."""
    keys, space = ("observations", "actions", "terminals", *task.keys), env.action_space
    widths = dict.fromkeys(("observations", "next_observations"), env.observation_space.shape)
    widths |= {"actions": space.shape} | dict.fromkeys(("rewards", "masks", "terminals", "timeouts"), ())
    hdf5 = task.file.endswith(".hdf5")
    try:  # some NFS have no locks, and reading needs none
        with h5py.File(path, "r", locking=False) if hdf5 else np.load(path, allow_pickle=False) as file:
            found = {"masks", "next_observations", "button_states"}.intersection(file)
            raw = {key: np.asarray(file[key]) for key in (*keys, *found)}
    except Exception as error:  # a damaged file can make its readers raise anything
        pickle = not hdf5 and not zipfile.is_zipfile(path)  # what NumPy takes it for
        why = "it is no complete .npz file" if pickle else error
        raise ValueError(f"is damaged, or no dataset of {task.name} ({why}; it needs {', '.join(keys)})")
    for key, values in raw.items():
        shape = (raw["terminals"].size, *widths.get(key, values.shape[1:]))
        if values.shape == (*shape, 1):
            raw[key] = values = values[..., 0]
        if values.shape != shape:
            raise ValueError(f"is no dataset of {task.name}: its {key} are {values.shape}, not {shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"is damaged: its {key} hold NaN or infinity")
        if key in ("masks", "terminals", "timeouts") and not np.isin(values, (0, 1)).all():
            raise ValueError(f"is no dataset of {task.name}: its {key} are not all 0 or 1")
    middle, half = middle_and_half(space)
    raw["actions"] = (raw["actions"] - middle) / half
    if not hdf5 and (np.abs(raw["actions"]) > 1.1).any():  # smaller excesses are clipped, and all of D4RL's
        raise ValueError(f"is no dataset of {task.name}: its actions lie far outside the "
                         f"environment's, which are in [{space.low.min()}, {space.high.max()}]")  # fmt: skip
    return raw


def to_transitions(raw: dict[str, np.ndarray]) -> Dataset:
    """The transitions in rows s_0, a_0, r_0; s_1, a_1, r_1; ...; s_T, a_T, r_T of each episode.

    A transition starts in every row i but an episode's last. Its next state and next action are those of row i + 1.
    With next_observations, each row has its next state, and starts a transition unless it lacks a next action that is
    needed: row i + 1 is of another episode, and the mask is 1. Raises ValueError if no transition starts.
    """
    keys = ("observations", "actions", "rewards", "masks")
    obs, action, reward, mask = (raw[key].astype(np.float32) for key in keys)
    starts = raw["terminals"] == 0
    if "next_observations" in raw:
        next_obs = raw["next_observations"].astype(np.float32)
        starts &= np.append((next_obs[:-1] == obs[1:]).all(axis=1), False)
        starts |= mask == 0
    if not starts.any() or starts[-1] and "next_observations" not in raw:
        raise ValueError("is damaged: its last episode does not end, or none has a transition")
    start = np.flatnonzero(starts)
    after = (start + 1) % len(obs)  # the last row has no successor, and needs none
    next_obs = next_obs[start] if "next_observations" in raw else obs[after]
    return Dataset(obs[start], action[start], reward[start], mask[start], next_obs, action[after])


# ------------------------------------------------------------------------------------------------------------ train
# What `train` is compiled with, to save time (docs/speed.md).
XLA_OPTIONS = {
    "xla_cpu_copy_insertion_use_region_analysis": True,  # avoids copies of what a loop carries
    "xla_cpu_prefer_vector_width": 512,
    "xla_disable_hlo_passes": "reshape-mover",  # it changes one of two equal Q(s, a), so that both are computed
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",  # runs critic, value and actor side by side
}


def place(dataset: Dataset, states):
    """Both on JAX's devices: each gets all data, and an equal share of the seeds' states [seeds, ...]."""
    num_seeds = len(jax.tree.leaves(states)[0])
    devices = next(n for n in range(jax.device_count(), 0, -1) if num_seeds % n == 0)
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("seed",))
    split = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return jax.device_put(dataset, split()), jax.device_put(states, split("seed"))


def for_each_seed(function: collections.abc.Callable, dataset: Dataset, states):
    """`function(dataset, state)` for each seed's state: `states` and the result are stacked, [seeds, ...].

    A GPU takes its seeds side by side, as one batch. A CPU, which one seed keeps busy, takes them one after another:
    there a batch of one costs a third of the speed, a batch of eight up to a quarter.
    """
    each = functools.partial(function, dataset)
    return jax.lax.platform_dependent(states, cpu=lambda states: jax.lax.map(each, states), default=jax.vmap(each))


# ------------------------------------------------------------------------------------------------------- evaluation
def usable_cores() -> int:
    """The cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = map(int, pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return max(1, min(cores, quota // period))
    except (OSError, ValueError):  # no cgroup, or no quota
        return cores


def slots_per_seed(num_seeds: int, num_episodes: int, num_workers: int) -> int:
    """How many episodes of a seed are played at a time. Over all seeds these are about two per worker and at least 16,
    in rounds of equal size, so that no worker is idle in the last."""
    rounds = max(1, round(num_episodes * num_seeds / max(16, 2 * num_workers)))
    return math.ceil(num_episodes / rounds)


def reset_env(env: gymnasium.Env, seed: int) -> np.ndarray:
    """Starts an episode that depends on `seed` alone, and returns its first observation [obs_dim]."""
    np.random.seed(seed)  # OGBench's mazes also draw from here
    obs, _ = env.reset(seed=seed)
    if type(env.unwrapped).__module__.startswith("ogbench.manipspace"):  # its solver keeps a random warm start
        env.unwrapped._data.qacc_warmstart[:] = 0
    return obs


def rendering_backend() -> str:
    """The value of MUJOCO_GL with which MuJoCo can draw here without a screen. Raises Error if there is none."""
    draw = [sys.executable, "-c", "import mujoco; mujoco.GLContext(16, 16).make_current()"]
    for backend in ("egl", "osmesa", "cgl"):
        if not subprocess.run(draw, env=os.environ | {"MUJOCO_GL": backend}, capture_output=True).returncode:
            return backend
    raise Error("nothing here can draw for --capture-video: install OSMesa (Debian's libosmesa6), or a GPU's EGL")


class Slots:
    """Environments that are stepped together, in this process."""

    def __init__(self, task: Task, slots: collections.abc.Iterable[int], **kwargs):
        self.task, self.envs = task, {slot: task.make_env(**kwargs) for slot in slots}
        self.returns = dict.fromkeys(self.envs, 0.0)
        self.draws = {slot: np.random.MT19937() for slot in self.envs}  # an np.random of its own for each

    def step(self, commands: dict) -> dict:
        """Resets or steps the slots of `commands`, {slot: seed to reset from, or action to take}. Returns {slot: (obs,
        score)}, where the score is None until the episode ends."""
        answers = {}
        for slot, command in commands.items():
            np.random.set_bit_generator(self.draws[slot])
            if isinstance(command, int):
                obs, score, self.returns[slot] = reset_env(self.envs[slot], command), None, 0.0
            else:
                obs, reward, terminated, truncated, info = self.envs[slot].step(command)
                self.returns[slot] += reward
                score = self.task.score(self.returns[slot], info) if terminated or truncated else None
            answers[slot] = obs, score
        return answers


def follow_parent():
    """Makes a worker process leave signals to its parent, and end when the parent ends, however that happens."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    wait = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=wait, daemon=True).start()


def play(connection, task: CloudpickleWrapper, slots: collections.abc.Iterable[int]):
    """What a worker process does: it holds the environments of `slots`, and steps them on request."""
    follow_parent()
    environments = Slots(task.fn, slots)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has ended
        while True:
            connection.send(environments.step(connection.recv()))


class Environments:
    """Environments to evaluate `num_seeds` policies, in worker processes that live as long as its `with` block."""

    def __init__(self, task: Task, num_seeds: int, num_episodes: int, num_workers: int | None = None):
        num_workers = num_workers or usable_cores()
        self.num_slots = num_seeds * slots_per_seed(num_seeds, num_episodes, num_workers)
        context, num_workers = multiprocessing.get_context("forkserver"), min(num_workers, self.num_slots)
        self.connections, self.workers = [], []
        for i in range(num_workers):
            ours, theirs = context.Pipe()
            slots = range(i, self.num_slots, num_workers)
            each = theirs, CloudpickleWrapper(task), slots  # it pickles a notebook's own class, too
            self.workers.append(context.Process(target=play, args=each, daemon=True))
            self.workers[-1].start()
            theirs.close()  # so that a dead worker reads as the end of its pipe
            self.connections.append(ours)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Ends the workers."""
        for worker, connection in zip(self.workers, self.connections):
            worker.kill()
            worker.join()
            worker.close()
            connection.close()

    def step(self, commands: dict) -> dict:
        """See `Slots.step`. Raises Error if a worker dies."""
        try:
            for i, connection in enumerate(self.connections):
                connection.send({slot: commands[slot] for slot in commands if slot % len(self.connections) == i})
            return {slot: answer for connection in self.connections for slot, answer in connection.recv().items()}
        except (EOFError, ConnectionError):
            raise Error("evaluation failed: an environment's process ended, by the error above or for lack of memory: "
                        "fix that, then resume the run")  # fmt: skip


def episode_seeds(eval_seed: int, seed: int, update: int, num_episodes: int) -> list[int]:
    """A seed for each episode of an evaluation. Its initial state and the policy's noise depend on it alone."""
    entropy = [(eval_seed, seed, update, episode) for episode in range(num_episodes)]
    return [int(np.random.SeedSequence(numbers).generate_state(1)[0]) for numbers in entropy]


@jax.jit
def episode_keys(seed: jax.Array, step: jax.Array) -> jax.Array:
    """One key per slot, made of the episode's seed and step alone: [seeds, slots, 2] of seed, step [seeds, slots]."""
    return jax.vmap(jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.PRNGKey(seed), step)))(seed, step)


def evaluate(
    policy: collections.abc.Callable,
    environments: Environments,
    seeds: collections.abc.Sequence[int],
    update: int,
    num_episodes: int,
    eval_seed: int = 0,
) -> np.ndarray:
    """Scores [seeds, num_episodes] of `num_episodes` episodes with the policy of each of `seeds` at an update.

    `policy(obs, keys)` gives the actions [seeds, slots, action_dim] for obs [seeds, slots, obs_dim] and a key each.
    A slot whose episode has ended plays the seed's next one. The initial state and the noise of a seed's episode i
    depend on (eval_seed, seed, update, i) alone: neither on the algorithm nor on the workers. An episode with an
    action that is not finite scores NaN.
    """
    num_seeds = len(seeds)
    slots = environments.num_slots // num_seeds
    starts = [[*episode_seeds(eval_seed, seed, update, num_episodes), 0] for seed in seeds]  # the last 0: no episode
    scores = np.full((num_seeds, num_episodes), np.nan)
    episode = np.tile(np.minimum(np.arange(slots), num_episodes), (num_seeds, 1))
    step = np.zeros((num_seeds, slots), np.int32)
    waiting = [iter(range(slots, num_episodes)) for _ in seeds]
    commands = {slot: starts[slot // slots][i] for slot, i in enumerate(episode.flat) if i < num_episodes}
    obs = None
    while commands:
        answers = environments.step(commands)
        if obs is None:
            obs = np.zeros((num_seeds, slots, len(answers[0][0])), np.float32)
        for slot, (slot_obs, _) in answers.items():
            obs[divmod(slot, slots)] = slot_obs
        keys = episode_keys(np.take_along_axis(np.array(starts, np.uint32), episode, axis=1), step)
        actions = np.asarray(policy(obs, keys))
        commands = {}
        for slot in sorted(answers):  # of slots that end together, the first takes the next episode
            at, score = divmod(slot, slots), answers[slot][1]  # at: seed, slot of the seed
            if score is None and np.isfinite(actions[at]).all():
                step[at] += 1
                commands[slot] = actions[at]
            else:
                scores[at[0], episode[at]] = np.nan if score is None else score
                episode[at], step[at] = next(waiting[at[0]], num_episodes), 0
                if episode[at] < num_episodes:
                    commands[slot] = starts[at[0]][episode[at]]
    return scores
