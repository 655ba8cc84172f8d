"""What goes wrong around a run: seeds that diverge, trackers that fail, flags and files that nobody would give."""

import csv
import dataclasses
import errno
import os
import re
import sys
import threading
import time
import types

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TASK, assert_same, load_algo, run_cli
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_run import record_episodes

import common
import run


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# ------------------------------------------------------------------------------------------------------- divergence
def play_pen(folder, monkeypatch, poisoned=None):
    """Trains four seeds of dmfql on the pen in `folder`; after two chunks the second becomes NaN if `poisoned`. Its run
    folder."""
    algo, chunks = load_algo("dmfql"), []
    train = algo.train

    def poison(args, num_steps, dataset, states):
        states, metrics = train(args, num_steps, dataset, states)
        chunks.append(num_steps)
        if poisoned and len(chunks) == 2:
            states = jax.tree.map(lambda x: x.at[1].set(jnp.nan) if x.dtype == jnp.float32 else x, states)
        return states, metrics

    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(algo, "train", poison)
    args = algo.Args(
        env_name="pen-human-v1",
        dataset_path="../pen.hdf5",
        seeds=(1, 2, 3, 4),
        hidden_dims=(16, 16),
        batch_size=16,
        num_updates=20,
        eval_episodes=2,
        num_workers=1,
    )
    algo.main(args)
    monkeypatch.setattr(algo, "train", train)
    return next(folder.glob("runs/*/*/*"))


def test_a_seed_that_diverges_is_marked_and_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    record_episodes("pen", tmp_path / "pen.hdf5")
    healthy = play_pen(tmp_path / "healthy", monkeypatch)
    capsys.readouterr()
    poisoned = play_pen(tmp_path / "poisoned", monkeypatch, poisoned=True)
    said = capsys.readouterr().out
    assert said.count("seed 2 diverged by update 6") == 1 and "score: nan +- nan" in said
    assert "diverged, and so nan: seed 2\n" in said
    for name in ("train", "eval", "episodes"):
        before, after = rows_of(healthy / f"{name}.csv"), rows_of(poisoned / f"{name}.csv")
        assert [row for row in before if row["seed"] != "2"] == [row for row in after if row["seed"] != "2"]
        for old, new in zip(before, after):
            late = new["seed"] == "2" and int(new["step"]) >= 6
            assert old["diverged"] == "0" and new["diverged"] == str(int(late))
            if late and name != "train":
                assert new["score"] == "nan" != old["score"]
    states = [
        flax.serialization.msgpack_restore((folder / "checkpoint.msgpack").read_bytes()[32:])["states"]
        for folder in (healthy, poisoned)
    ]
    others = np.array([0, 2, 3])
    assert_same(*(jax.tree.map(lambda x: x[others], tree) for tree in states))
    load_algo("dmfql").main(load_algo("dmfql").Args(resume=str(poisoned)))  # what a resumed run knows
    said = capsys.readouterr().out
    assert "diverged by" not in said and "diverged, and so nan: seed 2\n" in said


# --------------------------------------------------------------------------------------------------------- tracking
@pytest.fixture
def start_run(dataset, tmp_path, monkeypatch):
    """Makes a Run of dmfql that has data, and no environments."""
    about = {"path": "data.npz", "source": "given", "sha256": "0" * 64, "transitions": len(dataset.obs)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "load_dataset", lambda *_: (dataset, about))
    monkeypatch.setattr(run, "Environments", lambda *_: types.SimpleNamespace(close=lambda: None))
    algo = load_algo("dmfql")
    return lambda **flags: run.Run(algo.Args(env_name=TASK, num_updates=100, **flags), "dmfql.py", algo.COLUMNS)


@pytest.mark.parametrize("how", ["not at all", "init", "init hangs", "log", "log hangs", "finish", "finish hangs"])
def test_training_does_not_wait_for_weights_and_biases(how, start_run, monkeypatch, capsys):
    """W&B fails, or never answers, at each of its calls: ten chunks are recorded at once, with one warning."""
    calls, forever = [], threading.Event()

    def call(name, **_):
        calls.append(name)
        if how == name and calls.count("log") in (0, 4):
            raise OSError("host down")
        if how == f"{name} hangs":
            forever.wait(20)
            raise OSError("timed out")

    tracker = types.SimpleNamespace(log=lambda *_, **__: call("log"), finish=lambda **_: call("finish"))
    tracker.define_metric = lambda *_, **__: None
    fake = types.SimpleNamespace(init=lambda **_: call("init") or tracker)
    if how == "finish":
        tracker.log = lambda *_, **__: None
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(run, "TRACKING_PATIENCE", 0.5)
    begun = time.monotonic()
    with start_run(track=True) as record:
        record.restore(None)
        for _ in range(10):
            record.log({"q": np.ones(1)})
        assert time.monotonic() - begun < 10
        record.record_rows("eval", 100, [{"score": 5.0}], set())
    assert time.monotonic() - begun < 10
    forever.set()
    time.sleep(0.1)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == (how != "not at all") and all("Weights & Biases" in line for line in warnings)
    assert len(rows_of(record.folder / "train.csv")) == 10 and len(rows_of(record.folder / "eval.csv")) == 1
    if how == "not at all":
        assert calls == ["init", *["log"] * 11, "finish"]


def test_a_film_that_fails_is_an_error(start_run, monkeypatch):
    monkeypatch.setattr(run, "rendering_backend", lambda: "osmesa")
    monkeypatch.setattr(run.Run, "print_score", lambda _: None)
    with pytest.raises(common.Error, match="could not be filmed"), start_run(capture_video=True):
        monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1))


# ----------------------------------------------------------------------------------------------------- command line
PATHS = [
    "",
    ".",
    "/",
    "/dev/zero",
    "/dev/full",
    "~",
    "~nobody/data",
    "\0",
    "\udcff",
    "data" * 2000,
    str(ROOT / "LICENSE"),
]
NUMBERS = st.integers() | st.integers(-10, 1000) | st.floats()
VALUES = (
    NUMBERS.map(str) | st.sampled_from(PATHS) | st.text(max_size=20) | st.sampled_from([*common.PAPER, "min", "None"])
)
FLAGS = [field.name.replace("_", "-") for field in dataclasses.fields(load_algo("dmfrebrac").Args)]


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(flags=st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(VALUES, max_size=3)), max_size=4))
@example(flags=[("dataset-path", [""])])
@example(flags=[("dataset-path", ["/"])])
@example(flags=[("resume", [""])])
def test_no_flags_give_a_traceback(flags, tmp_path, monkeypatch):
    """Whatever is given, the end is an exit with a sentence; data cannot be had here, so no run begins."""

    def unreachable(*_, **__):
        raise common.Error("no data")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(common, "download", unreachable)
    monkeypatch.setattr(common.generate, "generate", unreachable)
    algo = load_algo("dmfrebrac")
    with pytest.raises(SystemExit):
        algo.main(algo.tyro.cli(algo.Args, args=[part for name, values in flags for part in (f"--{name}", *values)]))


def test_any_bytes_are_a_files_name(tmp_path, data_path):
    """A real process, with a dataset whose name is no text; and one whose flags are none."""
    path = os.fsencode(tmp_path) + b"/\xff\n.npz"
    with open(path, "wb") as file:
        file.write(data_path.read_bytes())
    flags = ["--env-name", TASK, "--hidden-dims", 65536, 16, "--dataset-path", os.fsdecode(path)]
    code, out, err = run_cli("dmfql", *flags, "--batch-size", 10**8, cwd=tmp_path)
    assert code == 1 and "Traceback" not in err and "error: too little memory" in err, (out, err)
    code, out, err = run_cli("dmfql", "--env-name", "\udcff", cwd=tmp_path)
    assert code == 1 and out == "" and err.startswith("error: there is no task") and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ files
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.msgpack"
    run.write_file(path, b"first")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(common.Error, match=f"cannot write {path} .No space left on device.: fix that, then resume"):
        run.write_file(path, b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == [path.name]


def test_an_empty_csv_gets_its_header(tmp_path):
    """What a full disk leaves of a CSV is a file without a line."""
    path = tmp_path / "train.csv"
    path.touch()
    run.append_rows(path, [{"step": 1, "seed": 2}])
    assert path.read_text() == "step,seed\n1,2\n"


def test_a_generation_whose_process_dies_is_named(tmp_path, monkeypatch):
    def die(*_):
        raise common.concurrent.futures.process.BrokenProcessPool

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(common.generate, "generate", die)
    with pytest.raises(common.Error, match=f"cannot generate {tmp_path}.*a process died"):
        common.load_dataset(common.load_task(TASK), None, 1)


def test_no_file_can_run_code():
    """Nothing here unpickles, evaluates or hands to a shell what it reads."""
    dangerous = r"\b(pickle|marshal|shelve|eval|exec|compile|system|popen)\(|^import (pickle|marshal|shelve)|shell=True"
    dangerous += r"|allow_pickle=True|pickle\.load"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("algos/*.py")]:
        assert not re.search(dangerous, path.read_text(), re.MULTILINE), path
