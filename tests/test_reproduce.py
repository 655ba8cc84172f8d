"""reproduce.py: what a name expands to, what is skipped and resumed, and a small grid that is interrupted."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
import types

import filelock
import imageio_ffmpeg
import pytest
import tyro
from conftest import ROOT, TASK, load_algo
from test_run import record_episodes, rows_of

import common
import evaluate
import reproduce
from reproduce import Selection, expand, state_of
from run import Run, append_rows


def test_the_tables_are_the_papers():
    """Each cell that the paper prints is asked for, and no other, but for IFQL as it took it over (ifql*)."""
    cells = expand(Selection(("table1", "table2")), [])
    with open(ROOT / "results" / "paper.csv") as file:
        printed = {(row["table"], row["task"], row["column"].rstrip("*")) for row in csv.DictReader(file)}
    asked = {cell[:3] for cell in cells}
    assert asked == {key for key in printed if key[0] in ("table1", "table2")}
    assert len(asked) == len(cells) == 216


def test_seeds_and_values_are_the_papers():
    args = {cell[:3]: json.loads(cell.run.args) for cell in expand(Selection(("table2", "figure6", "table4")), [])}
    table, figure = args["table2", "scene-play", "dmfql"], args["figure6", "scene-play", "delta=0.3"]
    assert table["seeds"] == [111, 222, 333, 444, 555, 666, 777, 888] and figure["seeds"] == [11, 22, 33, 44]
    assert (table["delta"], figure["delta"], table["num_updates"], table["alpha"]) == (0.1, 0.3, 1_000_000, 300)
    assert args["table2", "pen-human-v1", "rebrac_gauss"]["tanh"] is False
    assert {cell.run.num_samples for cell in expand(Selection(("table4",)), [])} == {(1, 2, 4, 8, 16, 32, 64, 128)}
    assert "num_workers" not in table and "resume" not in table  # they change no number


def test_flags_go_to_the_algorithms_that_have_them():
    flags = ["--num-updates", "20", "--num-target-samples", "1", "--hidden-dims", "16", "16", "--seeds", "7"]
    cells = expand(Selection(("table1", "table2"), ("scene-play",), ("difql", "dmfql")), flags)
    difql, dmfql = (json.loads(cell.run.args) for cell in cells)
    assert difql["num_updates"] == dmfql["num_updates"] == 20 and difql["hidden_dims"] == [16, 16]
    assert dmfql["num_target_samples"] == 1 and "num_target_samples" not in difql
    assert difql["seeds"] == [7]


def test_a_run_that_two_figures_share_is_one():
    cells = expand(Selection(("figure6", "figure7", "figure8"), ("cube-single-play",)), [])
    runs = {(cell.run.algo, cell.run.args) for cell in cells}
    assert len(cells) == 7 and len(runs) == 5  # delta 0.03, the alpha of FQL and 4 target samples are the paper's


@pytest.mark.parametrize(
    "selection, flags, sentence",
    [
        (Selection(("table1",), ("scene-pley",)), [], "nothing that was selected has scene-pley"),
        (Selection(("table1",), (TASK,), ("dmfql",)), [], "nothing that was selected has dmfql: its columns are iql"),
        (Selection(("table4",), ("pen-human-v1",)), [], "nothing that was selected has pen-human-v1"),
        (Selection(("table1",)), ["--num-target-samples", "1"], "has num_target_samples"),
        (Selection(("table1",)), ["20000"], "'20000'"),
        (Selection(("figure6",)), ["--delta", "0.2"], "figure6 sets delta itself"),
        (Selection(("figure6",)), ["--delta=0.2"], "figure6 sets delta itself"),
        (Selection(("figure8",)), ["--num_target_samples", "2"], "figure8 sets num_target_samples itself"),
        (Selection(("table1",)), ["--no-tanh"], "table1 sets tanh itself"),
        (Selection(("table2",)), ["--env-name", "cube-single-play"], "table2 sets env_name itself"),
        (Selection(("table2",)), ["--resume", "runs/x"], "table2 sets resume itself"),
        (Selection(("table2",)), ["--num-updates", "15"], "give a multiple of 10"),
    ],
)
def test_what_cannot_be_meant_is_refused(selection, flags, sentence):
    with pytest.raises(common.Error, match=sentence):
        expand(selection, flags)


@pytest.mark.parametrize(
    "args, sentence",
    [
        (reproduce.Args(()), "nothing is selected"),
        (reproduce.Args(("table1",), jobs=-1), "--jobs -1 is impossible"),
        (reproduce.Args(("table1",), gpus=0), "--gpus 0 is impossible"),
        (reproduce.Args(("table1",), hours=0), "--hours 0 is impossible"),
    ],
)
def test_what_cannot_be_started_is_refused(args, sentence):
    with pytest.raises(common.Error, match=sentence):
        reproduce.main(args, [])


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "there is nothing to do"),
        (["--num-samples", "0"], "--num-samples 0 is impossible"),
        (["--num-samples", "1", "--num-workers", "-1"], "--num-workers -1 is impossible"),
        (["--num-samples", "1"], "is not finished"),
    ],
)
def test_what_cannot_be_evaluated_again_is_refused(flags, sentence, tmp_path):
    args = {"env_name": TASK, "seeds": [1], "num_updates": 20}
    record = {"algo": "mfql", "args": args, "data": {"sha256": "0"}, "device": "", "versions": {}}
    (tmp_path / "args.json").write_text(json.dumps(record))
    with pytest.raises(common.Error, match=sentence):
        evaluate.main(tyro.cli(evaluate.Args, args=[str(tmp_path), *flags]))


def test_where_a_run_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cell,) = expand(Selection(("table4",), (TASK,)), ["--num-updates", "20", "--seeds", "1", "2"])
    run, args = cell.run, json.loads(cell.run.args)

    def write(name, tenths, **changes):
        folder = tmp_path / "runs" / TASK / "mfql" / name
        folder.mkdir(parents=True)
        record = {"args": args | {"num_workers": 3, "track": True} | changes}
        (folder / "args.json").write_text(json.dumps(record))
        for step in range(2, 2 * tenths + 1, 2):
            append_rows(folder / "eval.csv", [{"step": step, "seed": seed, "score": 0} for seed in (1, 2)])
        return folder

    assert state_of(run) == "new"
    write("other-seeds", 10, seeds=[1])
    write("other-task", 10, num_samples=3)
    (write("broken", 0) / "args.json").write_text("{")
    assert state_of(run) == "new"
    write("begun", 3)
    further = write("further", 7)
    append_rows(further / "eval.csv", [{"step": 16, "seed": 1, "score": 0}])  # an evaluation that is not whole
    assert state_of(run) == "cut off at 70 %" and reproduce.find_folder(run)[0].name == "further"
    with filelock.FileLock(further / ".lock"):
        assert state_of(run) == "running"
    append_rows(further / "eval.csv", [{"step": 16, "seed": 2, "score": 0}])
    for step in (18, 20):
        append_rows(further / "eval.csv", [{"step": step, "seed": seed, "score": 0} for seed in (1, 2)])
    assert state_of(run._replace(num_samples=())) == "finished"
    assert state_of(run) == "cut off at 100 %"  # Table 4's evaluations are missing
    for n in run.num_samples:
        append_rows(
            further / "num_samples.csv", [{"step": 20, "seed": s, "num_samples": n, "score": 0} for s in (1, 2)]
        )
    assert state_of(run) == "finished"


@pytest.mark.parametrize("state, fails", [("finished", False), ("running", False), ("cut off at 30 %", True)])
def test_a_run_fails_unless_it_is_finished_or_another_process_has_it(state, fails, monkeypatch):
    (cell,) = expand(Selection(("table4",), (TASK,)), [])
    job = types.SimpleNamespace(done=lambda: True, stdout=str, stderr=str, paths=types.SimpleNamespace(stdout="log"))
    monkeypatch.setattr(reproduce, "submit", lambda *_: job)
    monkeypatch.setattr(reproduce, "state_of", lambda _: state)
    mask, handler = signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGTERM)
    try:
        assert reproduce.launch([cell.run], reproduce.Args(("table4",))) == ([cell.run] if fails else [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run in a grid of two, one of which cannot be: it was interrupted and resumed."""
    cwd = tmp_path_factory.mktemp("grid")
    record_episodes("pen", cwd / "pen.hdf5")
    command = [sys.executable, ROOT / "reproduce.py", "table2", "--tasks", "door-expert-v1", "pen-expert-v1"]
    command += ["--algos", "mfql", "--", "--dataset-path", "pen.hdf5", "--num-updates", 5000, "--eval-episodes", 2]
    command += ["--hidden-dims", 16, 16, "--batch-size", 16, "--seeds", 5, 6, "--num-workers", 1]
    start = lambda: subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=-1, stderr=-1, text=True)
    process = start()
    while not (evals := list(cwd.glob("runs/pen-expert-v1/mfql/*/eval.csv"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopped at update" in out, (out, err)
    assert 2 <= len(rows_of(evals[0])) < 20
    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and err == "error: 1 of 2 runs failed: their logs are in runs/.jobs\n"
    assert "cut off at" in out and "FAILED           mfql --env-name door-expert-v1" in out
    assert f"error: {cwd}/pen.hdf5 is not D4RL's door data" in out and "name another file by --dataset-path" in out
    assert "finished         mfql --env-name pen-expert-v1" in out
    command.insert(2, "--dry-run")
    out, _ = start().communicate(timeout=300)
    assert out.startswith("finished ") and "\nnew " in out and "1 of 2 runs to do" in out
    (folder,) = cwd.glob("runs/pen-expert-v1/mfql/*")
    return folder


def test_policies_played_again_score_what_they_scored(folder):
    last = rows_of(folder / "eval.csv")[-2:]
    for _ in range(2):  # the second time all of it is there: nothing is added
        evaluate.main(evaluate.Args(folder, num_samples=(1, 32)))  # the paper acts by 32 on pen-expert
    again = rows_of(folder / "num_samples.csv")
    assert [(row["num_samples"], row["seed"]) for row in again] == [("1", "5"), ("1", "6"), ("32", "5"), ("32", "6")]
    assert [row["score"] for row in again[2:]] == [row["score"] for row in last] != [row["score"] for row in again[:2]]


def test_a_film_shows_the_episodes_of_the_last_evaluation(folder):
    try:
        common.rendering_backend()
    except common.Error:
        pytest.skip("nothing here can draw")
    command = [sys.executable, ROOT / "evaluate.py", folder, "--capture-video"]
    out = subprocess.run(command, capture_output=True, text=True).stdout
    scores = [float(row["score"]) for row in rows_of(folder / "episodes.csv")[-4:] if row["seed"] == "5"]
    assert re.findall(r"episode-(\d).mp4: score (.*)", out) == [(str(i), f"{s:.1f}") for i, s in enumerate(scores)]
    for episode in range(2):
        frames, _ = imageio_ffmpeg.count_frames_and_secs(folder / f"episode-{episode}.mp4")
        assert 2 <= frames <= 101  # a state more than steps


def test_without_opengl_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "none")
    with pytest.raises(common.Error, match="nothing here can draw for --capture-video by MUJOCO_GL=none: install OS"):
        Run(load_algo("dmfql").Args(env_name=TASK, capture_video=True), "dmfql.py", ("ql",))
    assert not list(tmp_path.glob("runs/*/*/*"))
