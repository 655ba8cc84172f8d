"""reproduce.py: what a table expands to, where its runs stand, how they are run, and a small grid."""

import dataclasses
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time

import imageio_ffmpeg
import pandas as pd
import pytest
import reproduce
from conftest import ROOT, TASK
from reproduce import Selection, expand, look

import common
from run import append_rows, read_rows, rendering_backend


def test_the_tables_are_the_papers():
    """Each cell that the paper prints is asked for, and of its columns no other, but for IFQL as it took it over
    (ifql*). A column of your own may stand beside them."""
    cells = expand(Selection(("table1", "table2", "table4")), [])
    printed = pd.read_csv(ROOT / "results" / "paper.csv")
    printed = {(row.table, row.task, row.column.rstrip("*")) for row in printed.itertuples() if row.table != "table3"}
    asked = {cell[:3] for cell in cells if cell.table != "table4"}
    columns = [f"num_samples={n}" for n in reproduce.NUM_SAMPLES]
    asked |= {("table4", cell.task, column) for cell in cells if cell.table == "table4" for column in columns}
    assert {cell for cell in asked if cell[2] in {column for _, _, column in printed}} == printed


def test_seeds_and_values_are_the_papers_or_those_of_the_flags():
    eight, four = ("table1", "table2", "table3", "figure3"), ("table4", "figure6", "figure7", "figure8")
    cells = expand(Selection((*eight, *four)), [])
    asked = {(table, (111, 222, 333, 444, 555, 666, 777, 888)) for table in eight}
    assert {(cell.table, cell.args.seeds) for cell in cells} == asked | {(table, (11, 22, 33, 44)) for table in four}
    args = {cell[:3]: cell.args for cell in cells}
    table, figure = args["table2", "scene-play", "dmfql"], args["figure6", "scene-play", "delta=0.3"]
    assert (table.delta, figure.delta, table.num_updates, table.alpha) == (0.1, 0.3, 1_000_000, 300)
    assert args["table2", "pen-human-v1", "rebrac_gauss"].tanh is False
    flags = ["--num-updates=20", "--num-target-samples", "1", "--hidden-dims", "16", "16", "--seeds", "7"]
    difql, dmfql = (c.args for c in expand(Selection(("table1", "table2"), ("scene-play",), ("difql", "dmfql")), flags))
    assert difql.num_updates == dmfql.num_updates == 20 and difql.hidden_dims == (16, 16) and difql.seeds == (7,)
    assert dmfql.num_target_samples == 1 and not hasattr(difql, "num_target_samples")


def test_cells_share_a_folder_if_the_same_run_fills_them_and_only_then():
    targets = ("table1", "table2", "table3", "table4", "figure3", "figure6", "figure7", "figure8")
    for flags in ([], ["--seeds", "1", "2"]):
        cells = expand(Selection(targets, ("scene-play", TASK)), flags)
        run = lambda cell: (json.dumps(reproduce.question(cell.algo, cell.args)), cell.args.seeds)
        runs, folders = {run(cell) for cell in cells}, {cell.folder for cell in cells}
        assert len({(run(cell), cell.folder) for cell in cells}) == len(runs) == len(folders) < len(cells)
    names = {cell.folder.name for cell in expand(Selection(("figure6", "table1"), ("scene-play",)), [])}
    assert {"dmfql_delta=0.03_4-seeds", "dmfql_4-seeds", "difql"} < names  # delta 0.1 is the paper's


@pytest.mark.parametrize(
    "words, flags, sentence",
    [
        ("tabel1", "", "nothing that was selected has tabel1"),
        ("table1 scene-pley", "", "nothing that was selected has scene-pley"),
        ("table1 cube-single-play dmfql", "", "nothing that was selected has .*dmfql"),
        ("table4 pen-human-v1", "", "nothing that was selected has pen-human-v1"),
        ("table1", "--num-target-samples 1", "has num_target_samples"),
        ("table1", "20000", "has 20000"),
        ("figure8", "--num_target_samples=2", "figure8 sets num_target_samples itself"),
        ("table1", "--no-tanh", "table1 sets tanh itself"),
        ("table2", "--env-name cube-single-play", "table2 sets env_name itself"),
        ("table2", "--num-updates 15", "give a multiple of 10"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, flags, sentence):
    with pytest.raises(common.Error, match=sentence):
        expand(Selection(*((word,) for word in words.split())), flags.split())


def test_what_cannot_be_started_is_refused():
    for changes, sentence in (({"targets": ()}, "nothing is selected"), ({"jobs": 0}, "--jobs 0 is impossible")):
        with pytest.raises(common.Error, match=sentence):
            reproduce.main(dataclasses.replace(reproduce.Args(("table1",)), **changes), [])


def test_where_a_run_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cell,) = expand(Selection(("table4",), (TASK,)), ["--num-updates", "20", "--seeds", "1", "2"])
    assert look(cell) == ("new", ["algos/mfql.py", "--folder", f"runs/paper/{TASK}/mfql", *cell.flags])
    record = {"algo": "mfql", "data": {"sha256": "0"}, "commit": "c", "versions": {}}
    cell.folder.mkdir(parents=True)

    def write(**changes):
        args = dataclasses.asdict(dataclasses.replace(cell.args, **changes))
        (cell.folder / "args.json").write_text(json.dumps(record | {"args": args}))

    def score(*steps, file="eval.csv", **more):
        for step, seed in itertools.product(steps, (1, 2)):
            append_rows(cell.folder / file, [{"step": step, "seed": seed, "score": 0} | more])

    for changes in ({"seeds": (1,)}, {"num_samples": 3}, {"generate_episodes": 4}):
        write(**changes)
        with pytest.raises(common.Error, match="was run with .*: choose another --name"):
            look(cell)
    write(num_workers=3, track=True)  # which changes no number
    score(*range(2, 16, 2))
    assert look(cell) == ("70 % done", ["algos/mfql.py", "--resume", str(cell.folder)])
    held = common.lock(cell.folder / ".lock")
    assert look(cell) == ("running", [])
    held.release()
    score(16, 18, 20)
    assert look(cell._replace(table="table2")) == ("finished", [])
    assert look(cell)[1][:2] == ["scripts/evaluate.py", str(cell.folder)]
    for n in reproduce.NUM_SAMPLES:
        score(20, file="num_samples.csv", num_samples=n)
    assert look(cell) == ("finished", [])


PROGRAM = """
import os, pathlib, signal, sys, time

signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped at update 7"))
os.kill(os.getpid(), signal.SIGUSR2)  # as SLURM does at the time limit
pathlib.Path(sys.argv[1]).touch()
if sys.argv[1] == "run3":
    os.kill(os.getppid(), signal.SIGTERM)  # to reproduce.py, which sends SIGINT back
    signal.pause()
while len(list(pathlib.Path().glob("run?"))) < 2:
    time.sleep(0.01)
print("score:", os.environ["CUDA_VISIBLE_DEVICES"])
sys.exit("error: no" if sys.argv[1] == "run2" else 0)
"""


@pytest.fixture
def run_fakes(tmp_path, monkeypatch, capsys):
    """Brings runs of PROGRAM to their end, two at a time on GPUs 4 to 7: how many failed, and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    (tmp_path / "program.py").write_text(PROGRAM)
    stand = lambda cell: "finished" if cell.folder.exists() and cell.folder.name in ("run0", "run1") else "0 % done"
    command = lambda cell: [] if stand(cell) == "finished" else [str(tmp_path / "program.py"), cell.folder.name]
    monkeypatch.setattr(reproduce, "look", lambda cell: (stand(cell), command(cell)))
    cell = lambda i: reproduce.Cell("", "", "", "", (), None, tmp_path / f"run{i}")
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield lambda *which: (reproduce.run_here([cell(i) for i in which], jobs=2, gpus=2), capsys.readouterr().out)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_runs_at_a_time_share_the_gpus_and_one_that_fails_leaves_the_others(run_fakes):
    failed, out = run_fakes(0, 1, 2)
    assert failed == 1 and {*re.findall("finished  .*run[01]  score: (.*)", out)} == {"4,5", "6,7"}
    assert re.search("FAILED    .*run2  error: no", out)
    with pytest.raises(common.Error, match="more GPUs than CUDA_VISIBLE_DEVICES has"):
        reproduce.run_here([], jobs=3, gpus=2)


def test_signals_let_runs_save(run_fakes, tmp_path, capsys):
    with pytest.raises(SystemExit, match="130"):
        run_fakes(3)
    assert re.search("stopping: .*\n0 % done  .*run3  stopped at update 7\n", capsys.readouterr().out)


def test_a_run_of_another_reproduce_is_left_alone(run_fakes, tmp_path):
    held = common.lock(tmp_path / ".run0.lock")
    assert run_fakes(0) == (0, f"running   {tmp_path}/run0  (another process trains it)\n")
    held.release()


def test_a_job_of_slurm_saves_and_is_queued_again_when_its_time_is_up(tmp_path):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    code = "import pathlib, signal, sys, time\n"
    code += f"def save(*_): pathlib.Path({str(saved)!r}).touch(); sys.exit(3)\n"
    code += f"signal.signal(signal.SIGTERM, save); pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    job = reproduce.Job([sys.executable, "-c", code])
    threading.Thread(target=lambda: pytest.raises(RuntimeError, job)).start()
    while not ready.exists():
        time.sleep(0.01)
    assert job.checkpoint().function.command == job.command and saved.exists()


@pytest.mark.slow
def test_a_grid_from_end_to_end(home, tmp_path):
    """One run can be, one cannot. The first is filmed: its last evaluation again."""

    def start(script, *words):
        command = [sys.executable, ROOT / "scripts" / script, *words]
        return subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)

    grid = ["table2", "--algos", "mfql", "--tasks", TASK, "antmaze-large-navigate", "--", "--generate-episodes", 4]
    grid += ["--num-updates", 20, "--eval-episodes", 1, "--hidden-dims", 8, 8, "--num-workers", 1, "--seeds", 5, 6]
    done = start("reproduce.py", *grid)
    assert done.returncode == 1 and done.stderr.startswith("error: 1 of 2 runs failed"), done
    assert f"finished  runs/paper/{TASK}/mfql  score: " in done.stdout
    assert "FAILED    runs/paper/antmaze-large-navigate/mfql  error: " in done.stdout
    out = start("reproduce.py", "--dry-run", *grid).stdout
    assert "\nfinished " in out and out.startswith("new ") and "1 of 2 runs to do" in out
    try:
        rendering_backend()
    except common.Error:
        pytest.skip("nothing here can draw")
    folder = tmp_path / "runs" / "paper" / TASK / "mfql"
    out = start("evaluate.py", folder, "--capture-video").stdout
    (score,) = [float(row["score"]) for row in read_rows(folder / "episodes.csv")[-2:] if row["seed"] == "5"]
    assert re.findall(r"episode-0.mp4: score (.*)", out) == [f"{score:.1f}"]
    assert 2 <= imageio_ffmpeg.count_frames_and_secs(folder / "episode-0.mp4")[0] <= 201  # a state more than steps
