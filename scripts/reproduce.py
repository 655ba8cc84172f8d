"""Runs the paper's tables and figures: one folder per run, runs/<name>/<task>/<run>/, with its log beside it.

    python scripts/reproduce.py table1 table2 --dry-run   # what would run
    python scripts/reproduce.py table2 --tasks scene-play --algos mfrebrac dmfrebrac
    python scripts/reproduce.py table1 table2 table4 figure6 --cluster slurm --gpus 1
    python scripts/reproduce.py table2 --tasks cube-single-play --name small -- --num-updates 20000 --seeds 1 2

Flags after -- go to every algorithm that has them. A new run is started, an interrupted one resumed, a finished one
skipped: the same command goes on wherever it was stopped. Ctrl-C lets the runs save.
`python scripts/report.py` with the same arguments makes tables and curves.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
from typing import Literal, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # this checkout, whatever else is installed

import filelock
import jax
import tyro

import adroit
import common
from run import identity, read_args, read_record, read_rows

jax.config.update("jax_platforms", "cpu")  # in this process alone: the GPUs are the runs'

SEEDS = {"8": "111 222 333 444 555 666 777 888", "4": "11 22 33 44"}  # the paper's: 4 for its ablations
NUM_SAMPLES = ("1", "2", "4", "8", "16", "32", "64", "128")  # each run of Table 4 is evaluated with all of these
EXPERIMENTS = """
table    column                algorithm  tasks    seeds  flags
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
figure6  delta=0               dmfql      ogbench  4      --delta 0
figure6  delta=0.01            dmfql      ogbench  4      --delta 0.01
figure6  delta=0.03            dmfql      ogbench  4      --delta 0.03
figure6  delta=0.1             dmfql      ogbench  4      --delta 0.1
figure6  delta=0.3             dmfql      ogbench  4      --delta 0.3
figure7  alpha=fql             dmfql      ogbench  4
figure7  alpha=1               dmfql      ogbench  4      --alpha 1
figure8  num_target_samples=4  dmfql      ogbench  4      --num-target-samples 4
figure8  num_target_samples=1  dmfql      ogbench  4      --num-target-samples 1
"""


@dataclasses.dataclass(frozen=True)
class Selection:
    targets: tyro.conf.Positional[tuple[str, ...]] = ()
    """table1 to table4, figure3, figure6, figure7, figure8 (Appendix E's curves are those of table1 and table2)"""
    tasks: tuple[str, ...] = ()
    """tasks (none: all that the table has)"""
    algos: tuple[str, ...] = ()
    """columns of the table (none: all)"""
    name: str = "paper"
    """folder below runs/ and results/"""


@dataclasses.dataclass(frozen=True)
class Args(Selection):
    cluster: Literal["local", "slurm"] = "local"
    """where: on this machine, or as jobs of SLURM, which are submitted and left alone"""
    jobs: int = 1
    """runs at a time, on this machine"""
    gpus: int | None = None
    """GPUs of each run (None: all that it sees; on SLURM, none)"""
    cpus: int = 8
    """CPU cores of each run, on SLURM"""
    hours: int = 24
    """time limit on SLURM, at which a job saves and is queued again"""
    slurm: tuple[str, ...] = ()
    """more options of sbatch, like partition=long account=me"""
    dry_run: bool = False
    """print what would run, and start nothing"""


class Cell(NamedTuple):
    """A cell of a table, and the run of algos/<algo>.py that fills it."""

    table: str
    task: str
    column: str
    algo: str
    flags: tuple[str, ...]
    args: object  # what the flags mean: the algorithm's Args, with the paper's values
    folder: pathlib.Path  # of the run; cells that the same run fills share it


def question(algo: str, args) -> dict:
    """What runs share that may stand in the same cell: all that decides their numbers, but for the seeds."""
    return identity(algo, args) | {"dataset_path": args.dataset_path, "generate_episodes": args.generate_episodes}


def expand(selection: Selection, flags: list[str]) -> list[Cell]:
    """The selected cells, with `flags` given to every algorithm that has them. Raises Error if none has one of them, if
    a table sets one itself, or if there is no such table, task or column."""
    field = lambda flag: re.sub("^--(no-)?|=.*", "", flag.replace("_", "-")).replace("-", "_")
    groups = [group.split("\0") for group in re.split("\0(?=--)", "\0".join(flags)) if group]  # each flag, its values
    given, cells = {field(words[0]): words for words in groups}, []
    unknown = {*selection.targets, *selection.tasks, *selection.algos, *given}
    for table, column, algo, kind, seeds, *own in map(str.split, EXPERIMENTS.strip().splitlines()[1:]):
        if table not in selection.targets or (selection.algos and column not in selection.algos):
            continue
        module = common.load_algo(algo)
        known = {name: words for name, words in given.items() if hasattr(module.Args, name)}
        if taken := {"env_name", "folder", "resume", *map(field, own)}.intersection(known):
            raise common.Error(f"{table} sets {', '.join(sorted(taken))} itself: leave it out after --")
        unknown -= {table, column, *known}
        for task in common.PAPER:
            family = "adroit" if task in adroit.TASKS else "ogbench"
            if kind not in ("all", family) or (selection.tasks and task not in selection.tasks):
                continue
            unknown.discard(task)
            words = ["--env-name", task, *sum(known.values(), [])]
            words += [] if "seeds" in known else ["--seeds", *SEEDS[seeds].split()]
            plain, args = (
                common.resolve(tyro.cli(module.Args, args=words + more), common.load_task(task), module.PAPER)
                for more in ([], own)
            )
            run = algo if args == plain else f"{algo}_{'='.join(own)[2:]}"  # alike where delta=0.1 is the paper's value
            run += "_4-seeds" * (seeds == "4" and "seeds" not in known)
            folder = pathlib.Path("runs", selection.name, task, run)
            cells.append(Cell(table, task, column, algo, (*words, *own), args, folder))
    if unknown:
        raise common.Error(f"nothing that was selected has {', '.join(sorted(unknown))}: see EXPERIMENTS in {__file__}")
    return cells


def look(cell: Cell) -> tuple[str, list[str]]:
    """Where a run stands ("new", "running", "40 % done", "finished"), and the program with its arguments that brings it
    on, if any can. Raises Error if its folder holds a run with other arguments."""
    program, folder = f"algos/{cell.algo}.py", str(cell.folder)
    if not (cell.folder / "args.json").exists():
        return "new", [program, "--folder", folder, *cell.flags]
    taken = read_args(read_record(cell.folder), type(cell.args))
    taken, asked = (question(cell.algo, args) | {"seeds": list(args.seeds)} for args in (taken, cell.args))
    if others := [f"{name} {taken[name]}, not {asked[name]}" for name in asked if taken[name] != asked[name]]:
        raise common.Error(f"{folder} was run with {', '.join(others)}: choose another --name")
    try:
        common.lock(cell.folder / ".lock").release()
    except filelock.Timeout:
        return "running", []
    tenths = len(read_rows(cell.folder / "eval.csv")) // len(cell.args.seeds)  # that are evaluated for all seeds
    if tenths < 10:
        return f"{10 * tenths} % done", [program, "--resume", folder]
    evaluated = {row["num_samples"] for row in read_rows(cell.folder / "num_samples.csv")}
    if cell.table == "table4" and not evaluated.issuperset(NUM_SAMPLES):
        return "trained", ["scripts/evaluate.py", folder, "--num-samples", *NUM_SAMPLES]
    return "finished", []


class Job:
    """What a job of SLURM does: it runs this program for a single cell. submitit calls the methods."""

    def __init__(self, command: list[str]):
        self.command = command

    def __call__(self):
        self.process = subprocess.Popen(self.command)
        if code := self.process.wait():
            raise RuntimeError(f"exit code {code}: see above")

    def checkpoint(self):
        """Called when the job's time is nearly up: lets the run save, and queues the job again."""
        import submitit

        self.process.terminate()
        with contextlib.suppress(ChildProcessError):  # __call__, which this interrupts, waits as well
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Job(self.command))


def submit(cells: list[Cell], args: Args, flags: list[str]):
    """Gives SLURM a job for each cell, and leaves."""
    import submitit

    more = dict(option.partition("=")[::2] for option in args.slurm)
    more |= {"gpus_per_node": args.gpus} if args.gpus else {}
    for cell in cells:
        words = [cell.table, "--tasks", cell.task, "--algos", cell.column, "--name", args.name, "--", *flags]
        executor = submitit.AutoExecutor("runs/.jobs", cluster="slurm", slurm_max_num_timeout=10**6)
        executor.update_parameters(name=f"{cell.folder.name}-{cell.task}", slurm_additional_parameters=more)
        executor.update_parameters(timeout_min=60 * args.hours, cpus_per_task=args.cpus)
        print(f"job {executor.submit(Job([sys.executable, __file__, *words])).job_id}  {cell.folder}", flush=True)


def run_here(cells: list[Cell], jobs: int, gpus: int) -> int:
    """Brings runs to their end on this machine, `jobs` at a time, and tells of each: how many failed.

    Ctrl-C, SIGTERM and SIGHUP let them save, and end the program.
    """
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(jobs * gpus)))).split(",")
    if len(visible) < jobs * gpus:
        raise common.Error(f"--jobs {jobs} --gpus {gpus} take more GPUs than CUDA_VISIBLE_DEVICES has: lower them")
    shares = [{"CUDA_VISIBLE_DEVICES": ",".join(visible[i * gpus :][:gpus])} if gpus else {} for i in range(jobs)]
    stop = threading.Event()

    def ask_to_stop(number, frame):
        stop.set()
        print("stopping: what runs saves first, and the same command goes on", flush=True)

    def bring(cell: Cell) -> bool:
        """Brings a run to its end, and tells how it ended: whether it failed."""
        if stop.is_set():
            return False
        share, code, words, log = shares.pop(), 0, "", pathlib.Path(f"{cell.folder}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            # held so that a second reproduce.py leaves this run alone
            held = common.lock(log.with_name(f".{cell.folder.name}.lock"))
            print(f"start     {cell.folder}", flush=True)
            while not (code or stop.is_set()) and (command := look(cell)[1]):
                command = [sys.executable, common.ROOT / command[0], *command[1:]]
                with open(log, "a") as out:
                    process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | share, process_group=0)
                while (code := process.poll()) is None:
                    if stop.wait(0.2):  # a second signal would end it unsaved: hence a process group of its own
                        process.send_signal(signal.SIGINT)
                        process.wait()
            held.release()
            state, text = look(cell)[0], re.sub("[^\r\n]*(update/s|s/update)]", "", log.read_text())  # without bars
            lines = re.findall(r"score:.*" if state == "finished" else r"\S.*", text.replace("\r", "\n"))
            words = f"ended by {signal.Signals(-code).name}" if code < 0 else (lines or [str(log)])[-1]
        except filelock.Timeout:
            state = "running"
        except common.Error as error:
            state, words = "FAILED", str(error)
        shares.append(share)
        failed = state not in ("finished", "running") and not stop.is_set()
        words = "(another process trains it)" if state == "running" else words
        print(f"{'FAILED' if failed else state:10}{cell.folder}  {words}", flush=True)
        return failed

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # SIGHUP under nohup
            signal.signal(number, ask_to_stop)  # SIGINT in any case: the runs would inherit that it is ignored
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # when a job's time is up, SLURM sends it to all that runs in it
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        failed = sum(pool.map(bring, cells))
    return failed if not stop.is_set() else sys.exit(128 + signal.SIGINT)


def main(args: Args, flags: list[str]):
    """Tells what there is to run, and runs it. Raises Error if any run failed."""
    common.check_numbers(args)
    if not args.targets:
        raise common.Error("nothing is selected: name tables or figures, like table1")
    cells = sorted(expand(args, flags), key=lambda cell: cell.table == "table4")  # their runs are evaluated again
    runs = {cell.folder: (cell, *look(cell)) for cell in cells}
    todo = [cell for cell, _, command in runs.values() if command]
    if args.dry_run:
        for folder, (_, state, command) in runs.items():
            command = ["python", os.path.relpath(common.ROOT / command[0]), *command[1:]] if command else [str(folder)]
            print(f"{state:10}{shlex.join(command)}")
    print(f"{len(todo)} of {len(runs)} runs to do", flush=True)
    if args.cluster == "slurm" and not args.dry_run:
        submit(todo, args, flags)
    elif not args.dry_run and (failed := run_here(todo, args.jobs, args.gpus or 0)):
        raise common.Error(f"{failed} of {len(todo)} runs failed: their logs are beside their folders, <folder>.log")


if __name__ == "__main__":
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, args=sys.argv[1:end]), sys.argv[end + 1 :])
