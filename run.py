"""The record of a run: its folder, CSVs, checkpoint and resume, signals, progress and Weights & Biases.

Every algorithm's `main` uses `Run` in the same dozen lines. `load_policy` gives the policy of a run's folder.
"""

import collections
import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
import shlex
import signal
import subprocess
import sys
import time

import filelock
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import common
from common import ROOT, Error

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "ogbench", "gymnasium", "gymnasium-robotics", "mujoco")
# Flags that decide no number: where a run is recorded and shown.
ABOUT = {"num_workers", "folder", "resume", "track", "wandb_project_name", "capture_video"}


def identity(algo: str, args) -> dict:
    """All that decides a run's numbers but for its seeds, as JSON has it: runs that share it are of one cell."""
    values = {name: value for name, value in vars(args).items() if name not in ABOUT | {"seeds"}}
    return json.loads(json.dumps({"algo": algo} | values))


def write_file(path: pathlib.Path, content: bytes):
    """Writes a file that appears whole or not at all. Raises Error if there is no room or no right to."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Error(f"cannot write {path} ({error.strerror}): mend that, then resume the run")


def append_rows(path: pathlib.Path, rows: list[dict]):
    """Appends rows to a CSV, the first with a header. Raises Error if there is no room or no right to."""
    try:
        with open(path, "a") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise Error(f"cannot write {path} ({error.strerror}): mend that, then resume the run")


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a CSV that were written whole; none if there is no file. Raises Error if it is damaged."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
    if not all(str(row.get(key)).isdecimal() for row in rows for key in ("step", "seed")):
        raise Error(f"{path} is damaged: restore it, or move its folder away and start anew")
    return rows


def cut_rows(path: pathlib.Path, last_step: int):
    """Cuts off the end of a CSV: what was written after `last_step`, or half."""
    kept = sum(int(row["step"]) <= last_step for row in read_rows(path))
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        os.truncate(path, len("".join(lines[: kept + 1])) if kept else 0)


def read_record(folder: pathlib.Path) -> dict:
    """What a run wrote to args.json in its folder. Raises Error if none did."""
    try:
        return json.loads((folder / "args.json").read_text())
    except (OSError, ValueError) as error:
        raise Error(f"{folder} is no run's folder ({error}): give one like runs/<task>/<algo>/<time>")


def read_args(record: dict, Args):
    """The arguments of a record, an `Args`. Raises Error if the code knows others."""
    try:
        return Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in record["args"].items()})
    except TypeError as error:
        raise Error(f"this run has other flags than the code ({error}): check out its commit, {record['commit']}")


def read_checkpoint(folder: pathlib.Path, states):
    """Updates done, and `states` as a run has saved them; (0, `states`) if it has not.

    Raises Error if the checkpoint is damaged, or of other networks.
    """
    path = folder / "checkpoint.msgpack"
    if not path.exists():
        return 0, states
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise Error(f"{path} is damaged, and its run cannot go on: move {folder} away, and start anew")
    try:
        saved = flax.serialization.msgpack_restore(content[32:])
        restored = flax.serialization.from_state_dict(states, saved["states"])
        if jax.tree.map(jnp.shape, restored) != jax.tree.map(jnp.shape, states):
            raise ValueError("its arrays have other shapes")
        return saved["step"], restored
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise Error(f"{path} holds other networks ({error}): resume it with the code that wrote it")


def git_commit() -> str | None:
    """The commit of this code, with a + if files differ from it; None outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:  # without --exclude, a tag would stand in place of the commit
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def load_run(folder: str):
    """A run's module, arguments, updates done and states [seeds, ...], from its folder. Raises Error if it has no
    checkpoint."""
    folder = pathlib.Path(folder)
    record = read_record(folder)
    module = common.load_algo(record["algo"])
    args = read_args(record, module.Args)
    env = common.load_task(args.env_name, args.dataset_path).make_env()
    init = functools.partial(module.init, args, env.observation_space.shape[0], env.action_space.shape[0])
    step, states = read_checkpoint(folder, jax.eval_shape(jax.vmap(init), jnp.array(args.seeds, jnp.uint32)))
    if step == 0:
        again = f"python algos/{record['algo']}.py --resume {shlex.quote(str(folder))}"
        raise Error(f"{folder} has no checkpoint yet: {again}")
    return module, args, step, jax.tree.map(jnp.asarray, states)


def load_policy(folder: str, index: int = 0):
    """The policy of a run's seed number `index`. It takes obs [obs_dim] and, for its noise, a key, and returns an
    action [action_dim]."""
    module, args, _, states = load_run(folder)
    state = jax.tree.map(lambda leaf: leaf[index : index + 1], states)

    def policy(obs, key=None):
        key = jax.random.PRNGKey(0) if key is None else key
        return np.asarray(module.act(args, state, jnp.asarray(obs, jnp.float32)[None, None], key[None, None])[0, 0])

    return policy


def rendering_backend() -> str:
    """What MUJOCO_GL must be for MuJoCo to draw here without a screen. Raises Error if nothing does."""
    draw = [sys.executable, "-c", "import mujoco; mujoco.GLContext(16, 16).make_current()"]
    for backend in ("egl", "osmesa", "cgl"):
        if not subprocess.run(draw, env=os.environ | {"MUJOCO_GL": backend}, capture_output=True).returncode:
            return backend
    raise Error("nothing here can draw for --capture-video: install OSMesa (Debian's libosmesa6), or a GPU's EGL")


def tell(text: str):
    """Prints a line above the progress bar, at once."""
    tqdm.write(text)
    sys.stdout.flush()


class Run:
    """The record of one run: what was asked, on which data, what came of it, and where it stands.

    Its folder holds args.json; train.csv, a row per seed and chunk of updates; eval.csv, a row per seed and evaluation;
    episodes.csv, a row per seed, evaluation and episode; and checkpoint.msgpack. No CSV holds a clock's time, so those
    of a resumed run equal an uninterrupted one's byte for byte.
    """

    def __init__(self, args, file: str, paper: dict[str, str]):
        """Prepares a run of the algorithm in `file`: by `args`, each None replaced by the paper's value (see
        `common.resolve`), or, with `args.resume`, by that run's. Raises Error, before any training, if anything is
        impossible."""
        self.file, self.algo, self.folder = file, pathlib.Path(file).stem, args.resume and pathlib.Path(args.resume)
        self.stop, self.saved_step = 0, 0  # the signal that asked to stop; updates saved
        self.busy, self.bar = False, None  # whether there is something that is not saved
        record = None
        if args.resume is not None:
            record = read_record(self.folder)
            if record["algo"] != self.algo:
                raise Error(f"{args.resume} is a run of {record['algo']}: resume it by algos/{record['algo']}.py")
            if args != dataclasses.replace(type(args)(), resume=args.resume):
                raise Error(f"--resume takes all other flags from {args.resume}/args.json: give it alone")
            args = read_args(record, type(args))
        self.task = common.load_task(args.env_name, args.dataset_path)
        self.args = args = common.resolve(args, self.task, paper)
        try:
            self.device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        except (RuntimeError, AssertionError) as error:  # the second where jax has no plugin for it
            platforms = os.environ.get("JAX_PLATFORMS")
            raise Error(f"JAX_PLATFORMS={platforms} cannot be had here ({str(error) or 'no such device'}): unset it")
        if args.capture_video:
            rendering_backend()  # better now than after the run
        self.handlers = {}  # what signals did before
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self.handlers[number] = signal.signal(number, self.ask_to_stop)
        dataset, data = common.load_dataset(self.task, args.dataset_path, args.generate_episodes)
        if record and record["data"]["sha256"] != data["sha256"]:
            raise Error(f"{data['path']} is not what {self.folder} was trained on (its sha256 differs): restore it")
        installed = {package.name: package.version for package in importlib.metadata.distributions()}
        now = {"commit": git_commit(), "versions": {name: installed.get(name) for name in PACKAGES}}
        now |= {"device": self.device, "matmul_precision": jax.config.jax_default_matmul_precision}
        if not record:
            self.folder = self.make_folder()
        try:
            self.lock = filelock.FileLock(self.folder / ".lock", timeout=0)
            self.lock.acquire()
        except filelock.Timeout:
            raise Error(f"{self.folder} is being trained by another process: let that one end, or stop it")
        if not record:
            record = {"algo": self.algo, "args": dataclasses.asdict(args), "data": data} | now
            record["wandb"] = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        elif changed := [f"{name} {record[name]}, now {now[name]}" for name in now if record[name] != now[name]]:
            print(f"warning: begun with {'; '.join(changed)}", file=sys.stderr)
            record["resumed"] = [*record.get("resumed", []), now]
        write_file(self.folder / "args.json", json.dumps(record, indent=2).encode())
        self.record = record
        if not jax.config.jax_compilation_cache_dir and "HOME" in os.environ:  # what this machine compiles is kept
            cache = pathlib.Path("~/.cache/doal").expanduser() / platform.node()
            jax.config.update("jax_compilation_cache_dir", str(cache))
        devices = next(n for n in range(jax.device_count(), 0, -1) if len(args.seeds) % n == 0)
        mesh = jax.sharding.Mesh(jax.devices()[:devices], ("seed",))  # these share the seeds out, each has all data
        place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        self.sharding, self.dataset = place("seed"), jax.device_put(dataset, place())
        self.eval_interval = args.num_updates // 10  # updates between two evaluations
        self.chunk = max(size for size in range(1, 251) if self.eval_interval % size == 0)  # in one call of `train`
        workers = args.num_workers or common.usable_cores()
        slots = common.slots_per_seed(len(args.seeds), args.eval_episodes, workers)
        self.envs = common.Environments(self.task, slots * len(args.seeds), workers)
        self.tracker = self.start_tracking() if args.track else None
        self.print_banner()
        calm = 0.1 if sys.stderr.isatty() else 10  # seconds between redraws of the bar: few in a log file
        self.bar = tqdm(total=args.num_updates, desc=self.algo, unit="update", mininterval=calm, smoothing=0.1)

    def make_folder(self) -> pathlib.Path:
        """A folder of this run's own. Raises Error if it cannot be made."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"  # runs may start in the same second
        folder = pathlib.Path(self.args.folder or pathlib.Path("runs", self.args.env_name, self.algo, name))
        if (folder / "args.json").exists():
            again = shlex.quote(str(folder))
            raise Error(f"{folder} is there already: go on by --resume {again}, or give another --folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Error(f"cannot write to {folder.absolute()} ({error.strerror}): start elsewhere")
        return folder

    def print_banner(self):
        """Says what is about to run: task, data, values, device, folder."""
        data, versions = self.record["data"], self.record["versions"]
        values = {name: value for name, value in vars(self.args).items() if name not in ABOUT and value is not None}
        shown = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value
        print(f"{self.algo} on {self.task.name}, scored by {self.task.unit} in {self.task.env_id}")
        print(f"  data    {data['path']}")
        print(f"          {data['source']}, {data['transitions']:,} transitions, sha256 {data['sha256'][:16]}")
        print(f"  values  {', '.join(f'{name} {shown(value)}' for name, value in values.items())}")
        print(f"  device  {self.device}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
        print(f"  folder  {self.folder}", flush=True)

    def restore(self, states):
        """Updates done, updates at the last evaluation, and the states: those of the checkpoint, or 0, 0 and `states`.

        The CSVs are cut back to these. Raises Error if the checkpoint is damaged or of other networks.
        """
        step, states = read_checkpoint(self.folder, states)
        self.saved_step = self.bar.n = self.bar.initial = step
        self.saved_time = time.monotonic()
        scored = collections.Counter(int(row["step"]) for row in read_rows(self.folder / "eval.csv"))
        evaluated = max((at for at in scored if scored[at] == len(self.args.seeds) and at <= step), default=0)
        for name, last_step in (("train", step), ("eval", evaluated), ("episodes", evaluated)):
            cut_rows(self.folder / f"{name}.csv", last_step)
        train = read_rows(self.folder / "train.csv")
        self.diverged = {int(row["seed"]) for row in train if row["diverged"] == "1"}
        self.busy = step < evaluated + self.eval_interval
        return step, evaluated, jax.device_put(states, self.sharding)

    def log(self, step: int, metrics: dict[str, jax.Array]):
        """Records a chunk of updates by its mean metrics, {name: [seeds]}.

        Names each seed whose numbers cease to be finite; raises Error when no seed is left.
        """
        metrics = {name: np.asarray(values) for name, values in metrics.items()}  # waits for the chunk to end
        rows = [{name: float(values[i]) for name, values in metrics.items()} for i in range(len(self.args.seeds))]
        for seed, row in zip(self.args.seeds, rows):
            if seed not in self.diverged and not np.isfinite(list(row.values())).all():
                self.diverged.add(seed)
                tell(f"seed {seed} diverged by update {step:,} ({row}): it scores nan from here on")
        self.write("train", step, rows)
        self.bar.update(self.chunk)
        if len(self.diverged) == len(rows):
            self.close()
            raise Error(f"every seed diverged by update {step:,} (see {self.folder / 'train.csv'}): "
                        f"lower --learning-rate, or the data's rewards")  # fmt: skip

    def log_scores(self, step: int, scores: np.ndarray):
        """Records an evaluation, the scores [seeds, episodes]."""
        scores[[seed in self.diverged for seed in self.args.seeds]] = np.nan
        for i, column in enumerate(scores.T):
            self.write("episodes", step, [{"episode": i, "score": score} for score in column])
        means = scores.mean(axis=1)
        self.busy = True
        self.write("eval", step, [{"score": mean} for mean in means])  # last: it says that the evaluation is whole
        each = ", ".join(f"seed {seed} {mean:.1f}" for seed, mean in zip(self.args.seeds, means))
        tell(f"update {step:,}: {means.mean():.1f} {self.task.unit} ({each}; {scores.shape[1]} episodes each)")

    def write(self, name: str, step: int, rows: list[dict[str, float]]):
        """Appends a row per seed to <name>.csv, marked if it has diverged, and sends their means to W&B."""
        keys = [{"step": step, "seed": seed, "diverged": int(seed in self.diverged)} for seed in self.args.seeds]
        text = [{key: value if key == "episode" else f"{value:.6g}" for key, value in row.items()} for row in rows]
        append_rows(self.folder / f"{name}.csv", [key | row for key, row in zip(keys, text)])
        if self.tracker and name != "episodes":
            means = {f"{name}/{key}": np.mean([row[key] for row in rows]) for key in rows[0]}
            each = {f"{name}/{k}/{s}": v for s, row in zip(self.args.seeds, rows) for k, v in row.items()}
            self.tracker.log({"step": step} | means | (each if len(rows) > 1 else {}))

    def save(self, step: int, states):
        """Writes the checkpoint where one is due: before each evaluation, every ten minutes, and when a signal asked
        to stop, which then ends the program."""
        evaluation = step % self.eval_interval == 0
        if evaluation or self.stop or time.monotonic() - self.saved_time > 600:
            saved = {"step": step, "states": flax.serialization.to_state_dict(jax.device_get(states))}
            content = flax.serialization.msgpack_serialize(saved)
            write_file(self.folder / "checkpoint.msgpack", hashlib.sha256(content).digest() + content)
            self.saved_step, self.saved_time = step, time.monotonic()
        if self.stop:
            self.leave()
        self.busy = not evaluation

    def ask_to_stop(self, number, frame):
        """Handles Ctrl-C, SIGTERM and SIGHUP: a run that is training saves at its chunk's end and leaves; one that
        evaluates, or has not begun, has all saved and leaves at once. The second signal ends the program."""
        self.stop = number
        signal.signal(number, signal.SIG_DFL)
        if self.busy:
            tell("stopping at the end of this chunk of updates")
        else:
            self.leave()

    def leave(self):
        """Ends the program, and says how the run goes on."""
        self.close()
        again = shlex.join(["python", os.path.relpath(self.file), "--resume", str(self.folder)])
        told = "give the same command again" if self.folder is None else f"go on by: {again}"
        tell(f"stopped at update {self.saved_step:,}; {told}")
        sys.exit(128 + self.stop)

    def close(self):
        """Leaves nothing behind in this process, which may be a notebook's."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.bar is not None:
            self.bar.close()
            self.envs.close()
            self.lock.release()

    def finish(self):
        """Prints the score by the paper's protocol: of each seed, the mean of the evaluations at 80, 90 and 100% of the
        run, or the last one on D4RL; over the seeds, mean and standard deviation (ddof 0). Films, if asked to."""
        self.close()
        rows = [row for row in read_rows(self.folder / "eval.csv")
                if int(row["step"]) >= self.task.scored_from * self.args.num_updates]  # fmt: skip
        scores = [np.mean([float(r["score"]) for r in rows if int(r["seed"]) == seed]) for seed in self.args.seeds]
        steps = ", ".join(f"{step:,}" for step in sorted({int(row["step"]) for row in rows}))
        print(f"score: {np.mean(scores):.1f} +- {np.std(scores):.1f} {self.task.unit}")
        print(
            f"  mean +- std over {len(scores)} seed(s), each scored by the mean of its evaluations at {steps} updates"
        )
        if self.diverged:
            print(f"  diverged, and so nan: seed {', '.join(map(str, sorted(self.diverged)))}")
        print(f"  every number is in {self.folder}", flush=True)
        if self.tracker:
            self.tracker.finish()
        if self.args.capture_video:
            film = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), str(self.folder), "--capture-video"]
            if subprocess.run(film).returncode:
                raise Error(f"the run is finished, in {self.folder}, but could not be filmed: see above")

    def start_tracking(self):
        """A run of Weights & Biases, the sweep's if an agent started this. Raises Error if there can be none."""
        import wandb

        try:
            tracker = wandb.init(
                project=self.args.wandb_project_name,
                name=f"{self.algo} {self.task.name} {self.folder.name}",
                id=self.record["wandb"],
                config=self.record,
                dir=self.folder.absolute(),
                resume="allow",
            )
        except Exception as error:
            raise Error(f"no Weights & Biases ({error}): log in, set WANDB_MODE=offline, or leave --track out")
        tracker.define_metric("*", step_metric="step")
        return tracker
