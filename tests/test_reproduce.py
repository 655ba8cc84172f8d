"""reproduce.py: what a table expands to, where its runs stand, how they are run, and a small grid."""

import dataclasses
import json
import re
import signal
import subprocess
import sys

import filelock
import imageio_ffmpeg
import pandas as pd
import pytest
import reproduce
from conftest import ROOT, TASK
from reproduce import Selection, expand, progress

import common
from run import append_rows, read_rows

EIGHT, FOUR = ("table1", "table2", "table3", "figure3"), ("table4", "figure6", "figure7", "figure8")


def test_tables_expand_to_the_papers_runs():
    cells = expand(Selection(EIGHT + FOUR), [])
    printed = pd.read_csv(ROOT / "results" / "paper.csv")  # ifql* is what the paper took over
    printed = {(row.table, row.task, row.column.rstrip("*")) for row in printed.itertuples() if row.table != "table3"}
    asked = {cell[:3] for cell in cells if cell.table in ("table1", "table2")}
    tasks = {cell.task for cell in cells if cell.table == "table4"}
    asked |= {("table4", task, f"num_samples={n}") for task in tasks for n in reproduce.NUM_SAMPLES}
    assert {cell for cell in asked if cell[2] in {column for _, _, column in printed}} == printed
    seeds = {(table, (111, 222, 333, 444, 555, 666, 777, 888)) for table in EIGHT}
    assert {(cell.table, cell.args.seeds) for cell in cells} == seeds | {(table, (11, 22, 33, 44)) for table in FOUR}
    assert {cell.args.tanh for cell in cells if cell.column == "rebrac_gauss"} == {False}
    for cell in cells:
        if "=" in cell.column:  # figures 6 to 8: each column says its flag by its name
            flag, _, value = cell.column.partition("=")
            assert getattr(cell.args, flag) == (common.PAPER[cell.task]["alpha"] if value == "fql" else float(value))


def test_flags_go_to_every_algorithm_that_has_them_or_are_refused():
    flags = ["--num-updates=20", "--num-target-samples", "2", "--hidden-dims", "16", "16", "--seeds", "7"]
    selection = Selection(("table1", "table2"), ("scene-play",), ("difql", "dmfql"))
    difql, dmfql = (cell.args for cell in expand(selection, flags))
    assert difql.num_updates == dmfql.num_updates == 20 and difql.hidden_dims == (16, 16) and difql.seeds == (7,)
    assert dmfql.num_target_samples == 2 and not hasattr(difql, "num_target_samples")
    for table, flag in (("figure8", "num_target_samples"), ("table1", "no-tanh"), ("table2", "env-name")):
        with pytest.raises(common.Error, match=f"{table} sets (num_target_samples|tanh|env_name) itself"):
            expand(Selection((table,)), [f"--{flag}=2"])
    for selection, flags, sentence in (
        (Selection(("tabel1",), (TASK,)), [], "no table tabel1: there are table1 table2 "),
        (Selection(("table2",), ("cube-single",)), [], "no task cube-single: there are .* cube-single-play "),
        (Selection(("table1",), (TASK,), ("mfql",)), [], "no column in table1 mfql: there are iql_tanh iql diql "),
        (Selection(("table1",), (TASK,)), ["--num-update"], "no flag num_update: there are .*num_updates"),
        (Selection(("table3",), ("pen-human-v1",)), [], "no cell is selected"),
    ):
        with pytest.raises(common.Error, match=sentence):
            expand(selection, flags)


def test_cells_share_a_folder_where_the_same_run_fills_them():
    for flags in ([], ["--seeds", "1", "2"]):
        cells = expand(Selection(EIGHT + FOUR, ("scene-play", TASK)), flags)
        run = lambda cell: (json.dumps(reproduce.identity(cell.algo, cell.args)), cell.args.seeds)
        runs, folders = {run(cell) for cell in cells}, {cell.folder for cell in cells}
        assert len({(run(cell), cell.folder) for cell in cells}) == len(runs) == len(folders) < len(cells)


def test_where_a_run_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cell,) = expand(Selection(("table4",), (TASK,)), ["--num-updates", "20", "--seeds", "1", "2"])
    assert progress(cell) == ("new", [f"{ROOT}/algos/mfql.py", *cell.flags, "--folder", f"runs/paper/{TASK}/mfql"])
    cell.folder.mkdir(parents=True)
    for changes in ({"seeds": (1,)}, {"num_samples": 3}, {"generate_episodes": 4}, {"num_workers": 3}):
        record = {"algo": "mfql", "args": dataclasses.asdict(cell.args) | changes, "data": {}}
        (cell.folder / "args.json").write_text(json.dumps(record))
        if "num_workers" not in changes:  # which changes no number
            with pytest.raises(common.Error, match="other arguments than these: choose another --name"):
                progress(cell)
    scores = [{"step": step, "seed": seed, "score": 0} for step in range(2, 22, 2) for seed in (1, 2)]
    append_rows(cell.folder / "eval.csv", scores[:15])
    assert progress(cell) == ("70 % done", [f"{ROOT}/algos/mfql.py", "--resume", str(cell.folder)])
    held = filelock.FileLock(cell.folder / ".lock")
    held.acquire()
    assert progress(cell) == ("running", [])
    held.release()
    append_rows(cell.folder / "eval.csv", scores[15:])
    assert progress(cell)[0] == "100 % done"  # and its last checkpoint not there yet
    (cell.folder / "args.json").write_text(json.dumps(record | {"finished": True}))
    assert progress(cell._replace(table="table2")) == ("finished", [])
    assert progress(cell)[1][:2] == [f"{ROOT}/scripts/evaluate.py", str(cell.folder)]
    append_rows(cell.folder / "num_samples.csv", [scores[-1] | {"num_samples": n} for n in reproduce.NUM_SAMPLES])
    assert progress(cell) == ("finished", [])


PROGRAM = """
import os, pathlib, signal, sys, time

signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped at update 7"))
os.kill(os.getpid(), signal.SIGUSR2)  # as SLURM does at the time limit
name = pathlib.Path(sys.argv[1])
name.touch()
if name.name == "killer":
    os.kill(os.getppid(), signal.SIGTERM)  # to reproduce.py, which sends SIGINT back
    time.sleep(5)  # signal.pause() would not see a signal that came before it
sys.exit(None if name.name == "run0" else "error: no")
"""


def test_a_grid_goes_on_after_a_failure_and_a_signal_lets_its_run_save(tmp_path, monkeypatch, capfd):
    (tmp_path / "program.py").write_text(PROGRAM)
    ends = {"run0": "finished", "lost": "running", "late": "finished"}  # the last two by another, faster reproduce.py

    def progress(cell):
        state = ends.get(cell.folder.name, "0 % done") if cell.folder.exists() else "new"
        return state, [] if state in ends.values() else [tmp_path / "program.py", cell.folder]

    monkeypatch.setattr(reproduce, "progress", progress)
    names = ("run1", "lost", "late", "run0", "killer", "run2")
    cells = [reproduce.Cell(*[None] * 6, folder=tmp_path / name) for name in names]
    with pytest.raises(common.Error, match=f"1 of 4 runs failed, see above: {tmp_path}/run1 .exit code 1.$"):
        reproduce.run_here(cells[:4])
    with pytest.raises(SystemExit, match="130"):
        reproduce.run_here(cells[4:])
    assert capfd.readouterr().err == 3 * "error: no\n" + "stopped at update 7\n"
    assert {path.name for path in tmp_path.iterdir()} == {"program.py", "run0", "run1", "lost", "late", "killer"}


def test_slurm_gets_a_job_for_a_run_with_its_limits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limits = dict(cluster="slurm", gpus=1, hours=3, slurm=("partition=long", "exclusive"))
    asked = reproduce.Args(("table2",), (TASK,), ("mfql",), **limits)
    with monkeypatch.context() as patch, pytest.raises(common.Error, match="no SLURM on this machine .srun is not fou"):
        patch.setenv("PATH", str(tmp_path))
        reproduce.main(asked, [])
    for program in ("sbatch", "srun"):
        (tmp_path / program).write_text("#!/bin/sh\necho Submitted batch job 7\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    reproduce.main(asked, [])
    script = (tmp_path / "runs" / ".jobs" / "7_submission.sh").read_text()
    options = "time=180 signal=USR2@600 cpus-per-task=8 gpus-per-node=1 partition=long exclusive".split()
    for option in (f"job-name=mfql-{TASK}", *options):
        assert f"#SBATCH --{option}\n" in script


def test_a_job_of_slurm_saves_and_is_queued_again_when_its_time_is_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(open('saved', 'w').close())); "
    code += "os.kill(os.getppid(), signal.SIGUSR2); time.sleep(5)"
    job, command, queued = reproduce.Job(), [sys.executable, "-c", code], []
    signal.signal(signal.SIGUSR2, lambda *_: queued.append(job.checkpoint(command)))  # as submitit does
    with pytest.raises(ChildProcessError):  # submitit ends the job before it waits again
        job(command)
    assert (tmp_path / "saved").exists() and queued[0].function is job and queued[0].args == (command,)


@pytest.mark.slow
def test_a_grid_from_end_to_end(tmp_path):
    """One run can be, one cannot. The first is filmed: its last evaluation again."""

    def start(script, *words):
        command = [sys.executable, ROOT / "scripts" / script, *words]
        return subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)

    grid = ["table2", "--algos", "mfql", "--tasks", TASK, "antmaze-large-navigate", "--", "--generate-episodes", 3]
    grid += ["--num-updates", 20, "--eval-episodes", 1, "--hidden-dims", 8, 8, "--num-workers", 1, "--seeds", 5, 6]
    done = start("reproduce.py", *grid)
    sentence = "error: 1 of 2 runs failed, see above: runs/paper/antmaze-large-navigate/mfql (exit code 1)\n"
    assert done.returncode == 1 and done.stderr.endswith(sentence), done
    assert done.stdout.startswith("2 of 2 runs to do\nmfql on ") and "\nscore: " in done.stdout
    assert "\nerror: antmaze-large-navigate cannot be generated" in done.stderr
    out = start("reproduce.py", "--dry-run", *grid).stdout
    assert out.startswith("1 of 2 runs to do") and "\nfinished " in out and "\nnew " in out
    folder = tmp_path / "runs" / "paper" / TASK / "mfql"
    try:
        common.rendering_backend()
    except common.Error:
        pytest.skip("nothing here can draw")
    out = start("evaluate.py", folder, "--capture-video").stdout
    (score,) = [float(row["score"]) for row in read_rows(folder / "episodes.csv")[-2:] if row["seed"] == "5"]
    assert re.findall(r"episode-0.mp4: score (.*)", out) == [f"{score:.1f}"]
    assert 2 <= imageio_ffmpeg.count_frames_and_secs(folder / "episode-0.mp4")[0] <= 201  # a state more than steps
