"""The record of a run: its folder, CSVs, checkpoint, signals, progress and Weights & Biases.

Every algorithm's `main` uses `Run` in the same dozen lines.
"""

import collections
import collections.abc
import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time

import filelock
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from common import (
    Environments,
    Error,
    evaluate,
    first_scored,
    load_dataset,
    load_task,
    rendering_backend,
    resolve,
    shardings,
    slots_per_seed,
)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "ogbench", "gymnasium", "gymnasium-robotics", "mujoco")
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # ask a run to stop
CHECKPOINT_VERSION = 1  # rises when what a checkpoint holds changes
BYSTANDERS = {"num_workers", "resume", "track", "wandb_project_name", "capture_video"}  # flags that change no number
ELSEWHERE = BYSTANDERS | {"env_name", "dataset_path", "generate_episodes"}  # or are recorded as task and data
TRACKING_PATIENCE = 60  # seconds for Weights & Biases to take the rest when a run ends


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
        raise Error(f"cannot write {path} ({error.strerror}): fix that, then resume the run")


def to_csv(rows: list[dict], header: bool) -> str:
    """The text of rows with the same columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def append_rows(path: pathlib.Path, rows: list[dict]):
    """Appends rows to a CSV in one write, the first ones with a header. Raises Error if there is no room or no right
    to."""
    try:
        with open(path, "a") as file:
            file.write(to_csv(rows, header=file.tell() == 0))
    except OSError as error:
        raise Error(f"cannot write {path} ({error.strerror}): fix that, then resume the run")


def read_rows(path: pathlib.Path, *numbers: str) -> list[dict[str, str]]:
    """The rows of a CSV that were written whole; none if there is no file.

    Raises Error if it is no text, or if a column that `numbers` names holds anything but a whole number.
    """
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
        rows = [row for row in rows if None not in row.values()]
        _ = [int(row[name]) for row in rows for name in numbers]
    except (OSError, ValueError, LookupError, csv.Error) as error:
        raise Error(f"{path} is damaged ({error}): restore it, or move its folder away and start anew")
    return rows


def keep_rows(path: pathlib.Path, keep: collections.abc.Callable[[int], bool]):
    """Leaves those rows of a CSV whose step `keep` accepts."""
    rows = [row for row in read_rows(path, "step") if keep(int(row["step"]))]
    if rows:
        write_file(path, to_csv(rows, header=True).encode())
    else:
        path.unlink(missing_ok=True)


def read_record(folder: str, algo: str, kind: type) -> tuple[dict, object]:
    """What a run of `algo` wrote to args.json in its folder, and its arguments, a `kind`.

    Raises Error if none did.
    """
    try:
        record = json.loads(pathlib.Path(folder, "args.json").read_text())
        if record["algo"] != algo:
            raise Error(f"{folder} is a run of {record['algo']}: resume it by algos/{record['algo']}.py")
        if not ({"device", "versions"} <= record.keys() and record["data"]["sha256"]):
            raise ValueError("its args.json is not whole")
        return record, kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in record["args"].items()})
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise Error(f"{folder} is no run's folder ({error}): --resume takes one like runs/<task>/<algo>/<time>")


def values_of(args) -> dict:
    """The arguments that make a run's numbers, given its task and data."""
    values = {name: value for name, value in vars(args).items() if name not in ELSEWHERE and value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def identity(algo: str, args) -> dict:
    """What a checkpoint shares with the run of `algo` by `args` that it belongs to."""
    return {"version": CHECKPOINT_VERSION, "algorithm": algo, "task": args.env_name} | values_of(args)


def read_checkpoint(path: pathlib.Path, algo: str, args) -> dict:
    """What the run of `algo` by `args` has saved: step, and states as flax's state dict.

    Raises Error if the file is damaged, or another run's.
    """
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise Error(f"{path} is damaged, and its run cannot go on: move {path.parent} away, and start anew")
    try:
        saved = flax.serialization.msgpack_restore(content[32:])
        for name, value in identity(algo, args).items():
            if saved["run"].get(name) != value:
                raise ValueError(f"its {name} is {saved['run'].get(name)}, this run's {value}")
        return saved
    except Exception as error:  # there is no telling what a file from elsewhere holds
        raise Error(f"{path} is of another run ({error}): resume each with its own checkpoint and code")


def git_commit() -> str | None:
    """The commit of this code, with a + if files differ from it; None outside of git."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:  # without --exclude, a tag would stand in place of the commit
        return subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def tell(text: str):
    """Prints a line above the progress bar, at once."""
    tqdm.write(text)
    sys.stdout.flush()


def leave_before_training(number, frame):
    """Handles Ctrl-C and SIGTERM as long as there is nothing to save."""
    print("stopped before training began: give the same command again", file=sys.stderr)
    sys.exit(128 + number)


class Run:
    """The record of one run: what was asked, on which data, what came of it, and where it stands.

    A context manager. Its folder, runs/<task>/<algo>/<time>/, holds args.json; train.csv, a row per seed and chunk of
    updates; eval.csv, a row per seed and evaluation; episodes.csv, a row per seed, evaluation and episode; and
    checkpoint.msgpack. No CSV holds a clock's time, so those of a resumed run equal an uninterrupted one's byte for
    byte.
    """

    def __init__(self, args, file: str, columns: tuple[str, ...]):
        """Prepares a run of the algorithm in `file`: by `args`, each None replaced by the paper's value (see
        `resolve`), or, with `args.resume`, by the arguments of that run. Raises Error, before any training, if anything
        is impossible."""
        if not jax.config.jax_compilation_cache_dir:  # what this machine compiles is kept
            cache = pathlib.Path("~/.cache/doal").expanduser() / platform.node()
            jax.config.update("jax_compilation_cache_dir", str(cache))
        algo, record = pathlib.Path(file).stem, None
        if args.resume is not None:
            record, stored = read_record(args.resume, algo, type(args))
            if args != dataclasses.replace(type(args)(), resume=args.resume):
                raise Error(f"--resume takes all other flags from {args.resume}/args.json: give it alone")
            self.folder, args = pathlib.Path(args.resume), stored
        self.algo, self.task = algo, load_task(args.env_name)
        self.unit = "normalized return" if self.task.adroit else "% success"
        self.args = args = resolve(args, self.task, columns)
        if not record:
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            self.folder = pathlib.Path("runs", args.env_name, algo, name)
            try:
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.folder.parent).close()
            except OSError as error:
                raise Error(f"cannot write to {self.folder.parent.absolute()} ({error.strerror}): start elsewhere")
        if args.capture_video:
            rendering_backend()  # raises Error if nothing can draw: better now than after the run
        self.signals = {number: signal.signal(number, leave_before_training) for number in SIGNALS}
        dataset, data = load_dataset(self.task, args.dataset_path, args.generate_episodes)
        self.sharding, everywhere = shardings(len(args.seeds))
        self.dataset = jax.device_put(dataset, everywhere)
        installed = {package.name: package.version for package in importlib.metadata.distributions()}
        versions = {name: installed.get(name) for name in PACKAGES}
        if not record:
            record = {"algo": algo, "args": dataclasses.asdict(args), "data": data, "commit": git_commit()}
            record |= {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "versions": versions}
            try:
                self.folder.mkdir()
            except OSError as error:
                raise Error(f"cannot write {self.folder} ({error.strerror}): make room there, or start elsewhere")
            write_file(self.folder / "args.json", json.dumps(record, indent=2).encode())
        if record["data"]["sha256"] != data["sha256"]:
            raise Error(f"{data['path']} is not what {self.folder} was trained on (its sha256 differs): restore it")
        if record["versions"] != versions:
            print(f"warning: begun with {record['versions']}, resumed with {versions}", file=sys.stderr)
        self.record, self.lock = record, filelock.FileLock(self.folder / ".lock")
        self.step = 0  # updates done
        self.interval = args.num_updates // 10  # updates between two evaluations
        self.chunk = max(size for size in range(1, 251) if self.interval % size == 0)  # updates in one call of `train`
        self.saved_step, self.saved_time = 0, time.monotonic()
        self.evaluated, self.diverged = set(), set()  # steps whose evaluation has begun, seeds
        self.evaluation = None  # the one under way: step, time it began, seeds diverged by then, future of its scores
        self.stop = 0  # the signal that asked to stop

    def __enter__(self):
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise Error(f"{self.folder} is being trained by another process: let that one end, or stop it")
        except OSError as error:
            raise Error(f"cannot write to {self.folder} ({error.strerror}): fix that, then resume the run")
        self.print_banner()
        slots = slots_per_seed(len(self.args.seeds), self.args.eval_episodes)
        workers = self.args.num_workers or os.cpu_count()
        self.environments = Environments(self.task, slots * len(self.args.seeds), workers)
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.tracked = queue.SimpleQueue()  # a row per seed, again and again, and at last the exit code
        self.tracking = threading.Thread(target=self.track, daemon=True)
        if self.args.track:
            self.tracking.start()
        for number in SIGNALS:
            signal.signal(number, self.ask_to_stop)
        calm = 0.1 if sys.stderr.isatty() else 10  # seconds between redraws of the bar: few in a log file
        self.bar = tqdm(total=self.args.num_updates, desc=self.algo, unit="update", mininterval=calm, smoothing=0.1)
        return self

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        self.environments.close()  # which ends an evaluation, too
        self.thread.shutdown()
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        self.tracked.put(int(kind is not None))
        if self.tracking.is_alive():
            self.tracking.join(TRACKING_PATIENCE)
            if self.tracking.is_alive():
                self.tracking = None  # silences the warning that it would print after this one
                tell(f"warning: Weights & Biases did not take all: wandb sync {self.folder}/wandb/* sends the rest")
        self.lock.release()
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise Error(f"too little memory ({error}): give fewer --seeds, or smaller --batch-size or --hidden-dims")
        if kind is None:
            self.print_score()
        if kind is None and self.args.capture_video:
            film = [sys.executable, str(pathlib.Path(__file__).with_name("evaluate.py")), str(self.folder)]
            beside = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # this process has the GPU's memory
            if subprocess.run([*film, "--capture-video"], env=beside).returncode:
                raise Error(f"the run is finished, in {self.folder}, but could not be filmed: see above")

    def print_banner(self):
        """Says what is about to run: task, data, values, device, folder."""
        data, versions = self.record["data"], self.record["versions"]
        values = [
            f"{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in values_of(self.args).items()
        ]
        print(f"{self.algo} on {self.task.name}, scored by {self.unit} in {self.task.env_id}")
        print(f"  data    {os.fsencode(data['path']).decode(errors='replace')}")  # a name can be of any bytes
        print(f"          {data['source']}, {data['transitions']:,} transitions, sha256 {data['sha256'][:16]}")
        print(f"  values  {', '.join(values)}")
        print(f"  device  {self.record['device']}; {', '.join(f'{name} {v}' for name, v in versions.items())}")
        print(f"  folder  {self.folder}", flush=True)

    def restore(self, states):
        """`states`, or the checkpoint's if there is one, on the seeds' devices; the CSVs are cut back to its step.

        Raises Error if the checkpoint is damaged or another run's.
        """
        path = self.folder / "checkpoint.msgpack"
        if path.exists():
            saved = read_checkpoint(path, self.algo, self.args)
            try:
                restored = jax.tree.map(jnp.asarray, flax.serialization.from_state_dict(states, saved["states"]))
                if jax.tree.map(jnp.shape, restored) != jax.tree.map(jnp.shape, states):
                    raise ValueError("its arrays have other shapes")
                states = restored
            except (ValueError, TypeError, AttributeError) as error:
                raise Error(f"{path} holds other networks ({error}): resume it with the code that wrote it")
            self.step = self.saved_step = self.bar.n = self.bar.initial = saved["step"]
        rows = read_rows(self.folder / "train.csv", "step", "seed")
        self.diverged = {
            int(row["seed"]) for row in rows if row.get("diverged") == "1" and int(row["step"]) <= self.step
        }
        rows = collections.Counter(int(row["step"]) for row in read_rows(self.folder / "eval.csv", "step"))
        self.evaluated = {step for step in rows if rows[step] == len(self.args.seeds) and step <= self.step}
        keep_rows(self.folder / "train.csv", lambda step: step <= self.step)
        keep_rows(self.folder / "eval.csv", lambda step: step in self.evaluated)
        keep_rows(self.folder / "episodes.csv", lambda step: step in self.evaluated)
        return jax.device_put(states, self.sharding)

    @property
    def evaluation_due(self) -> bool:
        """Whether another tenth of the run is done and not evaluated yet."""
        return self.step > 0 and self.step % self.interval == 0 and self.step not in self.evaluated

    @property
    def finished(self) -> bool:
        """Whether all updates are done and evaluated."""
        return self.step == self.args.num_updates and not self.evaluation_due

    def log(self, metrics: dict[str, jax.Array]):
        """Records a chunk of updates by its mean metrics, {name: [seeds]}.

        Names each seed whose numbers cease to be finite; raises Error when no seed is left.
        """
        self.step += self.chunk
        metrics = {name: np.asarray(values) for name, values in metrics.items()}  # waits for the chunk to end
        rows = [{name: float(values[i]) for name, values in metrics.items()} for i in range(len(self.args.seeds))]
        for seed, row in zip(self.args.seeds, rows):
            if seed not in self.diverged and not np.isfinite(list(row.values())).all():
                self.diverged.add(seed)
                tell(f"seed {seed} diverged by update {self.step:,} ({row}): it scores nan from here on")
        self.record_rows("train", self.step, rows, self.diverged)
        self.bar.update(self.chunk)
        if len(self.diverged) == len(rows):
            raise Error(f"every seed diverged by update {self.step:,}: lower --learning-rate, and see {self.folder}")

    def evaluate(self, act: collections.abc.Callable, states):
        """Begins to evaluate the policies `act(states, obs, keys)`: on the CPU, beside the training that goes on."""
        cpu, args = jax.devices("cpu")[0], self.args
        states = jax.device_put(jax.tree.map(np.array, states), cpu)  # a copy: the next update overwrites `states`

        update = self.step

        def play_episodes():
            with jax.default_device(cpu):
                policies = functools.partial(act, states)
                return evaluate(policies, self.environments, args.seeds, update, args.eval_episodes, args.eval_seed)

        self.evaluated.add(self.step)
        self.evaluation = self.step, time.monotonic(), set(self.diverged), self.thread.submit(play_episodes)

    def record_evaluation(self, wait: bool):
        """Records each episode's score if the evaluation under way has ended, or, with `wait`, when it has."""
        if not self.evaluation:
            return
        step, begun, diverged, future = self.evaluation
        while wait and not future.done():
            self.leave_if_asked()
            concurrent.futures.wait([future], timeout=0.1)
        if not future.done():
            return
        scores, self.evaluation = future.result(), None
        scores[[seed in diverged for seed in self.args.seeds]] = np.nan
        for i in range(self.args.eval_episodes):
            self.record_rows("episodes", step, [{"episode": i, "score": score} for score in scores[:, i]], diverged)
        means = scores.mean(axis=1)
        rows = [{"score": mean} for mean in means]
        self.record_rows("eval", step, rows, diverged)  # last: it says that the evaluation is whole
        each = ", ".join(f"seed {seed} {mean:.1f}" for seed, mean in zip(self.args.seeds, means))
        tell(
            f"update {step:,}: {means.mean():.1f} {self.unit} ({each}; {self.args.eval_episodes} episodes each, "
            f"{time.monotonic() - begun:.0f} s)"
        )

    def record_rows(self, name: str, step: int, rows: list[dict[str, float]], diverged: set[int]):
        """Appends a row per seed to <name>.csv, marked if it has diverged, and sends it to Weights & Biases, but for
        single episodes."""
        keys = [{"step": step, "seed": seed, "diverged": int(seed in diverged)} for seed in self.args.seeds]
        text = [
            {column: value if column == "episode" else f"{value:.6g}" for column, value in row.items()} for row in rows
        ]
        append_rows(self.folder / f"{name}.csv", [key | row for key, row in zip(keys, text)])
        if name != "episodes":
            names = {column: f"{name}/{column}" for column in rows[0]}
            self.tracked.put([{"step": step} | {names[column]: v for column, v in row.items()} for row in rows])

    def save(self, states):
        """Writes the checkpoint where one is due: before each evaluation, every ten minutes, and when Ctrl-C or SIGTERM
        asked to stop; the last ends the program. None is written while an evaluation is under way: it would be lost."""
        self.record_evaluation(wait=self.evaluation_due or self.finished)
        due = self.evaluation_due or self.stop or time.monotonic() - self.saved_time > 600
        if due and not self.evaluation and self.step > self.saved_step:
            states = flax.serialization.to_state_dict(jax.device_get(states))
            saved = {"run": identity(self.algo, self.args), "step": self.step, "states": states}
            content = flax.serialization.msgpack_serialize(saved)
            write_file(self.folder / "checkpoint.msgpack", hashlib.sha256(content).digest() + content)
            self.saved_step, self.saved_time = self.step, time.monotonic()
        self.leave_if_asked()

    def ask_to_stop(self, number, frame):
        """Handles Ctrl-C and SIGTERM: the run leaves at the next chunk's end, or at once on the second."""
        self.stop = number
        signal.signal(number, signal.SIG_DFL)
        tell("stopping at the end of this chunk of updates")

    def leave_if_asked(self):
        """Ends the program if a signal asked for it."""
        if self.stop:
            self.bar.close()
            tell(f"stopped at update {self.saved_step:,}; go on by: python {sys.argv[0]} --resume {self.folder}")
            sys.exit(128 + self.stop)

    def print_score(self):
        """Prints the score by the paper's protocol: of each seed, the mean of the evaluations at 80, 90 and 100% of the
        run, or the last one on D4RL; over the seeds, mean and standard deviation (ddof 0)."""
        first = first_scored(self.task.name, self.args.num_updates)
        rows = [row for row in read_rows(self.folder / "eval.csv") if int(row["step"]) >= first]
        seeds = {seed: [float(row["score"]) for row in rows if int(row["seed"]) == seed] for seed in self.args.seeds}
        scores = [np.mean(values) for values in seeds.values()]
        steps = ", ".join(f"{step:,}" for step in sorted({int(row["step"]) for row in rows}))
        print(f"score: {np.mean(scores):.1f} +- {np.std(scores):.1f} {self.unit}")
        print(f"  mean +- std over {len(seeds)} seed(s), each scored by the mean of its evaluations at {steps} updates")
        if self.diverged:
            print(f"  diverged, and so nan: seed {', '.join(map(str, sorted(self.diverged)))}")
        print(f"  every number is in {self.folder}", flush=True)

    def track(self):
        """Sends what `tracked` brings to Weights & Biases, a run per seed, until the exit code comes.

        In a thread of its own: a host that is slow, down or fails in mid-run costs a warning and no update.
        """
        name = f"{self.algo} {self.task.name} {self.folder.name}"
        try:
            import wandb

            start = functools.partial(
                wandb.init,
                project=self.args.wandb_project_name,
                group=name,
                config=self.record,
                dir=self.folder,
                resume="allow",
                reinit="create_new",
            )
            trackers = [start(name=f"{name} {s}", id=f"{self.folder.name}-{s}") for s in self.args.seeds]
            for tracker in trackers:
                tracker.define_metric("*", step_metric="step")  # an evaluation's may be behind training's
            while isinstance(rows := self.tracked.get(), list):
                for tracker, row in zip(trackers, rows):
                    tracker.log(row)
            for tracker in trackers:
                tracker.finish(exit_code=rows)
        except Exception as error:
            if self.tracking:
                tell(f"warning: not tracked by Weights & Biases any more ({error}): log in, or set WANDB_MODE=offline")
