"""What goes wrong around a run, in this process: stops, full disks, folders, other code, seeds that diverge, flags."""

import contextlib
import errno
import importlib
import json
import os
import pickle
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import types

import evaluate
import filelock
import gymnasium
import jax
import numpy as np
import pytest
import tyro
from conftest import FILES, TASK, LocalEnvironments, load_algo, write_pendulum

import common
import run

ALGO = load_algo("dmfql")
PENDULUM = dict(env_name="Pendulum-v1", seeds=(5, 6), num_updates=5000, hidden_dims=(9,), batch_size=8, eval_episodes=2)
PENDULUM |= dict(num_samples=2, alpha=1.0, delta=0.1, folder="run")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Episodes have five steps, played in this process, and an agent is a few numbers, with nothing to compile."""
    rescale = lambda env: gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)
    init = lambda args, obs_dim, action_dim, seed: {"w": jax.random.normal(jax.random.PRNGKey(seed), args.hidden_dims)}
    train = lambda args, num_steps, dataset, states: ({"w": 1.01 * states["w"]}, {"q": states["w"].mean(axis=1)})
    act = lambda args, states, obs, keys: np.sin(obs[..., :1] * states["w"][:, :1, None] + np.asarray(keys)[..., :1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Task, "make_env", lambda _: rescale(gymnasium.make("Pendulum-v1", max_episode_steps=5)))
        patch.setattr(common, "Environments", LocalEnvironments)
        for name, function in (("init", init), ("train", train), ("act", act)):
            patch.setattr(ALGO, name, function)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("pendulum") / "data.npz"
    write_pendulum(path)
    return str(path)


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
    """The folder of a run that was never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("small"))
        ALGO.main(ALGO.Args(dataset_path=data, **PENDULUM))
        return common.pathlib.Path("run").absolute()


@pytest.fixture
def begin(data, tmp_path, monkeypatch):
    """Begins a Run in an empty folder, without an algorithm to train."""
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:

        def begin(**flags):
            args = ALGO.Args(**PENDULUM | {"dataset_path": data} | flags)
            args, task = common.prepare(args, ALGO.__file__, ALGO.PAPER_COLUMNS)
            source = common.load_dataset(task, args.dataset_path)[1]
            record = stack.enter_context(run.Run(args, ALGO.__file__, task, source))
            record.restore({"weight": np.zeros(2)})
            return record

        yield begin


@pytest.fixture
def go_on(data, small, tmp_path, monkeypatch):
    """Checks that a run in an empty folder ends by an exception, and goes on to the end of one that was never stopped
    when `mend` was called."""
    monkeypatch.chdir(tmp_path)

    def go_on(error, match, mend):
        with pytest.raises(error, match=match) as raised:
            ALGO.main(ALGO.Args(dataset_path=data, **PENDULUM))
        mend()
        assert raised.tb  # keeps the run in memory until here: it must not be the garbage collector that frees its lock
        resume("run")
        for name in FILES:
            assert (tmp_path / "run" / name).read_bytes() == (small / name).read_bytes(), name

    return go_on


def copy_of(folder, tmp_path, **changes):
    """A copy of a run's folder, with changes in its args.json."""
    shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((folder / "args.json").read_text()) | changes
    (tmp_path / "copy" / "args.json").write_text(json.dumps(record))
    return tmp_path / "copy"


def resume(folder, algo=ALGO, **flags):
    algo.main(algo.Args(resume=str(folder), **flags))


# ------------------------------------------------------------------------------------------------------------ stops
class Killed(BaseException):
    """Nothing handles it, like SIGKILL."""


@pytest.mark.parametrize("count", range(5, 41, 7))  # each of a tenth's six writes; args.json and the CSVs come first
def test_a_run_that_dies_half_way_through_a_write_goes_on_to_the_same_end(count, go_on, monkeypatch):
    writes = iter(range(1, 100))

    def half(path, mode="r"):
        file = open(path, mode)

        def write(content):
            type(file).write(file, content[: len(content) // 2])
            raise Killed

        if mode != "r" and next(writes) == count:
            file.write = write
        return file

    monkeypatch.setattr(run, "open", half, raising=False)
    go_on(Killed, None, lambda: monkeypatch.delattr(run, "open"))
    assert next(writes) == count + 1


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(go_on, monkeypatch):
    fsync, count = os.fsync, iter(range(100))

    def full(file):
        if next(count) == 7:  # args.json, the three CSVs and three checkpoints are there
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    def mend():
        assert os.listdir("run").count("checkpoint.msgpack.tmp") == 0
        assert run.read_rows(common.pathlib.Path("run/train.csv"))[-1]["step"] == "2000"

    monkeypatch.setattr(os, "fsync", full)
    go_on(
        common.Error,
        "cannot write run/checkpoint.msgpack .No space left on device.: fix that, then give the same command or",
        mend,
    )
    with pytest.raises(
        common.Error, match="cannot write run .Is a directory.: fix that, then give the same command or"
    ):
        run.append_rows(common.pathlib.Path("run"), [{"step": 1}])


STOPS = {name: (SystemExit, str(128 + getattr(signal, name))) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
STOPS["exception"] = Exception, "^error: no more$"


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize(
    "owner, where, calls, saved",  # a chunk of updates is finished, an evaluation is given up, or not begun
    [(LocalEnvironments, "step", 4, "0"), (ALGO, "train", 4, "1,250"), (ALGO, "train", 5, "1,000")],
)
def test_a_run_that_was_stopped_goes_on_in_the_same_process(
    how, owner, where, calls, saved, go_on, handlers, monkeypatch, capsys
):
    """As in a notebook whose kernel is interrupted, or a search that catches what a trial raises: nothing is held."""
    count, call = iter(range(1000)), getattr(owner, where)

    def interrupted(*args):
        if next(count) == calls:
            if how == "exception":
                raise common.Error("no more")
            os.kill(os.getpid(), getattr(signal, how))
        return call(*args)

    def mend():
        assert {number: signal.getsignal(number) for number in handlers} == handlers
        with filelock.FileLock("run/.lock", timeout=0):
            pass
        assert how == "exception" or f"stopped at update {saved}; resume it by: python " in capsys.readouterr().out

    monkeypatch.setattr(owner, where, interrupted)
    go_on(*STOPS[how], mend)


def test_a_checkpoint_is_written_every_ten_minutes(begin, monkeypatch):
    minutes, path = [0.0], common.pathlib.Path("run/checkpoint.msgpack")
    monkeypatch.setattr(run.time, "monotonic", lambda: 60 * minutes[0])
    record, saved = begin(num_updates=100), []
    for step, minutes[0] in zip(range(1, 9), (5, 9, 11, 12, 20, 22, 31, 33)):  # the first evaluation is at 10
        record.save(step, {"weight": np.zeros(2)})
        saved.append(run.read_checkpoint(path.parent, {"weight": np.zeros(2)})["step"])
    assert saved == [0, 0, 3, 3, 3, 6, 6, 8]


def test_a_run_that_shall_outlive_its_terminal_does(begin):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup does this
    begin()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_interrupt_ends_a_notebooks_cell_and_not_its_kernel(begin):
    before = signal.getsignal(signal.SIGINT)
    begin()
    os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_run_whose_terminal_is_gone_saves_all_the_same(begin, monkeypatch):
    """A connection drops, or Ctrl-C in `python ... | tee log` ends tee first: what is printed then raises."""

    class Gone:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    record, states = begin(num_updates=100), {"weight": np.zeros(2)}
    monkeypatch.setattr(sys, "stdout", Gone())
    vars(record.bar).update(fp=Gone(), sp=record.bar.status_printer(Gone()), mininterval=0)  # 2>&1
    record.log(2, {"q": np.zeros(2)})  # goes on, if it is nohup's and gets no signal
    other = threading.Thread(target=run.tell, args=("",), daemon=True)  # tqdm's is one, which exit waits for
    other.start()
    other.join(5)
    assert not other.is_alive()
    os.kill(os.getpid(), signal.SIGHUP)
    record.log(3, {"q": np.zeros(2)})
    with pytest.raises(SystemExit, match="129"):
        record.save(3, states)
    assert run.read_checkpoint(record.folder, states)["step"] == 3


# ---------------------------------------------------------------------------------------------------------- folders
def test_a_folder_is_one_runs_alone(begin, monkeypatch):
    monkeypatch.setattr(run.time, "strftime", lambda _: "now")
    first, second = begin(folder=None), begin(folder=None)  # in the same second
    assert first.folder != second.folder and first.folder.parent == second.folder.parent
    record = begin(folder="my run")
    with pytest.raises(common.Error, match="my run is in use by another process"):
        resume(record.folder)
    (record.folder / "args.json").unlink()  # without it, a run must not go on with what is left, either
    with pytest.raises(common.Error, match="my run is there already: resume it by --resume 'my run', or give anoth"):
        begin(folder="my run")
    monkeypatch.setenv("HOME", os.getcwd())
    assert begin(folder="~/other").folder == common.pathlib.Path("other").absolute()


def test_a_folder_that_is_only_looked_at_is_not_in_use(begin):
    """reproduce.py holds the lock for a moment, to see whether a run is on."""
    os.mkdir("run")
    look = filelock.FileLock("run/.lock", thread_local=False)
    look.acquire()
    threading.Timer(0.3, look.release).start()
    begin()


def test_an_error_from_another_process_is_the_same_sentence():
    assert str(pickle.loads(pickle.dumps(common.Error("no")))) == "error: no"


def test_a_folder_that_cannot_be_made_is_named(begin, tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(common.Error, match=f"cannot write {tmp_path}/runs/.*: fix that"):
        begin(folder=None)


def test_without_a_home_a_run_on_a_given_file_is_trained_all_the_same(begin, monkeypatch):
    """As in a container of a user that has no entry in /etc/passwd."""
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}[0])
    monkeypatch.delenv("HOME")
    cache = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert begin().folder.exists() and jax.config.jax_compilation_cache_dir is None  # not in a folder called ~
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)


def test_versions_are_of_what_is_imported(begin, tmp_path, monkeypatch):
    """And not of another one later on the path, as in a virtual environment with --system-site-packages."""
    (tmp_path / "jax-9.9.dist-info").mkdir()
    (tmp_path / "jax-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: jax\nVersion: 9.9\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert begin().record["versions"]["jax"] == jax.__version__


def test_a_folder_that_cannot_be_locked_is_named(begin, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(common.Error, match="cannot write run/.lock .Permission denied.: fix that"):
        begin()


def test_a_run_that_cannot_begin_holds_nothing(begin, monkeypatch):
    ended = []  # runs of Weights & Biases
    monkeypatch.setattr(
        run.Run, "start_tracking", lambda self: types.SimpleNamespace(finish=lambda **_: ended.append(1))
    )
    monkeypatch.setattr(run.Run, "print_banner", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as raised:
        begin(track=True)
    assert raised.tb and ended  # keeps the run in memory, as a notebook does
    with filelock.FileLock("run/.lock", timeout=0):
        pass


# -------------------------------------------------------------------------------------------------- resume and code
def test_resume_refuses_what_is_not_its_own(small, tmp_path):
    for folder, algo, flags, sentence in (
        (small, load_algo("mfql"), {}, "is a run of dmfql: resume it by algos/dmfql.py"),
        (small, ALGO, {"seeds": (3,)}, "takes all other flags from"),
        (tmp_path, ALGO, {}, f"{tmp_path} is no run's folder"),
    ):
        with pytest.raises(common.Error, match=sentence):
            resume(folder, algo, **flags)
    record = json.loads((small / "args.json").read_text())
    for changes, sentence in (
        ({"args": record["args"] | {"hidden_dims": [8]}}, "checkpoint.msgpack is of other code"),
        ({"args": record["args"] | {"temperature": 1}}, f"other flags than the code .*{record['commit']}"),
    ):
        folder = copy_of(small, tmp_path, **changes)
        with pytest.raises(common.Error, match=sentence.replace("+", r"\+")):
            resume(folder)
        shutil.rmtree(folder)


def test_a_run_goes_on_where_its_data_have_moved(data, begin, small, tmp_path):
    folder, moved = copy_of(small, tmp_path), tmp_path / "moved.npz"
    shutil.copy(data, moved)
    resume(folder, dataset_path=str(moved))
    record = json.loads((folder / "args.json").read_text())
    begun = json.loads((small / "args.json").read_text())
    assert record == begun | {"data": begun["data"] | {"path": str(moved)}}  # still the same run, on the same data
    flags = record["args"] | {"dataset_path": None, "generate_episodes": 3}  # data that were made here may move, too
    (folder / "args.json").write_text(json.dumps(record | {"args": flags}))
    for dataset_path in (str(moved), None):
        resume(folder, dataset_path=dataset_path)
    gone = {"data": record["data"] | {"path": str(tmp_path / "gone")}}  # as on another machine: back to its flags
    (folder / "args.json").write_text(json.dumps(record | gone))
    resume(folder)
    (folder / "args.json").write_text(json.dumps(record))
    np.savez(moved, **dict(np.load(data)) | {"extra": 0})
    with pytest.raises(common.Error, match="moved.npz is not what .* was trained on"):
        resume(folder)


def test_a_damaged_record_is_named(small, tmp_path):
    folder = copy_of(small, tmp_path)
    content = (folder / "checkpoint.msgpack").read_bytes()
    (folder / "checkpoint.msgpack").write_bytes(content[:50] + b"x" + content[51:])
    with pytest.raises(common.Error, match=f"{folder}/checkpoint.msgpack is damaged"):
        resume(folder)
    (folder / "eval.csv").write_text("step,seed,diverged,score\nx,5,0,0\n")
    with pytest.raises(common.Error, match=f"{folder}/eval.csv is damaged"):
        run.read_rows(folder / "eval.csv")


def test_rows_that_were_lost_are_in_the_checkpoint(small, tmp_path):
    """As when a machine lost power, or a file was left out of a copy."""
    folder = copy_of(small, tmp_path)
    (folder / "train.csv").write_text("step,se")
    (folder / "eval.csv").unlink()
    resume(folder)
    for name in FILES[:3]:
        assert (folder / name).read_bytes() == (small / name).read_bytes()


def test_a_run_that_starts_over_is_not_finished(small, tmp_path):
    """As when its checkpoint was deleted to make room."""
    folder = copy_of(small, tmp_path)
    (folder / "checkpoint.msgpack").unlink()
    args, task = common.prepare(ALGO.Args(resume=str(folder)), ALGO.__file__, ALGO.PAPER_COLUMNS)
    with run.Run(args, ALGO.__file__, task, common.load_dataset(task, args.dataset_path)[1]):
        assert json.loads((small / "args.json").read_text())["finished"]
        assert "finished" not in json.loads((folder / "args.json").read_text())


def test_the_commit_is_this_codes_and_marked_if_it_is_not_all(tmp_path, monkeypatch):
    """A file that nobody added counts, as when an algorithm is new; a folder above that is in git does not."""
    plain = ["-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=no", "-c", "core.hooksPath=/dev/null"]
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *plain, *words], check=True)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.git_commit() is None
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    commit = run.git_commit()
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "new.py").touch()
    assert len(commit) == 40 and run.git_commit() == f"{commit}+"
    monkeypatch.setattr(run, "ROOT", tmp_path / "algos")
    assert run.git_commit() is None


def test_another_commit_is_said_once_and_recorded(small, tmp_path, monkeypatch, capsys):
    begun = json.loads((small / "args.json").read_text())
    folder = copy_of(small, tmp_path)
    monkeypatch.setattr(run, "git_commit", lambda: "xyz")
    resume(folder)
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and said.count(begun["commit"]) == said.count("xyz") == 1
    record = json.loads((folder / "args.json").read_text())
    assert record["commit"] == begun["commit"] and [later["commit"] for later in record["resumed"]] == ["xyz"]
    assert "jaxlib" not in said  # the versions are the same


def test_code_that_logs_something_else_does_not_go_on(begin):
    record = begin(num_updates=20)
    record.log(2, {"q": np.zeros(2)})
    with pytest.raises(common.Error, match="run/train.csv has other columns than step, seed, diverged, v, q: resume"):
        record.log(4, {"v": np.zeros(2), "q": np.zeros(2)})


# ------------------------------------------------------------------------------------------------ scores, divergence
def test_the_score_is_the_papers(begin, capsys):
    """Of each seed the mean of its evaluations at 80, 90 and 100 %, and over the seeds mean and std with ddof 0."""
    record = begin(seeds=(5, 6, 7), num_updates=100)
    record.task = types.SimpleNamespace(unit="% success", scored_from=0.8)
    scores = np.random.default_rng(0).uniform(0, 100, (10, 3, 4))  # evaluations, seeds, episodes
    for step, each in zip(range(10, 101, 10), scores):
        record.log_scores(step, each)
    means = scores[7:].mean(axis=(0, 2))
    np.testing.assert_allclose(record.finish(), means, rtol=1e-5)
    out = capsys.readouterr().out
    assert f"\nscore: {means.mean():.1f} +- {np.sqrt(((means - means.mean()) ** 2).mean()):.1f} % success\n" in out
    assert "over 3 seeds, each scored by the mean of its evaluations at 80, 90, 100 updates\n" in out


def test_a_seed_that_diverges_is_marked_and_leaves_the_others_alone(small, begin, data, tmp_path, monkeypatch, capsys):
    train, chunks = ALGO.train, iter(range(100))

    def poison(args, num_steps, dataset, states):
        states, metrics = train(args, num_steps, dataset, states)
        return {"w": states["w"].at[1].set(np.nan) if next(chunks) == 1 else states["w"]}, metrics

    monkeypatch.setattr(ALGO, "train", poison)
    np.testing.assert_array_equal(np.isnan(ALGO.main(ALGO.Args(dataset_path=data, **PENDULUM))), [False, True])
    resume("run")  # what a resumed run knows
    said = capsys.readouterr().out
    assert said.count("seed 6 diverged by update 750") == 1 and "score: nan +- nan" in said
    assert said.count("diverged, and so nan: seed 6\n") == 2
    for name in FILES[:3]:
        for old, new in zip(run.read_rows(small / name), run.read_rows(tmp_path / "run" / name), strict=True):
            late = new["seed"] == "6" and int(new["step"]) >= 750
            assert old["diverged"] == "0" and new["diverged"] == str(int(late))
            assert new == old or new["seed"] == "6"
            assert not late or name == "train.csv" or new["score"] == "nan" != old["score"]
    record = begin(folder="finite")
    record.log(2, {"q": np.array([np.nan, 1.0])})
    record.log_scores(2, np.ones((2, 2)))  # a policy may act all the same
    assert [row["score"] for row in run.read_rows(record.folder / "eval.csv")] == ["nan", "1"]
    record = begin(folder="other")
    sentence = r"every seed diverged by update 4 \(see other/train.csv\): lower --learning-rate"
    with pytest.raises(common.Error, match=sentence):
        for step, q in ((2, [1.0, np.inf]), (4, [np.nan, 1.0])):
            record.log(step, {"q": np.array(q)})


# --------------------------------------------------------------------------------------------------------- tracking
@pytest.mark.parametrize("sweep", [{}, {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "run1"}])
def test_weights_and_biases_get_every_seed(sweep, begin, monkeypatch, capsys):
    """Offline, by hand and as a sweep's agent starts it: one run, the means and each seed's own numbers."""
    wandb = importlib.import_module("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **sweep}.items():
        monkeypatch.setenv(name, value)
    logged, log = [], wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda self, row: logged.append(row) or log(self, row))
    record = begin(track=True, num_updates=20)
    record.log(20, {"q": np.array([1.0, 3.0])})
    record.log_scores(20, np.array([[-1.0, -3.0], [-5.0, -7.0]]))
    record.finish()
    assert logged == [
        {"step": 20, "train/q": 2.0, "train/q/5": 1.0, "train/q/6": 3.0},
        {"step": 20, "eval/score": -4.0, "eval/score/5": -2.0, "eval/score/6": -6.0},
    ]
    (file,) = record.folder.glob("wandb/offline-run-*/*.wandb")
    assert file.name == f"run-{sweep.get('WANDB_RUN_ID', record.record['wandb'])}.wandb"
    said = capsys.readouterr()
    assert "warning" not in said.out + said.err


def test_weights_and_biases_that_cannot_be_had_end_the_run_before_it_trains(begin, monkeypatch):
    monkeypatch.setattr(importlib.import_module("wandb"), "init", lambda **_: {}["login"])
    with pytest.raises(common.Error, match="no Weights & Biases .'login'.: log in, set WANDB_MODE=offline"):
        begin(track=True)
    begin()  # in the same folder, without --track


# ------------------------------------------------------------------------------------------------------------ flags
@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--env-name", "Pendulum-v1", "--dataset-path", "x"], "no values for .*: give --num-updates --num-samples"),
        (["--delta", "nan"], "--delta nan is impossible"),
        (["--delta", -0.1], "--delta -0.1 is impossible"),
        (["--num-workers", 0], "--num-workers 0 is impossible"),
        (["--seeds", 1, 1], "--seeds takes one or more different numbers"),
        (["--seeds", 2**32], "--seeds 4294967296 is impossible"),
        (["--hidden-dims"], "--hidden-dims one or more widths"),
        (["--num-updates", 101], "give a multiple of 10"),
        (["--dataset-path", "nowhere.npz"], "cannot read or write .*/nowhere.npz .No such file.*by --dataset-path"),
        (["--dataset-path", "x", "--generate-episodes", 1], "exclude each other"),
        (["--env-name", "antmaze-large-navigate", "--generate-episodes", 1], "cannot be generated"),
    ],
)
def test_impossible_flags_end_in_one_sentence_before_anything_is_made(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dmfql.py", "--env-name", TASK, *map(str, flags)])
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}[^\n]*$"):
        ALGO.main(tyro.cli(ALGO.Args))
    assert not os.listdir(tmp_path)


def test_what_cannot_be_evaluated_again_is_refused(begin):
    folder = begin().folder
    for flags, sentence in (
        ({}, "there is nothing to do"),
        ({"num_samples": (0,)}, "--num-samples 0 is impossible"),
        ({"num_samples": (1,), "num_workers": 2.0}, "--num-workers 2.0 is impossible: it is a whole number, like 2"),
        ({"num_samples": (1,)}, "run has no checkpoint yet: go on with it by --resume"),
    ):
        with pytest.raises(common.Error, match=sentence):
            evaluate.main(evaluate.Args(folder, **flags))


def test_where_nothing_can_draw_no_film_is_promised(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1))
    with pytest.raises(common.Error, match="nothing here can draw for --capture-video: install OSMesa"):
        begin(capture_video=True)
    monkeypatch.setattr(common, "rendering_backend", lambda: "egl")
    monkeypatch.setattr(common.Task, "make_env", lambda _: types.SimpleNamespace(metadata={"render_modes": ["human"]}))
    with pytest.raises(common.Error, match="Pendulum-v1 has no render mode rgb_array: add it, or leave --capture-v"):
        begin(capture_video=True)
    assert not os.listdir(tmp_path)
