"""The record of a run: its folder, CSVs, checkpoint and resume, signals, progress and Weights & Biases.

Every algorithm's `main` uses `Run` in the same lines. `load_policy` gives the policy of a run's folder.
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time

import filelock
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import common
from common import ROOT, Error, read_args, read_record

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "ogbench", "gymnasium", "gymnasium-robotics", "mujoco")
CSVS = ("train.csv", "eval.csv", "episodes.csv")
BOOKKEEPING = {"num_workers", "folder", "resume", "track", "wandb_project_name", "capture_video"}  # affect no number


def identity(algo: str, args) -> dict:
    """All that decides a run's numbers, except its seeds, in JSON's types. Runs that share it belong to one cell."""
    values = {name: value for name, value in vars(args).items() if name not in BOOKKEEPING | {"seeds"}}
    return json.loads(json.dumps({"algo": algo} | values))


def hold(folder: pathlib.Path) -> filelock.FileLock:
    """The lock of a run's folder, for this process alone. Raises Error if another one has it, or if none can."""
    lock = filelock.FileLock(folder / ".lock", timeout=1)  # reproduce.py holds it for a moment
    with writing(lock.lock_file):
        try:
            lock.acquire()
        except filelock.Timeout:
            raise Error(f"{folder} is in use by another process: let that one end, or stop it")
    return lock


@contextlib.contextmanager
def writing(path: pathlib.Path):
    """Raises Error if, within its `with` block, there is no room or permission to write `path`."""
    try:
        yield
    except OSError as error:
        remedy = "fix that, then give the same command or, if a run has begun, resume it"
        raise Error(f"cannot write {path} ({error.strerror}): {remedy}")


def write_file(path: pathlib.Path, content: bytes):
    """Writes a file that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def append_rows(path: pathlib.Path, rows: list[dict]):
    """Appends rows to a CSV, after a header if it is new. Raises Error if it has other columns."""
    with writing(path), open(path, "a+") as file:
        file.seek(0)
        header, writer = file.readline(), csv.DictWriter(file, rows[0], lineterminator="\n")
        if header not in ("", ",".join(rows[0]) + "\n"):
            raise Error(f"{path} has other columns than {', '.join(rows[0])}: resume it with the code that wrote it")
        if not header:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """The complete rows of a CSV; none if there is no file. Raises Error if it is damaged."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
    if not all(str(row.get(key)).isdecimal() for row in rows for key in ("step", "seed")):
        raise Error(f"{path} is damaged: restore it, or move its folder away and start again")
    return rows


def read_checkpoint(folder: pathlib.Path, states) -> dict:
    """What was saved last: step, the updates done; states, of the shapes of `states`; and csvs, their content. Or 0,
    `states` and empty CSVs if nothing was. Raises Error if the checkpoint is damaged, or of other code."""
    path, empty = folder / "checkpoint.msgpack", {"step": 0, "states": states, "csvs": dict.fromkeys(CSVS, b"")}
    if not path.exists():
        return empty
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise Error(f"{path} is damaged, and its run cannot be resumed: move {folder} away, and start again")
    try:
        saved = flax.serialization.from_bytes(empty, content[32:])
        if jax.tree.map(jnp.shape, saved["states"]) != jax.tree.map(jnp.shape, states):
            raise ValueError("its arrays have other shapes")
        return saved
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise Error(f"{path} is of other code ({error}): use the code that wrote it")


def git_commit() -> str | None:
    """The commit of this code, with a + if code differs from it or is not in it; None outside git."""
    command = ["git", "--git-dir", ROOT / ".git", "--work-tree", ROOT]  # not those of a folder above
    git = lambda *words: subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    try:
        return git("rev-parse", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "-unormal", "*.py"))
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict:
    """What a run's numbers depend on besides its arguments and data."""
    version = lambda name: next((each.version for each in importlib.metadata.distributions(name=name)), None)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.default_backend() == "cpu":  # their number decides how XLA orders a sum
        device += f", {common.usable_cores()} cores"
    code = {"commit": git_commit(), "versions": {name: version(name) for name in PACKAGES}}
    return code | {"device": device, "matmul_precision": jax.config.jax_default_matmul_precision}


def load_run(folder: str):
    """A run's module, arguments, updates done and states [seeds, ...], from its folder. Raises Error if it has no
    checkpoint."""
    folder = pathlib.Path(folder)
    record = read_record(folder)
    module = common.load_algo(record["algo"])
    args = read_args(record, module.Args)
    env = common.load_task(args.env_name, args.dataset_path).make_env()
    init = functools.partial(module.init, args, env.observation_space.shape[0], env.action_space.shape[0])
    saved = read_checkpoint(folder, jax.eval_shape(jax.vmap(init), jnp.array(args.seeds, jnp.uint32)))
    if saved["step"] == 0:
        raise Error(f"{folder} has no checkpoint yet: go on with it by --resume")
    return module, args, saved["step"], jax.tree.map(jnp.asarray, saved["states"])


def load_policy(folder: str, index: int = 0):
    """The policy of a run's seed number `index`. It takes obs [obs_dim] and, for its noise, a key, and returns an
    action [action_dim] in [-1, 1], as the environments of `common.load_task(...).make_env()` take it."""
    module, args, _, states = load_run(folder)
    state = jax.tree.map(lambda leaf: leaf[index : index + 1], states)

    def policy(obs, key=None):
        key = jax.random.PRNGKey(0) if key is None else key
        return np.asarray(module.act(args, state, jnp.asarray(obs, jnp.float32)[None, None], key[None, None])[0, 0])

    return policy


def tell(text: str):
    """Prints a line above the progress bar, at once; or not at all, so that a terminal that has gone stops no save."""
    with contextlib.suppress(OSError):
        tqdm.write(text)
        sys.stdout.flush()


class Run:
    """The record of one run: its arguments and data, its results, and its state.

    Its folder holds args.json; train.csv, a row per seed and chunk of updates; eval.csv, a row per seed and evaluation;
    episodes.csv, a row per seed, evaluation and episode; and checkpoint.msgpack, the state and these CSVs. No CSV holds
    a clock's time, so those of a resumed run equal an uninterrupted one's byte for byte. Within its `with` block,
    Ctrl-C, SIGTERM and SIGHUP end the run so that it can be resumed.
    """

    def __init__(self, args, file: str, task: common.Task, data: dict):
        """Begins the record of `args` (see `common.prepare`), by the algorithm in `file`, on `data` (see
        `common.load_dataset`); or continues the one in `args.resume`. Raises Error if its folder or Weights & Biases is
        not available, or if it was begun on other data."""
        self.args, self.file, self.task = args, file, task
        self.eval_interval = args.num_updates // 10  # updates between two evaluations
        self.chunk = max(size for size in range(1, 251) if self.eval_interval % size == 0)  # updates per `train`
        self.stop, self.training, self.saved_step = 0, False, 0  # the signal that asked to stop; see `ask_to_stop`
        now = provenance()
        if args.resume is None:
            algo, begun = pathlib.Path(file).stem, time.strftime("%Y%m%d-%H%M%S")
            begun += f"-{secrets.token_hex(2)}"  # runs may start in the same second
            self.folder = pathlib.Path(args.folder or f"runs/{args.env_name}/{algo}/{begun}")
            with writing(self.folder.absolute()):
                self.folder.mkdir(parents=True, exist_ok=True)
            self.record = {"algo": algo, "args": dataclasses.asdict(args), "data": data} | now
            self.record["wandb"] = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        else:
            self.folder = pathlib.Path(args.resume)
            self.record = record = read_record(self.folder)
            if record["data"]["sha256"] != data["sha256"]:
                raise Error(f"{data['path']} is not what {self.folder} was trained on (its sha256 differs): restore it")
            record["data"]["path"] = data["path"]  # it may have moved
            record.pop("finished", None)  # its checkpoint may be gone
            if changed := [f"{name} {record[name]}, now {now[name]}" for name in now if record[name] != now[name]]:
                print(f"warning: begun with {'; '.join(changed)}", file=sys.stderr)
                record["resumed"] = [*record.get("resumed", []), now]
        calm = 0.1 if sys.stderr.isatty() else 10  # seconds between redraws of the bar: few in a log file
        bar = dict(total=args.num_updates, desc=self.record["algo"], unit="update", smoothing=0.1, mininterval=calm)
        with contextlib.ExitStack() as exits:  # what a notebook would hold on to
            exits.callback(hold(self.folder).release)
            self.tracker = self.start_tracking() if args.track else None
            if self.tracker:
                exits.push(lambda error, *_: self.tracker.finish(exit_code=int(error is not None)))
            write_file(self.folder / "args.json", json.dumps(self.record, indent=2).encode())
            self.print_banner(now)
            self.bar = exits.enter_context(tqdm(**bar))
            self.exits = exits.pop_all()

    def __enter__(self):
        """From here on, signals end the run in order; but not in a thread, nor a signal that nohup ignores."""
        self.handlers = {}  # what signals did before
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.ask_to_stop)
                self.exits.callback(signal.signal, number, self.handlers[number])
        return self

    def __exit__(self, *error):
        """Leaves nothing behind in this process, which may be a notebook's."""
        self.exits.__exit__(*error)

    def print_banner(self, now: dict):
        """Says what is about to run: task, data, values, device, folder."""
        data, values = self.record["data"], self.record["args"].items()
        shown = lambda value: " ".join(map(str, value)) if np.ndim(value) else value
        values = [f"{k} {shown(v)}" for k, v in values if k not in BOOKKEEPING and v is not None]
        print(f"{self.record['algo']} on {self.task.name}, scored by {self.task.unit} in {self.task.env_id}")
        print(f"  data    {data['path']}")
        print(f"          {data['source']}, {data['transitions']:,} transitions, sha256 {data['sha256'][:16]}")
        print(f"  values  {', '.join(values)}")
        print(f"  device  {now['device']}; {', '.join(' '.join(map(str, pair)) for pair in now['versions'].items())}")
        print(f"  folder  {self.folder}", flush=True)

    def restore(self, states):
        """Updates done, and the states [seeds, ...]: those of the checkpoint, or 0 and `states`.

        The CSVs are again what they were then. Raises Error if the checkpoint is damaged, or of other code.
        """
        saved = read_checkpoint(self.folder, states)
        for name, content in saved["csvs"].items():
            write_file(self.folder / name, content)
        rows = read_rows(self.folder / "train.csv")
        self.diverged = {int(row["seed"]) for row in rows if row["diverged"] == "1"}
        self.bar.n = self.bar.initial = self.saved_step = saved["step"]
        self.saved_time, self.training = time.monotonic(), True
        return saved["step"], saved["states"]

    def log(self, step: int, metrics: dict[str, jax.Array]):
        """Records a chunk of updates by its mean metrics, {name: [seeds]}.

        Reports each seed whose metrics are no longer finite; raises Error when no seed is left.
        """
        metrics = {name: np.asarray(values) for name, values in metrics.items()}  # waits for the chunk to end
        rows = [{name: float(values[i]) for name, values in metrics.items()} for i in range(len(self.args.seeds))]
        for seed, row in zip(self.args.seeds, rows):
            if seed not in self.diverged and not np.isfinite(list(row.values())).all():
                self.diverged.add(seed)
                tell(f"seed {seed} diverged by update {step:,} ({row}): it scores nan from here on")
        self.write("train", step, rows)
        try:
            self.bar.update(self.chunk)
        except OSError:  # nohup's run goes on when the other end of its pipe has gone
            self.bar.disable = True
            self.bar.get_lock().release()  # `refresh` of tqdm keeps it
        if len(self.diverged) == len(rows):
            raise Error(f"every seed diverged by update {step:,} (see {self.folder / 'train.csv'}): "
                        f"lower --learning-rate, or the data's rewards")  # fmt: skip
        self.training = step % self.eval_interval != 0
        if self.stop and not self.training:
            self.leave()

    def log_scores(self, step: int, scores: np.ndarray):
        """Records an evaluation, the scores [seeds, episodes]."""
        self.training = True
        scores[[seed in self.diverged for seed in self.args.seeds]] = np.nan
        for i, column in enumerate(scores.T):
            self.write("episodes", step, [{"episode": i, "score": score} for score in column])
        means = scores.mean(axis=1)
        self.write("eval", step, [{"score": mean} for mean in means])
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
        """Writes the checkpoint when one is due: after each evaluation, every ten minutes, and when a signal asked to
        stop, which then ends the program."""
        if step % self.eval_interval == 0 or self.stop or time.monotonic() - self.saved_time > 600:
            csvs = {name: (self.folder / name).read_bytes() for name in CSVS}
            content = flax.serialization.to_bytes({"step": step, "states": jax.device_get(states), "csvs": csvs})
            write_file(self.folder / "checkpoint.msgpack", hashlib.sha256(content).digest() + content)
            self.saved_step, self.saved_time = step, time.monotonic()
        if self.stop:
            self.leave()

    def ask_to_stop(self, number, frame):
        """Handles Ctrl-C, SIGTERM and SIGHUP: a run that is training saves at its chunk's end and leaves; one that
        evaluates, or is about to, leaves at once with its last checkpoint. A second one does what it did before."""
        self.stop = number
        signal.signal(number, self.handlers[number])
        with contextlib.suppress(OSError):  # see `tell`
            self.bar.close()
        if not self.training:
            self.leave()
        tell("stopping at the end of this chunk of updates")

    def leave(self):
        """Ends the program, and says how to resume the run."""
        again = shlex.join(["python", os.path.relpath(self.file), "--resume", str(self.folder)])
        tell(f"stopped at update {self.saved_step:,}; resume it by: {again}")
        sys.exit(128 + self.stop)

    def finish(self) -> np.ndarray:
        """Prints and returns the scores [seeds] by the paper's protocol: of each seed, the mean of the evaluations at
        80, 90 and 100 % of the run, or the last one on D4RL. Films, if asked to."""
        rows = [row for row in read_rows(self.folder / "eval.csv")
                if int(row["step"]) >= self.task.scored_from * self.args.num_updates]  # fmt: skip
        score = lambda seed: np.mean([float(row["score"]) for row in rows if int(row["seed"]) == seed])
        scores = np.array([score(seed) for seed in self.args.seeds])
        steps = ", ".join(f"{step:,}" for step in sorted({int(row["step"]) for row in rows}))
        spread, seeds = "", "one seed"
        if len(scores) > 1:
            spread, seeds = f" +- {scores.std():.1f}", f"mean +- std over {len(scores)} seeds, each"
        tell(f"score: {scores.mean():.1f}{spread} {self.task.unit}")
        tell(f"  {seeds} scored by the mean of its evaluations at {steps} updates")
        if self.diverged:
            tell(f"  diverged, and so nan: seed {', '.join(map(str, sorted(self.diverged)))}")
        tell(f"  every number is in {self.folder}")
        self.record["finished"] = True  # with its last checkpoint, and not only its last evaluation
        write_file(self.folder / "args.json", json.dumps(self.record, indent=2).encode())
        if self.args.capture_video:
            film = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), str(self.folder), "--capture-video"]
            if subprocess.run(film).returncode:
                raise Error(f"the run is finished, in {self.folder}, but could not be filmed: see above")
        return scores

    def start_tracking(self):
        """A run of Weights & Biases: the sweep's, if an agent started this. Raises Error if that fails."""
        import wandb

        try:
            where = dict(project=self.args.wandb_project_name, dir=self.folder.absolute())
            name = f"{self.record['algo']} {self.task.name} {self.folder.name}"
            tracker = wandb.init(**where, name=name, id=self.record["wandb"], config=self.record, resume="allow")
        except Exception as error:
            raise Error(f"no Weights & Biases ({error}): log in, set WANDB_MODE=offline, or leave --track out")
        tracker.define_metric("*", step_metric="step")
        return tracker
