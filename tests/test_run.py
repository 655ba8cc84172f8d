"""A run from the command line: what it prints and writes, how it stops and goes on, and what it refuses."""

import csv
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import flax.serialization
import h5py
import numpy as np
import pytest
from conftest import ALGOS, EPISODES, TASK, assert_same, load_algo, run_cli, start_cli

import adroit
import common
import run

SMALL = ["--env-name", TASK, "--generate-episodes", EPISODES, "--hidden-dims", 16, 16, "--batch-size", 16]
SMALL += ["--num-updates", 40, "--eval-episodes", 2, "--num-workers", 1]


def folder_of(out, cwd):
    """The run folder that the banner names."""
    return cwd / next(line.split()[1] for line in out.splitlines() if line.startswith("  folder"))


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def checkpoint_of(folder):
    return flax.serialization.msgpack_restore((folder / "checkpoint.msgpack").read_bytes()[32:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and what it printed."""
    cwd = tmp_path_factory.mktemp("whole")
    code, out, err = run_cli("dmfql", *SMALL, "--seeds", 5, 6, cwd=cwd)
    assert code == 0, err
    return folder_of(out, cwd), out


def test_what_a_run_prints_and_writes(whole, data_path):
    folder, out = whole
    assert out.startswith(f"dmfql on {TASK}, scored by % success in cube-single-singletask-v0\n")
    for part in (str(data_path), "generated, 4,000 transitions, sha256", "delta 0.03, ", "discount 0.99", "mujoco 3.1"):
        assert part in out
    assert out.count("% success (seed 5 ") == 10 and "\nscore: " in out and "32, 36, 40 updates" in out
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == sorted(
        ["args.json", "checkpoint.msgpack", "episodes.csv", "eval.csv", "train.csv"]
    )
    record = json.loads((folder / "args.json").read_text())
    assert record["args"]["num_samples"] == 2 and record["args"]["alpha"] == 300  # the paper's, and stored
    assert record["data"]["source"] == "generated" and len(record["data"]["sha256"]) == 64
    train, evals, episodes = (rows_of(folder / f"{name}.csv") for name in ("train", "eval", "episodes"))
    assert [(row["step"], row["seed"]) for row in evals] == [(str(s), seed) for s in range(4, 41, 4) for seed in "56"]
    assert len(train) == 20 and len(episodes) == 40 and train[0].keys() >= {"critic_loss", "flow_loss", "q_grad_norm"}
    for row in evals:
        mine = [float(e["score"]) for e in episodes if (e["step"], e["seed"]) == (row["step"], row["seed"])]
        assert len(mine) == 2 and float(row["score"]) == np.mean(mine)


def test_a_killed_run_goes_on_to_the_same_end(whole, tmp_path):
    """SIGKILL in mid-training, twice; the parameters and every CSV are those of the run that was never stopped."""
    process = start_cli("dmfql", *SMALL, "--seeds", 5, 6, cwd=tmp_path)
    pattern = f"runs/{TASK}/dmfql/*/eval.csv"
    for evaluations in (2, 5):
        while not any(len(rows_of(path)) >= 2 * evaluations for path in tmp_path.glob(pattern)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        (folder,) = [path.parent for path in tmp_path.glob(pattern)]
        with open(
            folder / "train.csv", "a"
        ) as file:  # a line that the kill cut short, and one that outran the checkpoint
            file.write("39,5,0.1,0.1,0.1,0.1\n39,6,0.")
        process = start_cli("dmfql", "--resume", folder, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for name in ("train.csv", "eval.csv", "episodes.csv"):
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes()
    assert_same(checkpoint_of(folder), checkpoint_of(whole[0]))
    assert out.splitlines()[-3] == whole[1].splitlines()[-3]  # the score
    assert not list(folder.glob("*.tmp"))


def test_seeds_on_devices_of_their_own_give_the_same_numbers(whole, tmp_path):
    """Of four devices, the two seeds take two: one each."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    code, out, err = run_cli("dmfql", *SMALL, "--seeds", 5, 6, cwd=tmp_path, XLA_FLAGS=flags)
    assert code == 0 and "  device  4 x cpu" in out, err
    folder = folder_of(out, tmp_path)
    for name in ("train.csv", "eval.csv", "episodes.csv"):
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes()
    assert_same(checkpoint_of(folder), checkpoint_of(whole[0]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, whole, tmp_path):
    flags = [*SMALL, "--seeds", 5, 6]
    flags[flags.index("--num-updates") + 1] = 100_000
    process = start_cli("dmfql", *flags, cwd=tmp_path)
    while not list(tmp_path.glob(f"runs/{TASK}/dmfql/*/train.csv")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    step, command = out.splitlines()[-1].removeprefix("stopped at update ").split("; go on by: python ")
    folder = tmp_path / command.split()[-1]
    assert checkpoint_of(folder)["step"] == int(step.replace(",", "")) == int(rows_of(folder / "train.csv")[-1]["step"])
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b""


def resume(name, *flags):
    """`python algos/<name>.py --resume flags`, in this process."""
    algo = load_algo(name)
    algo.main(algo.tyro.cli(algo.Args, args=["--resume", *map(str, flags)]))


def test_resume_refuses_what_is_not_its_own(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "load_dataset", functools.cache(run.load_dataset))
    monkeypatch.setattr(run, "Environments", lambda *_: types.SimpleNamespace(close=lambda: None))
    folder, _ = whole
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    checkpoint, args = changed / "checkpoint.msgpack", changed / "args.json"
    record = json.loads(args.read_text())
    saved = checkpoint_of(folder)

    def write(states=None, **identity):
        content = flax.serialization.msgpack_serialize(
            saved | {"run": saved["run"] | identity, "states": states or saved["states"]}
        )
        checkpoint.write_bytes(hashlib.sha256(content).digest() + content)

    for flags, name, sentence in (
        ([folder], "mfql", "is a run of dmfql: resume it by algos/dmfql.py"),
        ([folder, "--seeds", 3], "dmfql", "takes all other flags from"),
        ([tmp_path], "dmfql", "is no run's folder"),
        ([""], "dmfql", "is no run's folder"),
    ):
        with pytest.raises(common.Error, match=sentence):
            resume(name, *flags)
    for change, sentence in (
        ({"algorithm": "mfql"}, "its algorithm is mfql, this run's dmfql"),
        ({"task": "scene-play"}, "its task is scene-play, this run's cube-single-play"),
        ({"hidden_dims": [16, 17]}, r"its hidden_dims is \[16, 17\], this run's \[16, 16\]"),
        ({"seeds": [5, 7]}, r"its seeds is \[5, 7\], this run's \[5, 6\]"),
        ({"version": 0}, "its version is 0, this run's 1"),
        ({"states": {"0": 1}}, "holds other networks"),
    ):
        write(**change)
        with pytest.raises(common.Error, match=f"{checkpoint} is of another run .*{sentence}|{checkpoint} {sentence}"):
            resume("dmfql", changed)
    rng = np.random.default_rng(0)
    content = (folder / "checkpoint.msgpack").read_bytes()
    for position, bit in zip(rng.integers(len(content), size=8), rng.integers(8, size=8)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        checkpoint.write_bytes(damaged)
        with pytest.raises(common.Error, match=f"{checkpoint} is damaged"):
            resume("dmfql", changed)
    shutil.copy(folder / "checkpoint.msgpack", checkpoint)
    evals = changed / "eval.csv"
    for text in ("step,seed,diverged,score\nx,5,0,0\n", "a,b\n1,2\n", "\xff\n"):
        evals.write_text(text, encoding="latin1")
        with pytest.raises(common.Error, match=f"{evals} is damaged"):
            resume("dmfql", changed)
    record["data"]["sha256"] = "0" * 64
    args.write_text(json.dumps(record))
    with pytest.raises(common.Error, match="its sha256 differs"):
        resume("dmfql", changed)


def test_two_processes_cannot_train_one_run(whole):
    with run.filelock.FileLock(whole[0] / ".lock"):
        args = load_algo("dmfql").Args(resume=str(whole[0]))
        with pytest.raises(common.Error, match="being trained by another process"), run.Run(args, "dmfql.py", ("ql",)):
            pass


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--env-name", "scene-pley"], "there is no task 'scene-pley': try scene-play"),
        (["--env-name", "visual-scene-play-singletask-v0"], "seen in pixels"),
        (["--env-name", "cube-triple-play-singletask-v0"], "give --discount --q-agg --num-samples --alpha --delta"),
        (["--batch-size", 0], "--batch-size 0 is impossible"),
        (["--delta", -0.1], "--delta -0.1 is impossible"),
        (["--delta", "nan"], "--delta nan is impossible"),
        (["--num-samples", 0], "--num-samples 0 is impossible"),
        (["--num-target-samples", -1], "--num-target-samples -1 is impossible"),
        (["--seeds"], "--seeds () is impossible"),
        (["--seeds", 1, 1], "--seeds (1, 1) is impossible"),
        (["--hidden-dims"], "--hidden-dims () is impossible"),
        (["--num-updates", 101], "give a multiple of 10"),
        (["--discount", 1.5], "--discount 1.5 is impossible"),
        (["--dataset-path", "nowhere.npz"], "nowhere.npz: put it there"),
        (["--dataset-path", "x", "--generate-episodes", 1], "exclude each other"),
        (["--env-name", "antmaze-large-navigate", "--generate-episodes", 1], "cannot be generated"),
        (["--batch-size", "many"], "invalid"),
        (["--no-such-flag"], "no-such-flag"),
    ],
)
def test_impossible_flags_end_in_one_sentence(flags, sentence, tmp_path, monkeypatch, capsys):
    """In this process, as `main(tyro.cli(Args))` does it: an exit with a sentence, before anything is made."""
    monkeypatch.chdir(tmp_path)
    algo = load_algo("dmfql")
    with pytest.raises(SystemExit) as error:
        algo.main(algo.tyro.cli(algo.Args, args=[str(flag) for flag in flags]))
    text = str(error.value) + capsys.readouterr().err
    assert error.value.code not in (0, None) and sentence in text.replace("\n", " ")
    assert not list(tmp_path.glob("runs/*/*/*"))


def test_a_dataset_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    algo, task = load_algo("mfql"), common.load_task(TASK)
    for given, kept in (("data.npz", tmp_path / "data.npz"), ("~/data.npz", pathlib.Path.home() / "data.npz")):
        args = common.resolve(algo.Args(env_name=TASK, dataset_path=given), task, algo.COLUMNS)
        assert args.dataset_path == str(kept)


def test_an_error_is_one_line(tmp_path):
    code, out, err = run_cli("dmfql", "--env-name", "scene-pley", cwd=tmp_path)
    assert code == 1 and out == "" and err.startswith("error: there is no task") and err.count("\n") == 1


def record_episodes(hand, path):
    """Writes two episodes of random actions in the real environment, in D4RL's format."""
    env, rng = adroit.make_env(hand), np.random.default_rng(0)
    rows = {key: [] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for seed in range(2):
        (obs, _), over = env.reset(seed=seed), False
        while not over:
            action = rng.uniform(-1, 1, env.action_space.shape)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            for key, value in zip(rows, (obs, action, reward, terminated, truncated)):
                rows[key].append(value)
            obs, over = next_obs, terminated or truncated
    with h5py.File(path, "w") as file:
        for key, values in rows.items():
            file[key] = np.array(values)


@pytest.mark.parametrize("name, hand", list(zip(ALGOS, itertools.cycle(["pen", "door", "hammer", "relocate"]))))
def test_every_script_runs(name, hand, tmp_path):
    """On D4RL's hands, whose episodes are the quickest to play; OGBench's task is every other test's."""
    record_episodes(hand, tmp_path / "data.hdf5")
    flags = [*SMALL, "--env-name", f"{hand}-expert-v1", "--dataset-path", "data.hdf5"]
    del flags[2:4]  # --generate-episodes
    code, out, err = run_cli(name, *flags, cwd=tmp_path)
    assert code == 0, err
    assert f"{name} on {hand}-expert-v1, scored by normalized return in {hand}\n" in out and "given, " in out
    last = rows_of(folder_of(out, tmp_path) / "eval.csv")[-1]
    assert f"score: {float(last['score']):.1f} +- 0.0 normalized return\n" in out  # the last evaluation alone
    episodes = rows_of(folder_of(out, tmp_path) / "episodes.csv")
    assert len(episodes) == 20 and all(-60 < float(row["score"]) < 120 for row in episodes)


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file where the folder should be")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.Error, match=f"cannot write to {tmp_path}/runs.*start elsewhere"):
        run.Run(load_algo("dmfql").Args(env_name=TASK), "dmfql.py", ("ql",))


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(common.Error, match="cannot write /dev/full .No space left on device"):
        run.append_rows(pathlib.Path("/dev/full"), [{"step": 1}])


def test_the_commit_is_no_tags_name(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "m"], ["tag", "-a", "v1", "-m", "m"]):
        subprocess.run(["git", "-C", tmp_path, *who, *command], check=True)
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert run.git_commit() == head.stdout.strip()


def test_diverging_seeds_are_named(tmp_path, monkeypatch, capsys):
    """One of two seeds diverges: it is named once and the other goes on; when both have, the run ends."""
    monkeypatch.chdir(tmp_path)
    args = load_algo("mfql").Args(env_name=TASK, generate_episodes=EPISODES, seeds=(5, 6), num_updates=40)
    with pytest.raises(common.Error, match="every seed diverged by update 16"):
        with run.Run(args, "mfql.py", ("ql",)) as record:
            record.restore(None)
            for q in ([1.0, 2.0], [1.0, np.nan], [1.0, np.nan], [np.inf, np.nan]):
                record.evaluated.add(record.step)
                record.log({"q": np.array(q)})
    said = [line for line in capsys.readouterr().out.splitlines() if "diverged" in line]
    assert [line.split(" (")[0] for line in said] == ["seed 6 diverged by update 8", "seed 5 diverged by update 16"]
    rows = rows_of(record.folder / "train.csv")
    assert [row["q"] for row in rows] == ["1", "2", "1", "nan", "1", "nan", "inf", "nan"]


def test_weights_and_biases_offline(tmp_path):
    code, out, err = run_cli("mfql", *SMALL, "--track", cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert code == 0 and "warning" not in out, err
    assert list(folder_of(out, tmp_path).glob("wandb/offline-run-*/*.wandb"))


def test_weights_and_biases_without_a_login_is_a_warning(tmp_path):
    code, out, err = run_cli(
        "mfql", *SMALL, "--track", cwd=tmp_path, WANDB_API_KEY="", WANDB_BASE_URL="http://127.0.0.1:9"
    )
    assert code == 0 and out.count("warning: not tracked by Weights & Biases") == 1, err


def test_importing_does_not_import_wandb():
    code = "import sys, run; assert 'wandb' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
