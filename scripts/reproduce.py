"""Runs the paper's tables and figures: one folder per run, runs/<name>/<task>/<run>/.

    python scripts/reproduce.py table2 --tasks scene-play --algos mfrebrac dmfrebrac --dry-run   # what would run
    python scripts/reproduce.py table1 table2 table4 figure6 --cluster slurm --gpus 1
    python scripts/reproduce.py table2 --tasks cube-single-play --name small -- --num-updates 20000 --seeds 1 2

Flags after -- go to every algorithm that has them. New runs are started, interrupted ones resumed, finished ones
skipped, and so are those that another reproduce.py has taken: start it once per GPU to use them all. On Ctrl-C a run
saves; the same command resumes it.
"""

import collections
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from typing import Literal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # this checkout, whatever else is installed

import filelock
import submitit
import tyro

import adroit
import common
from run import identity, read_rows

SEEDS = {"8": "111 222 333 444 555 666 777 888", "4": "11 22 33 44"}  # the paper's: 8, and 4 for its ablations
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
    targets: tyro.conf.Positional[tuple[str, ...]] = ()  # table1 to table4, figure3, figure6, figure7, figure8
    tasks: tuple[str, ...] = ()  # tasks (none: all tasks of the table)
    algos: tuple[str, ...] = ()  # columns of the table (none: all)
    name: str = "paper"  # folder below runs/ and results/


@dataclasses.dataclass(frozen=True)
class Args(Selection):
    cluster: Literal["local", "slurm"] = "local"  # run on this machine, or submit SLURM jobs
    gpus: int | None = None  # GPUs per run, on SLURM
    cpus: int = 8  # CPU cores per run, on SLURM
    hours: int = 24  # time limit on SLURM, at which a job saves and is queued again
    slurm: tuple[str, ...] = ()  # more options of sbatch, like partition=long exclusive
    dry_run: bool = False  # print what would run, and start nothing


# A cell of a table, and the run of algos/<algo>.py that fills it: its flags; its Args, with the paper's values; and its
# folder, which cells share if the same run fills them.
Cell = collections.namedtuple("Cell", "table task column algo flags args folder")


def expand(selection: Selection, flags: list[str]) -> list[Cell]:
    """The selected cells. `flags` go to every algorithm that has them. Raises Error if there is no such table, task or
    column, if no algorithm has one of the flags, or if a table sets it itself."""
    rows = list(map(str.split, EXPERIMENTS.strip().splitlines()[1:]))
    check("table", selection.targets, [row[0] for row in rows])
    rows = [row for row in rows if row[0] in selection.targets]
    check("task", selection.tasks, common.PAPER)
    check(f"column in {' '.join(selection.targets)}", selection.algos, [row[1] for row in rows])
    field = lambda word: word.removeprefix("--").removeprefix("no-").partition("=")[0].replace("-", "_")
    given, name, cells, there = {}, "", [], []
    for word in flags:  # {"hidden_dims": ["--hidden-dims", "16", "16"], "tanh": ["--no-tanh"]}
        if word.startswith("--"):
            name = field(word)
        given.setdefault(name, []).append(word)
    for table, column, algo, kind, seeds, *own in rows:
        if selection.algos and column not in selection.algos:
            continue
        module = common.load_algo(algo)
        if own_flags := {"env_name", "folder", "resume", *map(field, own)} & given.keys():
            raise common.Error(f"{table} sets {', '.join(sorted(own_flags))} itself: leave it out after --")
        there += module.Args.__annotations__
        known = {"seeds": ["--seeds", *SEEDS[seeds].split()]}
        known |= {name: words for name, words in given.items() if hasattr(module.Args, name)}
        for task in selection.tasks or common.PAPER:
            if kind not in ("all", "adroit" if task in adroit.TASKS else "ogbench"):
                continue
            shared = [*sum(known.values(), []), "--env-name", task]
            both = [tyro.cli(module.Args, args=words) for words in (shared, shared + own)]
            plain, args = (common.resolve(args, common.load_task(task), module.PAPER_COLUMNS) for args in both)
            run = algo if args == plain else f"{algo}_{'='.join(own)[2:]}"  # equal if delta=0.1 is the paper's value
            if seeds == "4" and "seeds" not in given:
                run += "_4-seeds"
            folder = pathlib.Path("runs", selection.name, task, run)
            cells.append(Cell(table, task, column, algo, shared + own, args, folder))
    if not cells:
        raise common.Error(f"no cell is selected: see which tables have which tasks, at EXPERIMENTS in {__file__}")
    check("flag", given, there)
    return cells


def check(kind: str, given: Collection[str], there: Collection[str]):
    """Raises Error if a given name is not there."""
    if unknown := [name for name in given if name not in there]:
        raise common.Error(f"there is no {kind} {unknown[0]}: there are {' '.join(dict.fromkeys(there))}")


def progress(cell: Cell) -> tuple[str, list[str]]:
    """The state of a run ("new", "running", "40 % done", "finished"), and the command that continues it, if any.
    Raises Error if its folder holds a run with other arguments."""
    program, folder = f"{common.ROOT}/algos/{cell.algo}.py", str(cell.folder)
    if not (cell.folder / "args.json").exists():
        return "new", [program, *cell.flags, "--folder", folder]
    record, asked = common.read_record(cell.folder), cell.args
    taken = common.read_args(record, type(asked))
    if identity(cell.algo, taken) != identity(cell.algo, asked) or taken.seeds != asked.seeds:
        raise common.Error(f"{folder}/args.json has other arguments than these: choose another --name")
    try:
        with filelock.FileLock(cell.folder / ".lock", timeout=0):
            pass
    except filelock.Timeout:
        return "running", []
    if not record.get("finished"):
        tenths = len(read_rows(cell.folder / "eval.csv")) // len(asked.seeds)  # that are evaluated for all seeds
        return f"{10 * tenths} % done", [program, "--resume", folder]
    evaluated = {row["num_samples"] for row in read_rows(cell.folder / "num_samples.csv")}
    if cell.table == "table4" and not evaluated.issuperset(NUM_SAMPLES):
        return "trained", [f"{common.ROOT}/scripts/evaluate.py", folder, "--num-samples", *NUM_SAMPLES]
    return "finished", []


class Job(submitit.helpers.Checkpointable):
    """What a SLURM job does: it runs this program for a single cell."""

    def __call__(self, command: list[str]):
        self.pid = os.posix_spawn(command[0], command, os.environ)
        if os.waitpid(self.pid, 0)[1]:
            raise RuntimeError("the run failed: see above")

    def checkpoint(self, command: list[str]):
        """Lets the run save, and queues the job again. submitit calls it when the job's time is nearly up."""
        os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)
        return super().checkpoint(command)


def submit(cells: list[Cell], args: Args, flags: list[str]):
    """Submits a SLURM job for each cell."""
    if shutil.which("srun") is None:
        raise common.Error("--cluster slurm: there is no SLURM on this machine (srun is not found): leave it out")
    executor = submitit.AutoExecutor("runs/.jobs", cluster="slurm", slurm_max_num_timeout=10**6)
    executor.update_parameters(timeout_min=60 * args.hours, cpus_per_task=args.cpus, gpus_per_node=args.gpus)
    executor.update_parameters(slurm_signal_delay_s=600)  # a chunk of updates may take minutes on a CPU
    options = {name: value or True for name, _, value in (option.partition("=") for option in args.slurm)}
    executor.update_parameters(slurm_additional_parameters=options)
    for cell in cells:
        words = [cell.table, "--tasks", cell.task, "--algos", cell.column, "--name", args.name, "--", *flags]
        executor.update_parameters(name=f"{cell.folder.name}-{cell.task}")
        print(f"job {executor.submit(Job(), [sys.executable, __file__, *words]).job_id}  {cell.folder}", flush=True)


def run_here(cells: list[Cell]):
    """Finishes one run after another on this machine. Ctrl-C, SIGTERM and SIGHUP let a run save, and end this."""
    stop, failed = [], []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda *_: stop.append(True))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # when a job's time is up, SLURM sends it to all that runs in it
    for cell in cells:
        code = 0
        while not code and not stop and (command := progress(cell)[1]):
            # In a process group of its own, it gets SIGINT from here alone (a second one would end it unsaved), and
            # must not wait for input from the terminal.
            process = subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL, process_group=0)
            while (code := process.poll()) is None:
                if stop:
                    process.send_signal(signal.SIGINT)
                    process.wait()
                time.sleep(0.2)
        if code and progress(cell)[0] not in ("running", "finished"):  # else another reproduce.py was faster
            failed.append(f"{cell.folder} (exit code {code})")
    if stop:
        sys.exit(128 + signal.SIGINT)
    if failed:
        raise common.Error(f"{len(failed)} of {len(cells)} runs failed, see above: {', '.join(failed)}")


def main(args: Args, flags: list[str]):
    """Says what there is to run, and runs it."""
    common.check_numbers(args)
    runs = {cell.folder: (cell, *progress(cell)) for cell in expand(args, flags)}
    todo = [cell for cell, _, command in runs.values() if command]
    print(f"{len(todo)} of {len(runs)} runs to do", flush=True)
    if args.dry_run:
        for folder, (_, state, command) in runs.items():
            print(f"{state:11}{folder} ", *command)
    elif args.cluster == "slurm":
        submit(todo, args, flags)
    else:
        run_here(todo)


if __name__ == "__main__":
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, args=sys.argv[1:end]), sys.argv[end + 1 :])
