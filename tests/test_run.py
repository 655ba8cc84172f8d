"""Real runs from the command line: what they print and write, how they stop and go on; and every script."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import gymnasium
import jax
import numpy as np
import pytest
from conftest import ALGOS, FILES, ROOT, LocalEnvironments, load_algo, write_hand, write_pendulum

import adroit
import common
from run import load_policy, load_run, read_rows

pytestmark = pytest.mark.slow
SMALL = "--hidden-dims 16 --batch-size 8 --num-workers 1 --flow-steps 2"
PENDULUM = f"--env-name Pendulum-v1 --dataset-path data.npz --seeds 5 6 --num-updates 10000 {SMALL}"
PENDULUM = f"{ROOT}/algos/dmfql.py {PENDULUM} --eval-episodes 2 --num-samples 2 --alpha 1 --delta 0.1"


def start(command, cwd, **env):
    """Starts "script and flags" as pasted into a shell in cwd, in a process group of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    line, env = f"exec {sys.executable} {command}", os.environ | env
    return subprocess.Popen(line, shell=True, cwd=cwd, env=env, start_new_session=True, **pipes)


def finish(process):
    """What it has printed when it has ended as it should."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module", autouse=True)
def decoys(tmp_path_factory):
    """On PYTHONPATH are another checkout's modules, which nothing may import."""
    folder = tmp_path_factory.mktemp("decoys")
    for name in ("common", "run", "adroit"):
        (folder / f"{name}.py").write_text("raise ImportError('another checkout')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and what it printed. Of four devices, its two seeds take two, one each."""
    cwd = tmp_path_factory.mktemp("whole")
    write_pendulum(cwd / "data.npz")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    out = finish(start(PENDULUM, cwd, XLA_FLAGS=flags))
    return cwd / re.search(r"folder  (\S+)", out)[1], out


def test_what_a_run_prints_and_writes(whole):
    folder, out = whole
    assert out.startswith("dmfql on Pendulum-v1, scored by return in Pendulum-v1\n")
    device = f"device  4 x cpu, {common.usable_cores()} cores; jax 0."
    for part in ("/data.npz\n", "given, 398 transitions, sha256 ", "alpha 1.0, delta 0.1", device):
        assert part in out
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"args.json", *FILES}
    record = json.loads((folder / "args.json").read_text())
    assert record["args"]["num_updates"] == 10000 and len(record["data"]["sha256"]) == 64 and record["commit"]
    train, evals, episodes = (read_rows(folder / name) for name in FILES[:3])
    assert train[0].keys() >= {"step", "seed", "diverged", "critic_loss", "flow_loss", "q_grad_norm"}
    assert [row["step"] for row in train[::2]] == [str(step) for step in range(250, 10001, 250)]
    steps = range(1000, 10001, 1000)
    assert [(row["step"], row["seed"]) for row in evals] == [(str(step), seed) for step in steps for seed in "56"]
    assert len(episodes) == 40
    last = [float(row["score"]) for row in evals[-2:]]
    assert out.count(" return (seed 5 ") == 10
    assert f"\nscore: {np.mean(last):.1f} +- {np.std(last):.1f} return\n" in out and last[0] != last[1]


STOPS = {"group": ("SIGINT", "SIGHUP"), "process": ("SIGTERM", "SIGKILL")}  # whom they reach


@pytest.mark.parametrize("target", STOPS)
def test_a_run_that_is_stopped_goes_on_to_the_same_end(target, whole, tmp_path):
    """By the command that it prints; the checkpoint and every CSV are then those of the run that was never stopped,
    though that one had more devices."""
    cwd = tmp_path / "mein Ordner"
    cwd.mkdir()
    shutil.copy(whole[0].parents[3] / "data.npz", cwd)
    folder, command = cwd / "zweiter Läufer", f"{PENDULUM} --folder 'zweiter Läufer'"
    again = f"{os.path.relpath(ROOT, cwd)}/algos/dmfql.py --resume 'zweiter Läufer'"
    last_step = lambda: int(([{"step": 0}] + read_rows(folder / "train.csv"))[-1]["step"])
    for name, step in zip(STOPS[target], (2250, 5000)):  # with a chunk to train next, and with an evaluation
        process = start(command, cwd)
        while last_step() < step:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        (os.killpg if target == "group" else os.kill)(process.pid, getattr(signal, name))
        out, err = process.communicate(timeout=300)
        if name == "SIGKILL":
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 128 + getattr(signal, name) and "Traceback" not in err, err
            said = f"stopped at update {load_run(folder)[2]:,}; resume it by: python {again}"
            assert out.splitlines()[-1] == said
        command, left = again, True
        for _ in range(600):  # the workers end by themselves
            if left := subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).stdout:
                time.sleep(0.1)
        assert not left
    out = finish(start(command, cwd))
    for name in FILES:
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes(), name
    assert out.splitlines()[-3] == whole[1].splitlines()[-3]  # the score
    assert not list(folder.glob("*.tmp"))


def test_policies_played_again_score_what_they_scored(whole, tmp_path):
    """The run's last evaluation, episode by episode, by other workers; and with one sample, other numbers. A seed that
    diverged scores nan, though it acts."""
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    train = (folder / "train.csv").read_text()
    (folder / "train.csv").write_text(train.replace("\n10000,5,0,", "\n10000,5,1,"))
    (folder / "num_samples.csv").write_text("step,seed,num_samples,score\n10000,5,4,0\n10000,6,4,0\n")
    finish(start(f"{ROOT}/scripts/evaluate.py {folder} --num-samples 4 2 1 --num-workers 3", folder))
    last, rows = read_rows(folder / "eval.csv")[-2:], read_rows(folder / "num_samples.csv")
    before, again = rows[:2], rows[2:]
    assert [row["score"] for row in before] == ["0", "0"]  # is not done again
    assert [(row["num_samples"], row["seed"]) for row in again] == [("2", "5"), ("2", "6"), ("1", "5"), ("1", "6")]
    assert [row["score"] for row in again[::2]] == ["nan", "nan"]
    assert again[1]["score"] == last[1]["score"] != again[3]["score"]


def test_a_policy_from_a_runs_folder(whole):
    """As in a notebook."""
    policy, second = load_policy(whole[0]), load_policy(whole[0], index=1)
    module, args, step, states = load_run(whole[0])
    assert step == 10000
    obs, key = np.array([0.6, 0.8, 1.0]), jax.random.PRNGKey(3)
    action = policy(obs, key)
    assert gymnasium.spaces.Box(-1, 1, (1,)).contains(action) and policy(obs).shape == (1,)
    both = module.act(args, states, np.tile(np.float32(obs), (2, 1, 1)), np.tile(key, (2, 1, 1)))
    np.testing.assert_allclose([action, second(obs, key)], both[:, 0], atol=1e-5)
    assert action != policy(obs, jax.random.PRNGKey(4))


@pytest.mark.parametrize("name", ALGOS)
def test_every_script_runs(name, tmp_path, monkeypatch, capsys):
    """As a script, but in this process; on one of D4RL's hands, whose episodes end here after five steps."""
    hand = ("pen", "door", "hammer", "relocate")[ALGOS.index(name) % 4]
    monkeypatch.setitem(adroit.HANDS, hand, adroit.HANDS[hand]._replace(horizon=5))
    monkeypatch.setattr(common, "Environments", LocalEnvironments)
    monkeypatch.chdir(tmp_path)
    write_hand(hand, "data.hdf5")
    flags = f"--env-name {hand}-expert-v1 --dataset-path data.hdf5 --num-updates 20 --eval-episodes 2 --folder run"
    small = SMALL if hasattr(load_algo(name).Args, "flow_steps") else SMALL.replace(" --flow-steps 2", "")
    for attribute, value in (("argv", ["x.py", *flags.split(), *small.split()]), ("path", [*sys.path])):
        monkeypatch.setattr(sys, attribute, value)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # is put back
    runpy.run_path(str(ROOT / "algos" / f"{name}.py"), run_name="__main__")
    out, last = capsys.readouterr().out, read_rows(tmp_path / "run" / "eval.csv")[-1]
    assert out.startswith(f"{name} on {hand}-expert-v1, scored by normalized return in {hand}\n") and "given, " in out
    assert f"score: {float(last['score']):.1f} normalized return\n" in out
    assert "  one seed scored by the mean of its evaluations at 20 updates\n" in out  # the last evaluation alone
    assert np.isfinite([float(row["score"]) for row in read_rows(tmp_path / "run" / "episodes.csv")]).sum() == 20


def test_a_device_that_is_not_there_is_named(tmp_path):
    process = start(f"{ROOT}/algos/dmfql.py", tmp_path, JAX_PLATFORMS="rocm")  # AMD's
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, "")
    assert re.fullmatch(r"error: JAX_PLATFORMS=rocm is not available here \(.+\): unset it\n", err)
