"""Runs the paper's tables and figures: expands their names into runs of algos/*.py, and brings each to its end.

    python reproduce.py table1 table2 --dry-run                  # what would run, where, and for how long
    python reproduce.py table2 --tasks scene-play --algos mfrebrac dmfrebrac
    python reproduce.py table1 table2 table4 figure6 --cluster slurm --gpus 1
    python reproduce.py table2 --tasks cube-single-play -- --num-updates 20000 --generate-episodes 100   # reduced

Flags after -- go to every algorithm that has them. A run is known by its arguments: one that is finished is skipped,
one that was cut off is resumed, so the same command goes on wherever it was stopped. Ctrl-C lets the runs save.
`python report.py` with the same words makes tables, figures and a page of what has been run.
"""

import collections
import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from typing import Literal, NamedTuple

import filelock
import submitit
import tyro

import adroit
import common
from run import BYSTANDERS, read_rows

ROOT = pathlib.Path(__file__).resolve().parent
SEEDS = {8: (111, 222, 333, 444, 555, 666, 777, 888), 4: (11, 22, 33, 44)}  # the paper's: 8, and 4 for its ablations
NUM_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128)  # each of Table 4's runs is evaluated with all of these
EXPERIMENTS = """
         column                algorithm  tasks    seeds  flags
table1   iql_tanh              iql        adroit   8      --tanh
table1   iql                   iql        all      8
table1   diql                  diql       all      8
table1   ifql                  ifql       all      8
table1   difql                 difql      all      8
table1   trigflow              trigflow   all      8
table1   dtrigflow             dtrigflow  all      8
table1   etrigflow             etrigflow  all      8
table2   rebrac_tanh           rebrac     all      8      --tanh
table2   rebrac_gauss          rebrac     adroit   8      --no-tanh
table2   fql                   fql        all      8
table2   mfql                  mfql       all      8
table2   dmfql                 dmfql      all      8
table2   mfql_bptt             mfql_bptt  ogbench  8
table2   mfrebrac              mfrebrac   all      8
table2   dmfrebrac             dmfrebrac  all      8
table3   difql                 difql      ogbench  8
table4   mfql                  mfql       ogbench  4
figure3  dmfql                 dmfql      ogbench  8
figure6  delta=0.03            dmfql      ogbench  4      --delta 0.03
figure6  delta=0.1             dmfql      ogbench  4      --delta 0.1
figure6  delta=0.3             dmfql      ogbench  4      --delta 0.3
figure7  alpha=fql             dmfql      ogbench  4
figure7  alpha=1               dmfql      ogbench  4      --alpha 1
figure8  num_target_samples=4  dmfql      ogbench  4      --num-target-samples 4
figure8  num_target_samples=1  dmfql      ogbench  4      --num-target-samples 1
"""  # Table 3 has the deltas of the IQL columns, and all of these learn the same Q
BENCHMARK = json.loads((ROOT / "results" / "benchmark.json").read_text())


Target = Literal["table1", "table2", "table3", "table4", "figure3", "figure6", "figure7", "figure8"]


@dataclasses.dataclass(frozen=True)
class Selection:
    targets: tyro.conf.Positional[tuple[Target, ...]]
    """what to reproduce (Appendix E's learning curves are those of table1 and table2)"""
    tasks: tuple[str, ...] = ()
    """tasks (none: all that the table has)"""
    algos: tuple[str, ...] = ()
    """columns of the table (none: all)"""


@dataclasses.dataclass(frozen=True)
class Args(Selection):
    cluster: Literal["local", "slurm"] = "local"
    """where: on this machine, or as jobs of SLURM"""
    jobs: int | None = None
    """runs at a time (None: one on this machine; all on a cluster)"""
    gpus: int | None = None
    """GPUs of each run (None: all that are visible; on a cluster, none)"""
    cpus: int = 8
    """CPU cores of each run, on a cluster"""
    hours: float = 24
    """time limit of a run on a cluster, at which it is requeued and resumed"""
    slurm: tuple[str, ...] = ()
    """more options of sbatch, like partition=long account=me"""
    dry_run: bool = False
    """print what would run, and start nothing"""


class Cell(NamedTuple):
    """A cell of a table: where it stands, and the run that fills it."""

    table: str
    task: str
    column: str
    run: "Run"


class Run(NamedTuple):
    """A run of algos/<algo>.py."""

    algo: str
    flags: tuple[str, ...]
    args: str  # what decides its numbers: the arguments that its args.json will hold, but for BYSTANDERS, as JSON
    num_samples: tuple[int, ...] = ()  # how it is evaluated again at its end


def decisive(args: dict) -> str:
    """Those of a run's arguments that decide its numbers, as JSON."""
    return json.dumps({name: value for name, value in args.items() if name not in BYSTANDERS}, sort_keys=True)


def expand(selection: Selection, flags: list[str]) -> list[Cell]:
    """The selected cells, with `flags` given to every algorithm that has them.

    Raises Error if there is no such task, column or flag, or if a column sets one of the flags itself.
    """
    given, name = {}, ""  # {field of an algorithm's Args: the flag and its values}
    field_of = lambda flag: re.sub("^--(no-)?|=.*", "", flag).replace("-", "_")
    for word in flags:
        name = field_of(word) if word.startswith("--") else name
        given.setdefault(name, []).append(word)
    if "" in given:
        raise common.Error(f"{given[''][0]!r} belongs to no flag: behind -- stand flags of algos/*.py")
    rows = [line.split() for line in EXPERIMENTS.strip("\n").splitlines()[1:]]
    rows = [row for row in rows if row[0] in selection.targets]
    columns = dict.fromkeys(row[1] for row in rows)
    rows = [row for row in rows if row[1] in selection.algos or not selection.algos]
    cells, unknown = [], set(given) | set(selection.tasks) | set(selection.algos)
    for table, column, algo, family, seeds, *own in rows:
        module = importlib.import_module(f"algos.{algo}")
        fields = {field.name for field in dataclasses.fields(module.Args)}
        unknown -= fields | {column}
        if taken := given.keys() & {"env_name", "resume", *map(field_of, own[:1])}:
            raise common.Error(f"{table} sets {', '.join(sorted(taken))} itself: leave it out behind --")
        for task in common.PAPER:
            kind = "adroit" if task in adroit.TASKS else "ogbench"
            if family not in ("all", kind) or (selection.tasks and task not in selection.tasks):
                continue
            words = {"env_name": ["--env-name", task], "seeds": ["--seeds", *map(str, SEEDS[int(seeds)])], "own": own}
            words |= {name: value for name, value in given.items() if name in fields}
            line = tuple(itertools.chain(*words.values()))
            args = common.resolve(tyro.cli(module.Args, args=line), common.load_task(task), module.COLUMNS)
            run = Run(algo, line, decisive(vars(args)), NUM_SAMPLES if table == "table4" else ())
            cells.append(Cell(table, task, column, run))
            unknown.discard(task)
    if unknown := set(selection.algos) - columns.keys() or unknown:
        choice = f"its columns are {', '.join(columns)}, and tasks and flags are those of algos/*.py"
        raise common.Error(f"nothing that was selected has {', '.join(sorted(unknown))}: {choice}")
    return cells


def find_folder(run: Run) -> tuple[pathlib.Path | None, int]:
    """The folder below runs/ where a run got furthest, if it was begun, and how many tenths are evaluated there."""
    args, found = json.loads(run.args), [(-1, "")]
    for path in pathlib.Path("runs", args["env_name"], run.algo).glob("*/args.json"):
        try:
            same = decisive(json.loads(path.read_text())["args"]) == run.args
        except (ValueError, LookupError, AttributeError):  # a file that was not written by a run
            continue
        if same:
            rows = collections.Counter(row["step"] for row in read_rows(path.parent / "eval.csv", "step"))
            found.append((sum(count == len(args["seeds"]) for count in rows.values()), str(path.parent)))
    tenths, folder = max(found)
    return (pathlib.Path(folder), tenths) if folder else (None, 0)


def state_of(run: Run) -> str:
    """Where a run stands: "finished", "running", "cut off at 30 %" or "new"."""
    folder, tenths = find_folder(run)
    if not folder:
        return "new"
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            pass
    except filelock.Timeout:
        return "running"
    again = {int(row["num_samples"]) for row in read_rows(folder / "num_samples.csv", "num_samples")}
    return "finished" if tenths == 10 and again >= set(run.num_samples) else f"cut off at {10 * tenths} %"


class Job:
    """What a job of submitit does: brings a run to its end, in a process of its own."""

    def __init__(self, run: Run, gpus: str | None):
        self.run, self.gpus = run, gpus  # gpus: CUDA_VISIBLE_DEVICES on this machine, if anything is to be there

    def __call__(self):
        """Starts or resumes the run; evaluates it again, if that is asked for. What failed is told on stderr."""
        folder, tenths = find_folder(self.run)
        if tenths < 10:
            self.execute(f"algos/{self.run.algo}.py", *(["--resume", str(folder)] if folder else self.run.flags))
            folder, tenths = find_folder(self.run)
        if tenths == 10 and self.run.num_samples:
            self.execute("evaluate.py", str(folder), "--num-samples", *map(str, self.run.num_samples))

    def execute(self, program: str, *flags: str):
        """Runs a program of this folder to its end."""
        environment = dict(os.environ)
        local = environment["SUBMITIT_EXECUTOR"] == "local"
        if local:
            del environment["CUDA_VISIBLE_DEVICES"]  # which submitit sets, to nothing
            environment |= {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": self.gpus}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / program), *flags],
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),  # SLURM sends it to all of a job
        )
        if local:  # SLURM also sends SIGTERM to all of a job, and a run that gets it twice does not save
            signal.signal(signal.SIGTERM, lambda *_: self.process.terminate())
        code = self.process.wait()
        if code < 0:
            print(f"{program} was ended by {signal.Signals(-code).name}", file=sys.stderr)

    def checkpoint(self):
        """Called by submitit when the job's time is nearly up: lets the run save, and queues the job again."""
        self.process.terminate()
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Job(self.run, self.gpus))


def name_of(run: Run) -> str:
    """A run in a line: its algorithm and flags."""
    return " ".join([run.algo, *run.flags])


def submit(run: Run, args: Args, slot: int) -> submitit.Job:
    """Starts a run as a job, on this machine the `slot`-th of those that run at a time."""
    try:
        executor = submitit.AutoExecutor("runs/.jobs", cluster=args.cluster, slurm_max_num_timeout=10**6)
    except RuntimeError as error:
        raise common.Error(f"no SLURM here ({error}): log in where sbatch is, or leave --cluster slurm out")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    if args.cluster == "local":
        executor.update_parameters(timeout_min=10**6)
        gpus = ",".join(map(str, range(slot * args.gpus, (slot + 1) * args.gpus))) if args.gpus else gpus
    else:
        more = dict(option.partition("=")[::2] for option in args.slurm)
        executor.update_parameters(
            name=f"{run.algo}-{json.loads(run.args)['env_name']}", timeout_min=round(60 * args.hours)
        )
        executor.update_parameters(cpus_per_task=args.cpus, slurm_additional_parameters=more)
        if args.gpus:
            executor.update_parameters(gpus_per_node=args.gpus)
    return executor.submit(Job(run, gpus))


def stop(job: submitit.Job):
    """Lets a job's run save and end, by SIGTERM."""
    try:
        os.kill(int(job.job_id), signal.SIGTERM) if isinstance(job, submitit.LocalJob) else job.cancel()
    except ProcessLookupError:
        pass


def launch(runs: list[Run], args: Args) -> list[Run]:
    """Brings runs to their end, some at a time, and tells of each: those that failed. Ctrl-C and SIGTERM let them save,
    and end the program."""
    waiting, running, failed, stopped = list(runs), {}, [], False  # running: {slot: (run, job)}
    slots = args.jobs or (1 if args.cluster == "local" else len(runs))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # taken below; what is started inherits it: Ctrl-C in a
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # terminal is for this process alone
    while running or (waiting and not stopped):
        for slot in set(range(slots)) - set(running):
            if waiting and not stopped:
                run = waiting.pop(0)
                running[slot] = run, submit(run, args, slot)
                print(f"start            {name_of(run)}\n                 {running[slot][1].paths.stdout}", flush=True)
        for slot, (run, job) in list(running.items()):
            if job.done():
                del running[slot]
                state = state_of(run)
                if state in ("finished", "running") or stopped:  # running: by another process, which came first
                    lines = [
                        line for line in (job.stdout() or "").splitlines() if line.startswith(("score:", "stopped at"))
                    ]
                else:
                    state, lines = "FAILED", re.split("[\r\n]+", (job.stderr() or "").strip())
                    failed.append(run)
                print(f"{state:17}{name_of(run)}\n                 {' '.join(lines[-1:])}", flush=True)
        if signal.sigtimedwait({signal.SIGINT}, 0.5):
            print("stopping: what runs saves first, and the same command goes on", flush=True)
            stopped = True
            for _, job in running.values():
                stop(job)
            if args.cluster == "slurm":  # a job that was still waiting for its turn never ends
                break
    if stopped:
        sys.exit(128 + signal.SIGINT)
    return failed


def hours(run: Run) -> float:
    """About how long a run takes on the machine of results/benchmark.json, without its evaluations.

    From the updates per second of one seed at the paper's sizes that benchmark.py measured there, by the run's updates,
    seeds, batch and weights.
    """
    speeds = {row["algo"]: row["updates_per_second"]["ours"] for row in BENCHMARK["rows"] if row["num_seeds"] == 1}
    args = json.loads(run.args)
    weights = sum(a * b for a, b in itertools.pairwise(args["hidden_dims"]))
    scale = args["batch_size"] / 256 * max(weights / (3 * 512 * 512), 0.02)  # small networks cost their overhead
    return scale * args["num_updates"] * len(args["seeds"]) / speeds[run.algo] / 3600


def main(args: Args, flags: list[str]):
    """Tells what there is to run, where and for how long, and runs it."""
    common.check_ranges(args)
    if not args.targets:
        raise common.Error("nothing is selected: name tables or figures, like table1")
    runs = list({(cell.run.algo, cell.run.args): cell.run for cell in expand(args, flags)}.values())
    states = {run: state_of(run) for run in runs}
    todo = [run for run in runs if states[run] not in ("finished", "running")]
    for run in runs:
        print(f"{states[run]:17}{hours(run):6.1f} h  {name_of(run)}")
    where = f"on this machine, {args.jobs or 1} at a time" if args.cluster == "local" else "as jobs of SLURM"
    print(f"{len(todo)} of {len(runs)} runs to do {where}")
    machine = f"the machine of results/benchmark.json ({BENCHMARK['machine']})"
    print(f"about {sum(map(hours, todo)):.1f} h in all on {machine}, without evaluations")
    if not args.dry_run and (failed := launch(todo, args)):
        raise common.Error(f"{len(failed)} of {len(todo)} runs failed: their logs are in runs/.jobs")


if __name__ == "__main__":
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, args=sys.argv[1:end]), sys.argv[end + 1 :])
