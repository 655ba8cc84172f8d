"""What every algorithm shares: the paper's tasks, their data, how seeds share devices, environments, and evaluation.

Nothing in here knows an algorithm.
"""

import collections
import collections.abc
import concurrent.futures.process
import dataclasses
import difflib
import functools
import hashlib
import http.client
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import typing
import urllib.request

os.environ.setdefault("MUJOCO_GL", "disabled")  # keeps OpenGL out of processes that draw nothing

import filelock
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import adroit
import generate

gymnasium.logger.min_level = gymnasium.logger.ERROR  # it would warn that OGBench's action spaces are cast to float32
# XLA reads these when it first compiles. On a CPU, the first avoids copies of what a loop carries, the second allows
# the widest vectors; without the third, the reshape mover changes one of two equal Q(s, a), so that both are computed.
# A flag that the user sets is left to them. README's Speed says what they save.
XLA_FLAGS = (
    "--xla_cpu_copy_insertion_use_region_analysis=true",
    "--xla_cpu_prefer_vector_width=512",
    "--xla_disable_hlo_passes=reshape-mover",
)
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in XLA_FLAGS if flag.split("=")[0] not in given), given])


class Error(SystemExit):
    """Something the user can fix: ends the program with its one sentence and exit code 1, without a traceback."""

    def __init__(self, sentence: str):
        super().__init__(f"error: {sentence}")


# ------------------------------------------------------------------------------------------------------------ tasks
# The paper's Table 5 (delta, num_samples, alpha_critic) and what it takes from others: alpha, q_agg and discount from
# FQL (Park et al., 2025c); ReBRAC's coefficients on Adroit from CORL; and, not all checked against their source again,
# those on OGBench and the temperature of AWR from FQL.
TABLE = """
                              iql:      ql:                          all:                  awr:   rebrac:
                              delta  n  delta   n  alpha_critic  alpha q_agg discount   alpha   actor, critic  bptt:
antmaze-large-navigate        0.1    4  0.03    4  0.01             10   min    0.99       10   0.003   0.01       100
humanoidmaze-medium-navigate  0.1   32  0.1    32  0.01             30  mean   0.995       10   0.01    0.01       300
humanoidmaze-large-navigate   0.03   8  0.03   16  0.001            30  mean   0.995       10   0.01    0.01      1000
antsoccer-arena-navigate      0.1   16  0.1    16  0.1              10  mean   0.995        1   0.01    0.01       100
cube-single-play              0.03  32  0.03    2  0.01            300  mean    0.99        1   1       0     10000
cube-double-play              0.1   16  0.03    4  0.1             300  mean    0.99      0.3   0.1     0      3000
scene-play                    0.1   32  0.1     4  0.01            300  mean    0.99       10   0.1     0.01      3000
puzzle-3x3-play               0.03   4  0.03    2  0.01           1000  mean    0.99       10   0.3     0.01     33333
puzzle-4x4-play               0.03  64  0.03    4  0.01           1000  mean    0.99        3   0.3     0.01     33333
pen-human-v1                  0.001  8  0.0003  4  0.5           10000   min    0.99      0.5   0.1     0.5     10000
pen-cloned-v1                 0.001 16  0.0003 32  0.5           10000   min    0.99      0.5   0.05    0.5     10000
pen-expert-v1                 0.001 64  0.0003 32  0.01           3000   min    0.99      0.5   0.01    0.01      3000
door-expert-v1                0.003  2  0.003  16  0.01          30000   min    0.99      0.5   0.05    0.01     30000
hammer-expert-v1              0.003  2  0.003   4  0.01          30000   min    0.99      0.5   0.01    0.01     30000
relocate-expert-v1            0.003  2  0.0003  4  0.01          30000   min    0.99      0.5   0.05    0.01     30000
"""
COLUMNS = [
    *("iql.delta", "iql.num_samples", "ql.delta", "ql.num_samples", "ql.alpha_critic", "alpha", "q_agg", "discount"),
    *("awr.alpha", "rebrac.alpha_actor", "rebrac.alpha_critic", "bptt.alpha"),
]
PAPER = {  # {task: {column: value}}
    name: dict(zip(COLUMNS, (value if value in ("min", "mean") else json.loads(value) for value in values)))
    for name, *values in (line.split() for line in TABLE.strip("\n").splitlines()[2:])
}
# The kinds of datasets of OGBench, by a part of the environment's name.
KINDS = {"maze": ("navigate", "stitch", "explore"), "soccer": ("navigate", "stitch"), "": ("play", "noisy")}
RANGES = {  # of the numbers that a flag takes
    **dict.fromkeys(("batch_size", "num_updates", "run_updates", "num_transitions", "policy_frequency"), (1, 10**8)),
    **dict.fromkeys(("eval_episodes", "num_workers", "generate_episodes", "num_samples", "num_seeds"), (1, 10**6)),
    **dict.fromkeys(("turns", "fql_eval_episodes", "jobs", "gpus", "cpus"), (1, 10**5)),
    "hours": (1 / 60, 10**5),
    **dict.fromkeys(("num_target_samples", "flow_steps"), (1, 1000)),  # each makes the program longer, or much wider
    **dict.fromkeys(("alpha", "alpha_actor", "alpha_critic", "delta", "policy_noise", "noise_clip"), (0, 1e9)),
    **dict.fromkeys(("discount", "tau", "expectile", "learning_rate"), (0, 1)),
    "eval_seed": (0, 2**32 - 1),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A dataset, and the environment that scores what was learned from it."""

    name: str  # as the paper prints it ("scene-play", "pen-human-v1"), or OGBench's id
    env_id: str  # "scene-singletask-v0", or the Adroit hand: "pen"
    dataset: str  # "scene-play-v0"
    num_updates: int = 1_000_000  # the paper's number of gradient steps

    @property
    def adroit(self) -> bool:
        """Whether it is one of D4RL's: scored by the normalized return after the last update, not by success in %."""
        return self.env_id in adroit.HANDS


def load_task(name: str) -> Task:
    """The task called `name`: one of the paper's, another Adroit dataset, or any OGBench `*-singletask*-v0` id.

    Raises Error if there is none, or if the installed MuJoCo simulates it differently.
    """
    if name in adroit.TASKS:
        try:
            if warning := adroit.check_mujoco_version():
                print(f"warning: {warning}", file=sys.stderr)
        except ValueError as error:
            raise Error(str(error))
        return Task(name, adroit.TASKS[name], name, 500_000)
    try:
        import ogbench  # noqa: F401 (registers its environments)
    except ImportError as error:
        raise Error(f"OGBench cannot be imported ({error}): use Python 3.11 or 3.12, and requirements.txt installs it")
    if name in PAPER:
        return Task(name, f"{name.rpartition('-')[0]}-singletask-v0", f"{name}-v0")
    if "visual" in name or "powderworld" in name:
        raise Error(f"{name} is seen in pixels, and these networks take states: choose a task without 'visual'")
    found = re.fullmatch(r"([\w-]+)-(\w+)-singletask(-task\d)?-v0", name)
    if found and found[2] in next(kinds for part, kinds in KINDS.items() if part in found[1]):
        env_id = f"{found[1]}-singletask{found[3] or ''}-v0"
        if env_id in gymnasium.registry:
            return Task(name, env_id, f"{found[1]}-{found[2]}-v0")
    ids = [f"{task}-singletask{i}-v0" for task in PAPER if task not in adroit.TASKS for i in ("", "-task1", "-task2")]
    near = difflib.get_close_matches(name, dict.fromkeys([*PAPER, *adroit.TASKS, *ids]), 3, 0.5)
    raise Error(f"there is no task {name!r}: try {', '.join(near or PAPER)}")


def check_ranges(args):
    """Raises Error if a flag's number, or one of its numbers, lies outside of RANGES."""
    for flag, (low, high) in RANGES.items():
        value = getattr(args, flag, None)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if wrong := [value for value in values if not low <= value <= high]:  # a NaN is in no range
            raise Error(f"--{flag.replace('_', '-')} {wrong[0]} is impossible: it lies in [{low}, {high}]")


def resolve(args, task: Task, columns: tuple[str, ...]):
    """`args` with each None that the paper has a value for replaced by it: of flag x, the first of PAPER's `<column>.x`
    and `x`.

    Raises Error if the paper has no value for a flag that needs one, or if a value is impossible.
    """
    row = PAPER.get(task.dataset.removesuffix("-v0"), dict.fromkeys(COLUMNS))  # all tasks of a dataset share it
    paper = {"num_updates": task.num_updates} | row
    for column in reversed(columns):  # so that the first has the last word
        paper |= {name.removeprefix(f"{column}."): row[name] for name in row if name.startswith(f"{column}.")}
    values = {flag: paper[flag] for flag, value in vars(args).items() if value is None and flag in paper}
    if missing := [f"--{flag.replace('_', '-')}" for flag, value in values.items() if value is None]:
        raise Error(f"the paper has no values for {task.name}: give {' '.join(missing)}")
    args = dataclasses.replace(args, **values)
    check_ranges(args)
    if not args.hidden_dims or not 1 <= min(args.hidden_dims) <= max(args.hidden_dims) <= 2**16:
        raise Error(f"--hidden-dims {args.hidden_dims} is impossible: give each hidden layer a width in [1, 2^16]")
    if not args.seeds or len(set(args.seeds)) < len(args.seeds) or not 0 <= min(args.seeds) <= max(args.seeds) < 2**32:
        raise Error(f"--seeds {args.seeds} is impossible: give one or more different numbers in [0, 2^32)")
    if args.num_updates % 10:
        raise Error(
            f"--num-updates {args.num_updates} is impossible: each tenth is evaluated, so give a multiple of 10"
        )
    if args.dataset_path is not None and args.generate_episodes:
        raise Error("--dataset-path and --generate-episodes exclude each other: give one of them")
    if args.dataset_path is not None:  # a run is resumed from any folder
        args = dataclasses.replace(args, dataset_path=os.path.abspath(os.path.expanduser(args.dataset_path)))
    return args


def first_scored(task_name: str, num_updates: int) -> int:
    """The first update whose evaluation counts for the score: on D4RL the last, on OGBench that at 80 % of the run."""
    return num_updates if task_name in adroit.TASKS else num_updates * 8 // 10


# ------------------------------------------------------------------------------------------------------------- data
class Dataset(typing.NamedTuple):
    """Transitions, or a batch of them: float32, [transitions, ...]."""

    obs: jax.Array  # [transitions, obs_dim]
    action: jax.Array  # [transitions, action_dim], clipped to +-(1 - 1e-5)
    reward: jax.Array  # [transitions]
    mask: jax.Array  # [transitions], 1 - terminal: 0 where nothing follows
    next_obs: jax.Array  # [transitions, obs_dim]
    next_action: jax.Array  # [transitions, action_dim], the action taken at next_obs in the same episode, clipped


def sample_batch(dataset: Dataset, key: jax.Array, batch_size: int) -> Dataset:
    """`batch_size` transitions drawn uniformly with replacement."""
    index = jax.random.randint(key, (batch_size,), 0, len(dataset.obs))
    return jax.tree.map(lambda array: array[index], dataset)


def load_dataset(task: Task, dataset_path: str | None = None, generate_episodes: int | None = None):
    """The Dataset of `task`, on the default device, and where it is from: a dict of path, source, sha256 and
    transitions.

    It is read from `dataset_path`; or made of `generate_episodes` episodes, generated once and kept; or the published
    one, downloaded once and kept. The first load leaves the file's sha256 beside it, in <file>.sha256, and later ones
    compare: HDF5 has no checksums of its own. Raises Error if it cannot be had, is damaged or is another task's.
    """
    folder = pathlib.Path("~/.d4rl/datasets" if task.adroit else "~/.ogbench/data").expanduser()
    if dataset_path is not None:
        source, path, make = "given", pathlib.Path(dataset_path), None
    elif generate_episodes:
        if not generate.can_generate(task.dataset):
            raise Error(f"{task.dataset} cannot be generated (only the play sets of cube, scene and puzzle can): "
                        f"leave --generate-episodes out, and the published data are downloaded")  # fmt: skip
        source, path = "generated", folder / f"{task.dataset}-generated{generate_episodes}.npz"
        make = lambda: generate.generate(task.dataset, generate_episodes, path)
    else:
        base = adroit.DATASET_URL if task.adroit else importlib.import_module("ogbench.utils").DATASET_URL
        source, path = "published", folder / (task.dataset + (".hdf5" if task.adroit else ".npz"))
        make = lambda: download(f"{base}/{path.name}", path)
    record, lock = pathlib.Path(f"{path}.sha256"), pathlib.Path(f"{path}.lock")
    if make and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(lock):  # of several first runs, one makes the file and the others wait
                if not path.exists():
                    record.unlink(missing_ok=True)  # of a file that was deleted
                    make()
            lock.unlink(missing_ok=True)  # whoever still waits for it finds the file made
        except OSError as error:
            raise Error(f"cannot write {path} ({error.strerror or error}): "
                        f"make room there, or give a file by --dataset-path")  # fmt: skip
        except concurrent.futures.process.BrokenProcessPool:
            raise Error(f"cannot generate {path}: a process died, perhaps of too little memory: start again")
    if not os.path.isfile(path):
        raise Error(f"there is no dataset at {path}: put it there, or name another file by --dataset-path")
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        recorded = record.read_bytes() if record.exists() else b""
    except OSError as error:
        raise Error(f"cannot read {error.filename} ({error.strerror}): fix that, or name another file")
    if not recorded.endswith(b"\n"):  # none, or cut short
        recorded = b""
    if recorded and recorded[:64] != sha256.encode():
        raise Error(f"{path} is damaged: its sha256 is not the one of its first load, in {record.name}: "
                    f"restore the file, or, if you changed it, delete {record}")  # fmt: skip
    try:
        dataset = load_adroit(task, path) if task.adroit else load_ogbench(task, path)
    except ValueError as error:
        remedy = "delete it, and it is made or downloaded anew" if make else "name another file by --dataset-path"
        raise Error(f"{error}: {remedy}")
    if not recorded:
        try:
            record.write_bytes(os.fsencode(f"{sha256}  {path.name}\n"))  # what `sha256sum --check` reads
        except OSError as error:
            print(f"warning: later damage to {path} may go unnoticed: cannot write {record.name} ({error.strerror})",
                  file=sys.stderr)  # fmt: skip
    about = {"path": str(path), "source": source, "sha256": sha256, "transitions": len(dataset.obs)}
    return jax.tree.map(jnp.asarray, dataset), about


def download(url: str, path: pathlib.Path):
    """Downloads `url` to `path`, which appears whole or not at all. Raises Error if the host cannot be reached."""
    temporary = path.with_name(f"{path.name}.tmp")
    print(f"downloading {url}", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(file, "write", total=size or None, desc=path.name) as out:
                shutil.copyfileobj(response, out, 1 << 20)
        if size and temporary.stat().st_size != size:
            raise http.client.IncompleteRead(b"", size - temporary.stat().st_size)
        temporary.replace(path)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        remedy = f"put the file at {path} by hand"
        if path.suffix == ".npz":
            remedy += " (a mirror: https://huggingface.co/datasets/zhouzypaul/ogbench_datasets)"
        if generate.can_generate(path.stem):
            remedy += ", or make data here by --generate-episodes 1000"
        raise Error(f"cannot download {url} ({error}): {remedy}")
    finally:
        temporary.unlink(missing_ok=True)


def load_ogbench(task: Task, path: pathlib.Path) -> Dataset:
    """The transitions of an OGBench file, relabelled by OGBench with the task's rewards and masks: numpy arrays.

    The file holds, row by row, s_0, a_0, s_1, a_1, ..., s_T, a_T of each episode; the transition of row i ends in the
    state and the action of row i + 1, and the last row of an episode starts none. Raises ValueError, naming the file,
    if it is not whole.
    """
    from ogbench.relabel_utils import relabel_dataset

    env = make_env(task)
    env.reset()
    expected = {"observations": env.observation_space.shape[0], "actions": env.action_space.shape[0], "terminals": None}
    expected |= {"qpos": env.unwrapped.data.qpos.size}
    if hasattr(env.unwrapped, "_cur_button_states"):
        expected |= {"button_states": env.unwrapped._cur_button_states.size}
    try:
        with np.load(path, allow_pickle=False) as file:
            size = sum(member.file_size for member in file.zip.infolist())  # what zipfile reads at most
            if size > 100 * path.stat().st_size:  # generated ones unpack to 1.5 times theirs
                raise ValueError(f"it would unpack to {size / 1e9:,.1f} GB")
            raw = {key: file[key] for key in expected}
    except Exception as error:  # a damaged file can make its readers raise anything
        raise ValueError(f"{path} is damaged, or no dataset of {task.name} ({error})")
    steps = raw["terminals"].size
    for key, width in expected.items():
        shape = (steps,) if width is None else (steps, width)
        if raw[key].shape != shape or raw[key].dtype.kind not in "fbiu":
            raise ValueError(f"{path} is no dataset of {task.name}: its {key} are {raw[key].dtype}"
                             f"{list(raw[key].shape)}, not numbers of shape {list(shape)}")  # fmt: skip
        with np.errstate(over="ignore"):
            finite = np.isfinite(raw[key].astype(np.float32, copy=False)).all()
        if not finite:
            raise ValueError(f"{path} is damaged: its {key} hold NaN or infinity")
    if not steps or not raw["terminals"][-1] or raw["terminals"].all():
        raise ValueError(f"{path} is damaged: its last episode does not end, or none has a transition")
    relabel_dataset(task.env_id, env, raw)
    start = np.flatnonzero(raw["terminals"] == 0)
    obs, action = raw["observations"].astype(np.float32), clip_action(raw["actions"])
    reward, mask = raw["rewards"], raw["masks"]
    return Dataset(obs[start], action[start], reward[start], mask[start], obs[start + 1], action[start + 1])


def load_adroit(task: Task, path: pathlib.Path) -> Dataset:
    """The transitions of one of D4RL's files: numpy arrays. Raises ValueError, naming the file, if it is not whole."""
    data = adroit.load_transitions(path, task.env_id)
    return Dataset(**data | {key: clip_action(data[key]) for key in ("action", "next_action")})


def clip_action(action: np.ndarray) -> np.ndarray:
    """Actions as float32 within +-(1 - 1e-5), as FQL clips them."""
    return np.clip(action.astype(np.float32), -1 + 1e-5, 1 - 1e-5)


# ------------------------------------------------------------------------------------------------------------ seeds
def seed_mesh(num_seeds: int) -> jax.sharding.Mesh:
    """The devices that share out so many seeds evenly: as many as can."""
    devices = next(n for n in range(jax.device_count(), 0, -1) if num_seeds % n == 0)
    return jax.sharding.Mesh(jax.devices()[:devices], ("seed",))


def shardings(num_seeds: int) -> tuple[jax.sharding.NamedSharding, jax.sharding.NamedSharding]:
    """How arrays lie on the devices of `seed_mesh`: each has the states of some seeds, and all of the dataset."""
    mesh, axes = seed_mesh(num_seeds), jax.sharding.PartitionSpec
    everywhere = jax.sharding.NamedSharding(mesh, axes())
    return jax.sharding.NamedSharding(mesh, axes("seed")) if mesh.size > 1 else everywhere, everywhere


def for_each_seed(function: collections.abc.Callable, dataset: Dataset, states):
    """`function(dataset, state)` for each seed's state: `states` and the result are stacked along their first axis,
    [seeds, ...], which is sharded over the devices of `seed_mesh`.

    A GPU takes its seeds side by side, as one batch. A CPU, which one seed keeps busy, takes them one after another:
    there a batch of one costs a third of the speed, and a batch of eight up to a quarter.
    """

    def on_one_device(dataset, states):
        each = functools.partial(function, dataset)
        return jax.lax.map(each, states) if jax.default_backend() == "cpu" else jax.vmap(each)(states)

    mesh, axes = seed_mesh(len(jax.tree.leaves(states)[0])), jax.sharding.PartitionSpec
    specs = {"in_specs": (axes(), axes("seed")), "out_specs": axes("seed")}
    return jax.shard_map(on_one_device, mesh=mesh, **specs, check_vma=False)(dataset, states)


# ------------------------------------------------------------------------------------------------------- evaluation
def make_env(task: Task, **kwargs) -> gymnasium.Env:
    """The environment whose episodes are the task's score.

    OGBench 1.2 judges success at s; the paper's version judged s', so that is asked for.
    """
    if task.adroit:
        return adroit.make_env(task.env_id, **kwargs)
    import ogbench  # noqa: F401 (registers its environments)

    return gymnasium.make(task.env_id, success_timing="post", disable_env_checker=True, **kwargs)


def rendering_backend() -> str:
    """What MUJOCO_GL must be for MuJoCo to draw here without a screen: "egl", "osmesa", or as the user has set it.

    Raises Error if nothing does.
    """
    draw = "import mujoco; mujoco.GLContext(16, 16).make_current()"
    chosen = os.environ["MUJOCO_GL"]
    for backend in ("egl", "osmesa") if chosen == "disabled" else (chosen,):
        command, environment = [sys.executable, "-c", draw], os.environ | {"MUJOCO_GL": backend}
        if not subprocess.run(command, env=environment, capture_output=True).returncode:
            return backend
    raise Error(f"nothing here can draw for --capture-video{f' by MUJOCO_GL={chosen}' * (chosen != 'disabled')}: "
                f"install OSMesa (Debian's libosmesa6), or a GPU driver with EGL")  # fmt: skip


def reset_env(env: gymnasium.Env, seed: int) -> np.ndarray:
    """Starts an episode that depends on `seed` alone, and returns its first observation [obs_dim]."""
    np.random.seed(seed)  # OGBench's mazes also draw from here
    obs, _ = env.reset(seed=seed)
    if hasattr(env.unwrapped, "_data"):  # its manipulation tasks settle by random actions, which the solver remembers
        env.unwrapped._data.qacc_warmstart[:] = 0
    return obs


def episode_score(task: Task, episode_return: float, info: dict) -> float:
    """The score of an episode by its return and its last step's info: D4RL's normalized return, or success in %."""
    return adroit.normalized_score(task.env_id, episode_return) if task.adroit else 100.0 * info["success"]


class Slots:
    """Environments that are stepped together, in this process."""

    def __init__(self, task: Task, slots: list[int], **kwargs):
        self.task, self.envs = task, {slot: make_env(task, **kwargs) for slot in slots}
        self.returns = dict.fromkeys(slots, 0.0)
        self.draws = {slot: np.random.MT19937() for slot in slots}  # each its own np.random, whoever its neighbours are

    def step(self, commands: dict) -> dict:
        """Obeys {slot: command}, a command the seed to reset from or the action to take: {slot: (obs, score)}, score
        being None while the episode lasts."""
        answers = {}
        for slot, command in commands.items():
            np.random.set_bit_generator(self.draws[slot])
            if isinstance(command, int):
                obs, score, self.returns[slot] = reset_env(self.envs[slot], command), None, 0.0
            else:
                obs, reward, terminated, truncated, info = self.envs[slot].step(command)
                self.returns[slot] += reward
                if not (np.isfinite(obs).all() and np.isfinite(reward)):
                    raise FloatingPointError("an observation or reward that is not finite")
                score = episode_score(self.task, self.returns[slot], info) if terminated or truncated else None
            answers[slot] = obs, score
        return answers


def play(connection, task: Task, slots: list[int]):
    """A worker process: holds the environments of `slots` and obeys, message by message (see `Slots.step`), until its
    parent is gone. It answers slot by slot; where one fails, its exception is sent in its place."""
    generate.follow_parent()
    try:
        environments = Slots(task, slots)
        while True:
            for slot, command in connection.recv().items():
                connection.send(environments.step({slot: command}))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass
    except Exception as error:
        connection.send(error)


class SlotFailure(Exception):
    """What happened to the environment of a slot, which cannot go on: (slot, reason)."""


class Environments:
    """`num_slots` environments in `num_workers` processes that live until `close`."""

    def __init__(self, task: Task, num_slots: int, num_workers: int):
        context = multiprocessing.get_context("forkserver")
        self.num_slots, self.workers, self.connections = num_slots, [], []
        for index in range(min(num_workers, num_slots)):
            connection, theirs = context.Pipe()
            slots = list(range(index, num_slots, min(num_workers, num_slots)))
            self.workers.append(context.Process(target=play, args=(theirs, task, slots), daemon=True))
            self.workers[-1].start()
            self.connections.append(connection)
            theirs.close()  # so that a dead worker reads as the end of its pipe

    def step(self, commands: dict, patience: float = 300) -> dict:
        """Sends each slot its command and returns each one's (obs, score); see `Slots.step`.

        Raises SlotFailure if a worker fails, dies, or does not answer within `patience` seconds: the first answer takes
        as long as making all environments, on a busy machine a minute or two. Time in which all was suspended, as on a
        laptop that was shut, does not count, since it ends one of many short waits.
        """
        shares, answers = collections.defaultdict(dict), {}
        for slot, command in commands.items():
            shares[self.connections[slot % len(self.connections)]][slot] = command
        try:
            for connection, share in shares.items():
                slot = min(share)
                connection.send(share)
            for connection, share in shares.items():
                for slot in share:
                    if not any(connection.poll(patience / 300) for _ in range(300)):
                        raise TimeoutError(f"no answer in {patience:g} s")
                    answer = connection.recv()
                    if isinstance(answer, Exception):
                        raise answer
                    answers[slot] = answer[slot]
        except Exception as error:
            self.close()
            raise SlotFailure(slot, f"{type(error).__name__}: {error}")
        return answers

    def close(self):
        """Ends the workers."""
        for worker in self.workers:
            worker.kill()
            worker.join()


def episode_seeds(eval_seed: int, seed: int, update: int, num_episodes: int) -> list[int]:
    """What each episode of an evaluation depends on, besides the policy: its first state and the policy's noise."""
    entropy = [(eval_seed, seed, update, episode) for episode in range(num_episodes)]
    return [int(np.random.SeedSequence(numbers).generate_state(1)[0]) for numbers in entropy]


@jax.jit
def episode_keys(seed: jax.Array, step: jax.Array) -> jax.Array:
    """One key per slot, made of the episode's seed and step alone: [seeds, slots, 2] of seed, step [seeds, slots]."""
    return jax.vmap(jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.PRNGKey(seed), step)))(seed, step)


def slots_per_seed(num_seeds: int, num_episodes: int) -> int:
    """How many episodes of a seed are played at a time: about 16 over all seeds, and their last round a full one."""
    rounds = max(1, round(num_episodes * num_seeds / 16))
    return math.ceil(num_episodes / rounds)


def evaluate(
    act: collections.abc.Callable,
    environments: Environments,
    seeds: collections.abc.Sequence[int],
    update: int,
    num_episodes: int,
    eval_seed: int = 0,
) -> np.ndarray:
    """Plays `num_episodes` episodes with the policy of each of `seeds` after so many updates: [seeds, num_episodes].

    `act(obs, keys)` gives the actions [seeds, slots, action_dim] of obs [seeds, slots, obs_dim] and a key each.
    A slot whose episode has ended plays the seed's next one. Episode i of a seed starts from a state, and draws noise,
    that depend on (eval_seed, seed, update, i) alone: neither on the algorithm nor on the workers. A policy whose
    action is not finite scores NaN. Raises Error, naming the episode, if it cannot be played.
    """
    num_seeds = len(seeds)
    slots = environments.num_slots // num_seeds
    starts = [[*episode_seeds(eval_seed, seed, update, num_episodes), 0] for seed in seeds]  # and of no episode
    scores = np.full((num_seeds, num_episodes), np.nan)
    episode, step = np.tile(np.arange(slots), (num_seeds, 1)), np.zeros((num_seeds, slots), np.int32)
    waiting = [iter(range(slots, num_episodes)) for _ in seeds]
    commands = {slot: starts[slot // slots][i] for slot, i in enumerate(episode.flat) if i < num_episodes}
    obs = None
    while commands:
        try:
            answers = environments.step(commands)
        except SlotFailure as error:
            slot, reason = error.args
            seed, i = seeds[slot // slots], episode.flat[slot]
            raise Error(f"evaluation failed in episode {i} of seed {seed} ({reason}): fix that, then resume the run")
        if obs is None:
            obs = np.zeros((num_seeds, slots, len(answers[0][0])), np.float32)
        for slot, (slot_obs, _) in answers.items():
            obs[divmod(slot, slots)] = slot_obs
        keys = episode_keys(np.take_along_axis(np.array(starts, np.uint32), episode, axis=1), step)
        actions = np.asarray(act(obs, keys))
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
