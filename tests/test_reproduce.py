"""reproduce.py: what a table expands to, where its runs stand, and a small grid that is interrupted and resumed."""

import csv
import dataclasses
import json
import re
import signal
import subprocess
import sys
import threading
import time

import evaluate
import imageio_ffmpeg
import pytest
import reproduce
from conftest import ROOT, TASK
from reproduce import Selection, expand, look

import common
from run import append_rows, read_rows, rendering_backend


def test_the_tables_are_the_papers():
    """Each cell that the paper prints is asked for, and no other, but for IFQL as it took it over (ifql*)."""
    cells = expand(Selection(("table1", "table2", "table4")), [])
    with open(ROOT / "results" / "paper.csv") as file:
        printed = {(row["table"], row["task"], row["column"].rstrip("*")) for row in csv.DictReader(file)}
    asked = {cell[:3] for cell in cells}
    assert {key for key in asked if key[0] != "table4"} == {key for key in printed if key[0] in ("table1", "table2")}
    numbers = {(*key[:2], f"num_samples={n}") for key in asked if key[0] == "table4" for n in reproduce.NUM_SAMPLES}
    assert numbers == {key for key in printed if key[0] == "table4"}
    assert len(asked) == len(cells) == 225


def test_seeds_and_values_are_the_papers():
    args = {cell[:3]: cell.args for cell in expand(Selection(("table2", "figure6")), [])}
    table, figure = args["table2", "scene-play", "dmfql"], args["figure6", "scene-play", "delta=0.3"]
    assert table.seeds == (111, 222, 333, 444, 555, 666, 777, 888) and figure.seeds == (11, 22, 33, 44)
    assert (table.delta, figure.delta, table.num_updates, table.alpha) == (0.1, 0.3, 1_000_000, 300)
    assert args["table2", "pen-human-v1", "rebrac_gauss"].tanh is False


def test_flags_go_to_the_algorithms_that_have_them():
    flags = ["--num-updates", "20", "--num-target-samples", "1", "--hidden-dims", "16", "16", "--seeds", "7"]
    difql, dmfql = (c.args for c in expand(Selection(("table1", "table2"), ("scene-play",), ("difql", "dmfql")), flags))
    assert difql.num_updates == dmfql.num_updates == 20 and difql.hidden_dims == (16, 16) and difql.seeds == (7,)
    assert dmfql.num_target_samples == 1 and not hasattr(difql, "num_target_samples")


def test_cells_share_a_folder_if_the_same_run_fills_them_and_only_then():
    targets = ("table1", "table2", "table3", "table4", "figure3", "figure6", "figure7", "figure8")
    for flags in ([], ["--seeds", "1", "2"]):
        cells, runs = expand(Selection(targets, ("scene-play", TASK)), flags), {}
        for cell in cells:
            runs.setdefault((json.dumps(reproduce.question(cell.algo, cell.args)), cell.args.seeds), set()).add(
                cell.folder
            )
        folders = [folder for found in runs.values() for folder in found]
        assert len(folders) == len(set(folders)) == len(runs) < len(cells)
    names = {cell.folder.name for cell in expand(Selection(("figure6", "table1"), ("scene-play",)), [])}
    assert {"dmfql_delta=0.03_4-seeds", "dmfql_4-seeds", "difql"} < names  # delta 0.1 is the paper's


@pytest.mark.parametrize(
    "selection, flags, sentence",
    [
        (Selection(("tabel1",)), [], "nothing that was selected has tabel1"),
        (Selection(("table1",), ("scene-pley",)), [], "nothing that was selected has scene-pley"),
        (Selection(("table1",), (TASK,), ("dmfql",)), [], "nothing that was selected has .*dmfql"),
        (Selection(("table4",), ("pen-human-v1",)), [], "nothing that was selected has pen-human-v1"),
        (Selection(("table1",)), ["--num-target-samples", "1"], "has num_target_samples"),
        (Selection(("table1",)), ["20000"], "has 20000"),
        (Selection(("figure6",)), ["--delta", "0.2"], "figure6 sets delta itself"),
        (Selection(("figure8",)), ["--num_target_samples=2"], "figure8 sets num_target_samples itself"),
        (Selection(("table1",)), ["--no-tanh"], "table1 sets tanh itself"),
        (Selection(("table2",)), ["--env-name", "cube-single-play"], "table2 sets env_name itself"),
        (Selection(("table2",)), ["--num-updates", "15"], "give a multiple of 10"),
    ],
)
def test_what_cannot_be_meant_is_refused(selection, flags, sentence):
    with pytest.raises(common.Error, match=sentence):
        expand(selection, flags)


@pytest.mark.parametrize(
    "changes, sentence", [({"targets": ()}, "nothing is selected"), ({"hours": 0}, "they are positive")]
)
def test_what_cannot_be_started_is_refused(changes, sentence):
    with pytest.raises(common.Error, match=sentence):
        reproduce.main(dataclasses.replace(reproduce.Args(("table1",)), **changes), [])


def test_where_a_run_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cell,) = expand(Selection(("table4",), (TASK,)), ["--num-updates", "20", "--seeds", "1", "2"])
    assert look(cell) == ("new", ["algos/mfql.py", "--folder", f"runs/paper/{TASK}/mfql", *cell.flags])
    record = {"algo": "mfql", "data": {"sha256": "0"}, "commit": "c", "versions": {}}
    cell.folder.mkdir(parents=True)
    write = lambda **changes: (cell.folder / "args.json").write_text(
        json.dumps(record | {"args": dataclasses.asdict(dataclasses.replace(cell.args, **changes))})
    )
    for changes in ({"seeds": (1,)}, {"num_samples": 3}, {"generate_episodes": 4}):
        write(**changes)
        with pytest.raises(common.Error, match="was run with .*: choose another --name"):
            look(cell)
    write(num_workers=3, track=True)  # which changes no number
    for step in range(2, 16, 2):
        append_rows(cell.folder / "eval.csv", [{"step": step, "seed": seed, "score": 0} for seed in (1, 2)])
    append_rows(cell.folder / "eval.csv", [{"step": 16, "seed": 1, "score": 0}])  # an evaluation that is not whole
    assert look(cell) == ("70 % done", ["algos/mfql.py", "--resume", str(cell.folder)])
    held = common.lock(cell.folder / ".lock")
    assert look(cell) == ("running", [])
    held.release()
    append_rows(cell.folder / "eval.csv", [{"step": 16, "seed": 2, "score": 0}])
    for step in (18, 20):
        append_rows(cell.folder / "eval.csv", [{"step": step, "seed": seed, "score": 0} for seed in (1, 2)])
    assert look(cell._replace(table="table2")) == ("finished", [])
    assert look(cell)[1][:2] == ["scripts/evaluate.py", str(cell.folder)]
    for n in reproduce.NUM_SAMPLES:
        rows = [{"step": 20, "seed": seed, "num_samples": n, "score": 0} for seed in (1, 2)]
        append_rows(cell.folder / "num_samples.csv", rows)
    assert look(cell) == ("finished", [])


def test_runs_at_a_time_share_the_gpus_and_one_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    (tmp_path / "run.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"  # as SLURM does at the time limit
        "name = sys.argv[1]\n"
        "pathlib.Path(name).touch()\n"
        "while len(list(pathlib.Path().glob('run?'))) < 2: time.sleep(0.01)\n"
        "print('score:', os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "sys.exit('error: no' if name == 'run2' else 0)\n"
    )
    cells = [reproduce.Cell("", "", "", "", (), None, tmp_path / f"run{i}") for i in range(3)]
    stand = lambda cell: "finished" if cell.folder.exists() and cell.folder.name != "run2" else "0 % done"
    command = lambda cell: [] if stand(cell) == "finished" else [str(tmp_path / "run.py"), cell.folder.name]
    monkeypatch.setattr(reproduce, "look", lambda cell: (stand(cell), command(cell)))
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
    }
    assert reproduce.run_here(cells, jobs=2, gpus=2) == 1
    for number, handler in handlers.items():
        signal.signal(number, handler)
    out = capsys.readouterr().out
    assert {*re.findall("finished  .*run[01]  score: (.*)", out)} == {"4,5", "6,7"}
    assert re.search("FAILED    .*run2  error: no", out)
    with pytest.raises(common.Error, match="more GPUs than CUDA_VISIBLE_DEVICES has"):
        reproduce.run_here(cells, jobs=3, gpus=2)


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


@pytest.fixture(scope="module")
def folder(home, tmp_path_factory):
    """Of a run in a grid of two, one of which cannot be: it was interrupted and gone on with."""
    cwd = tmp_path_factory.mktemp("grid")
    command = [sys.executable, ROOT / "scripts" / "reproduce.py", "table2", "--algos", "mfql", "--tasks", TASK]
    command += ["antmaze-large-navigate", "--", "--generate-episodes", 4, "--num-updates", 2000, "--eval-episodes", 2]
    command += ["--hidden-dims", 16, 16, "--batch-size", 16, "--seeds", 5, 6, "--num-workers", 1]
    start = lambda: subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=-1, stderr=-1, text=True)
    folder, process = cwd / "runs" / "paper" / TASK / "mfql", start()
    while not (folder / "eval.csv").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "% done " in out and "stopped at update" in out, (out, err)
    assert 2 <= len(read_rows(folder / "eval.csv")) < 20
    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and err.startswith("error: 1 of 2 runs failed"), (out, err)
    assert f"finished  runs/paper/{TASK}/mfql  score: " in out
    assert "FAILED    runs/paper/antmaze-large-navigate/mfql  error: " in out
    command.insert(2, "--dry-run")
    out, _ = start().communicate(timeout=300)
    assert "\nfinished " in out and out.startswith("new ") and "1 of 2 runs to do" in out
    return folder


@pytest.mark.slow
def test_policies_played_again_score_what_they_scored(folder):
    for _ in range(2):  # the second time all of it is there: nothing is added
        evaluate.main(evaluate.Args(folder, num_samples=(1, 2), num_workers=1))  # the paper acts by 2 on this task
    last, again = read_rows(folder / "eval.csv")[-2:], read_rows(folder / "num_samples.csv")
    assert [(row["num_samples"], row["seed"]) for row in again] == [("1", "5"), ("1", "6"), ("2", "5"), ("2", "6")]
    assert [row["score"] for row in again[2:]] == [row["score"] for row in last]
    with pytest.raises(common.Error, match="there is nothing to do"):
        evaluate.main(evaluate.Args(folder))


@pytest.mark.slow
def test_a_film_shows_the_episodes_of_the_last_evaluation(folder):
    try:
        rendering_backend()
    except common.Error:
        pytest.skip("nothing here can draw")
    command = [sys.executable, ROOT / "scripts" / "evaluate.py", folder, "--capture-video"]
    out = subprocess.run(command, capture_output=True, text=True).stdout
    scores = [float(row["score"]) for row in read_rows(folder / "episodes.csv")[-4:] if row["seed"] == "5"]
    assert re.findall(r"episode-(\d).mp4: score (.*)", out) == [(str(i), f"{s:.1f}") for i, s in enumerate(scores)]
    for episode in range(2):
        frames, _ = imageio_ffmpeg.count_frames_and_secs(folder / f"episode-{episode}.mp4")
        assert 2 <= frames <= 201  # a state more than steps
