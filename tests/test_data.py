"""Data: what a transition is at an episode's end, what is refused, where files are kept, and how episodes are made."""

import concurrent.futures
import hashlib
import itertools
import pwd
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import generate
import gymnasium
import numpy as np
import ogbench
import pytest
from conftest import EPISODES, ROOT, TASK, random_rows

import common

ENDS = np.arange(400) % 50 == 49  # of episodes in a file of one's own
KEPT = np.delete(np.arange(400), [49, 99, 149, 199])  # all but those after which an episode was cut off


@pytest.fixture
def path(data_path, tmp_path):
    """An .npz file of one short episode, as OGBench's are."""
    raw = {key: values[:41] for key, values in np.load(data_path).items()} | {"terminals": np.arange(41) == 40}
    np.savez_compressed(tmp_path / "data.npz", **raw)
    return tmp_path / "data.npz"


def own(folder, **changes):
    """Writes a file of one's own for Pendulum-v1, with some of its arrays changed (or, by None, left out), and returns
    its path and arrays: transitions of 8 episodes of 50 rows, the first 4 of which are cut off, and the last 4 end; and
    actions up to almost a tenth of half the range outside."""
    rows, _ = random_rows(3, 1, 2.19)
    rows |= {"next_observations": np.roll(rows["observations"], -1, axis=0) + ENDS[:, None]}
    rows |= {"rewards": ENDS * 1.0, "terminals": ENDS & (np.arange(400) >= 200)} | changes
    rows = {key: values for key, values in rows.items() if values is not None}
    np.savez(folder / "own.npz", **rows)
    return folder / "own.npz", rows


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ogbench" / "data"


def load(path, task=TASK):
    return common.load_dataset(common.load_task(task, str(path)), str(path))


def clip(action):
    return np.clip(np.float32(action), -1 + 1e-5, 1 - 1e-5)


# ------------------------------------------------------------------------------------------------------ transitions
def test_transitions_are_ogbenchs(data_path, tmp_path):
    """By the library's own loader, whose rewards and masks are those of r(s): 0 where the cube lies at its goal, as in
    one row here. The next action is the one taken at s', also in an episode's last transition."""
    raw, env, path = dict(np.load(data_path)), common.load_task(TASK).make_env(), tmp_path / "data.npz"
    env.reset()
    raw["qpos"][:, 14:17] = env.unwrapped._data.mocap_pos[0] + 1
    raw["qpos"][5, 14:17] = env.unwrapped._data.mocap_pos[0]
    np.savez(path, **raw)
    np.savez(tmp_path / "data-val.npz", **raw)  # which the loader reads as well
    _, train, _ = ogbench.make_env_and_datasets(f"{TASK}-singletask-v0", dataset_path=str(path))
    row, (dataset, _) = np.flatnonzero(~raw["terminals"]), load(path)
    actions = {"action": clip(train["actions"]), "next_action": clip(raw["actions"][row + 1])}
    names = {"obs": "observations", "next_obs": "next_observations", "reward": "rewards", "mask": "masks"}
    for name, expected in (actions | {ours: train[theirs] for ours, theirs in names.items()}).items():
        np.testing.assert_array_equal(getattr(dataset, name), expected)
    assert len(row) == 1000 * EPISODES and all(array.dtype == np.float32 for array in dataset)
    for array, elsewhere in ((dataset.mask, 1), (dataset.reward, -1)):
        np.testing.assert_array_equal(array, np.where(row == 5, 0, elsewhere))


def test_a_file_of_transitions_is_taken_as_it_is(tmp_path):
    """As replay buffers have them: of all episodes the last reward and mask count, unless the episode was cut off, for
    then the last transition has no next action."""
    path, rows = own(tmp_path)
    dataset, _ = load(path, "Pendulum-v1")
    for ours, theirs in {"obs": "observations", "next_obs": "next_observations", "reward": "rewards"}.items():
        np.testing.assert_array_equal(getattr(dataset, ours), np.float32(rows[theirs][KEPT]))
    np.testing.assert_array_equal(KEPT[dataset.mask == 0], [249, 299, 349, 399])
    np.testing.assert_array_equal(dataset.action, clip(rows["actions"][KEPT] / 2))
    follows = (dataset.mask == 1) & (KEPT < 399)
    np.testing.assert_array_equal(dataset.next_action[follows], clip(rows["actions"][KEPT[follows] + 1] / 2))
    masks = {"terminals": ENDS, "masks": 1 - rows["terminals"]}  # then terminals are where an episode ends
    columns = {key: array[:, None] for key, array in (masks | {"rewards": rows["rewards"]}).items()}
    still = {"observations": np.zeros((400, 3)), "next_observations": np.zeros((400, 3))}  # do not show where it ends
    found, _ = load(own(tmp_path, **columns | still)[0], "Pendulum-v1")
    for name in ("action", "reward", "mask", "next_action"):
        np.testing.assert_array_equal(getattr(found, name), getattr(dataset, name))


EPISODES_ROWS = {"next_observations": None, "terminals": ENDS, "masks": np.ones(400)}
REFUSED = {  # what is changed in a file of one's own, and the sentence
    "actions far outside": ({"actions": np.full((400, 1), 2.3)}, "its actions lie far outside .* in .-2.0, 2.0."),
    "masks of no kind": ({"masks": np.full(400, 0.99)}, "its masks are not all 0 or 1"),
    "terminals of no kind": ({"terminals": np.arange(400)}, "its terminals are not all 0 or 1"),
    "out of order": ({"observations": np.random.default_rng(1).normal(size=(400, 3))}, "next action in less than half"),
    "lost rewards": (EPISODES_ROWS, "rewards or zero masks .* only in the last rows .* next_observations"),
    "rows of a replay buffer": (EPISODES_ROWS | {"rewards": np.ones(400), "masks": None}, "zero masks .* next_observ"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_a_file_of_ones_own_that_would_teach_something_else_is_refused(how, tmp_path):
    changes, sentence = REFUSED[how]
    path, _ = own(tmp_path, **changes)
    with pytest.raises(common.Error, match=f"{path} (is|has) .*{sentence}.*: name another file"):
        load(path, "Pendulum-v1")


# ------------------------------------------------------------------------------------------- one's own environment
class Own(gymnasium.Env):
    """An environment of two numbers, some of whose attributes may be replaced."""

    observation_space, action_space = gymnasium.spaces.Box(-9, 9, (2,)), gymnasium.spaces.Box(-1, 2, (1,))

    def __init__(self, **changes):
        vars(self).update(changes)

    def reset(self, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.taken = action
        return np.ones(2, np.float32), 1.0, False, False, {}


def register(make=Own, max_episode_steps=5, **kwargs):
    gymnasium.register("Own-v0", make, max_episode_steps=max_episode_steps, kwargs=kwargs)


FAULTS = {  # what is wrong with an environment, and the sentence
    "no time limit": ({"max_episode_steps": None}, "may never end: give max_episode_steps to gymnasium.register"),
    "other shape at reset": ({"reset": lambda seed=None, options=None: (np.zeros(3), {})}, "of shape .2,., and one is"),
    "NaN": ({"step": lambda action: (np.full(2, np.nan), 0.0, False, False, {})}, "must be finite .* .nan nan."),
    "a list of rewards": ({"step": lambda action: (np.zeros(2), [1.0], False, False, {})}, ""),
    "NaN as reward": ({"step": lambda action: (np.zeros(2), np.nan, False, False, {})}, "finite numbers, .* is nan"),
    "pixels": ({"observation_space": gymnasium.spaces.Box(0, 255, (8, 8, 3))}, "its observations are a Box of shape"),
    "unbounded": ({"action_space": gymnasium.spaces.Box(-np.inf, 1, (1,))}, "actions must be real numbers between"),
    "whole actions": ({"action_space": gymnasium.spaces.Box(0, 3, (1,), int)}, "actions must be real numbers between"),
    "a still joint": ({"action_space": gymnasium.spaces.Box(0, 0, (1,))}, "actions must be real numbers between"),
}


@pytest.mark.parametrize("how", FAULTS)
def test_an_environment_that_cannot_be_played_is_refused_before_training(how):
    changes, sentence = FAULTS[how]
    register()
    common.load_task("Own-v0", "data.npz")
    register(**changes)
    with pytest.raises(common.Error, match=rf"Own-v0 cannot be played \(.*{sentence}.*\): fix that, or give another"):
        common.load_task("Own-v0", "data.npz")


def test_actions_are_scaled_by_the_environment_with_its_wrappers(tmp_path):
    """Whose entry point has scaled them to +-2.5 already, here from +-2."""
    make = lambda: gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -2.5, 2.5)
    register(make)
    path, rows = own(tmp_path)
    np.testing.assert_array_equal(load(path, "Own-v0")[0].action, clip(rows["actions"][KEPT] / 2.5))
    ours, theirs, action = common.load_task("Own-v0", str(path)).make_env(), make(), np.array([0.3], np.float32)
    for env in (ours, theirs):
        env.reset(seed=1)
    np.testing.assert_array_equal(ours.step(action)[0], theirs.step(2.5 * action)[0])


def test_what_the_environment_gets_is_inside_its_bounds_to_the_last_bit():
    """Of all pairs of bounds among -1.3, -1.2, ..., 1.3; also where an action oversteps them."""
    pairs = itertools.combinations(np.linspace(-1.3, 1.3, 27, dtype=np.float32), 2)
    space = gymnasium.spaces.Box(*np.array(list(pairs)).T)
    register(action_space=space)
    env = common.load_task("Own-v0", "data.npz").make_env()
    env.reset()
    for sign, bound in ((1, space.high), (-1, space.low)):
        for size in (1, 3):
            env.step(np.full(space.shape, sign * size, np.float32))
            np.testing.assert_array_equal(env.unwrapped.taken, bound)
    assert env.unwrapped.taken.dtype == np.float32


@pytest.mark.slow
def test_the_example_of_the_docs_works_when_it_is_copied(tmp_path):
    """Its module is found in the current folder, by the workers as well; and it learns to move to 0: the best return is
    -1, and that of standing still -50."""
    section = (ROOT / "docs" / "data.md").read_text().split("## Your own\n")[1].split("\n## ")[0]
    names, blocks = re.findall(r"`(my_\w+\.py)`:", section), re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert names == ["my_env.py", "my_data.py"]
    for name, block in zip(names, blocks, strict=True):
        (tmp_path / name).write_text(block)
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    shell = f'set -e; python() {{ {sys.executable} "$@"; }}\n{commands}'.replace(" algos/", f" {ROOT}/algos/")
    out = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert float(re.search(r"score: (\S+)", out.stdout)[1]) > -16


NO_TASK = {  # what is given as --env-name, whether with a file, and the sentence
    "scene-pley": (None, "there is no task 'scene-pley': give one like scene-play, "),
    "visual-scene-play-singletask-v0": (None, "a single task of OGBench in states"),
    "Pendulum-v1": (None, "or, with --dataset-path, any gymnasium id"),
    "CartPole-v1": ("data.npz", "CartPole-v1 cannot be played .its actions are a Discrete"),
    "no_such_module:Env-v0": ("data.npz", "no_such_module:Env-v0 cannot be played .No module named"),
}


@pytest.mark.parametrize("name", NO_TASK)
def test_a_task_that_is_not_here_says_what_is(name):
    dataset_path, sentence = NO_TASK[name]
    with pytest.raises(common.Error, match=sentence):
        common.load_task(name, dataset_path)


def test_a_numbered_task_is_played_as_that_task():
    assert common.load_task("cube-double-play-singletask-task4-v0").env_id == "cube-double-singletask-task4-v0"


# ---------------------------------------------------------------------------------------------------- damaged files
DAMAGES = {  # what is changed, the file's bytes or one of its arrays, and how
    "key missing": ("qpos", lambda values: None),
    "NaN": ("observations", lambda values: values * np.nan),
    "wrong length": ("actions", lambda values: values[1:]),
    "another task's": ("observations", lambda values: values[:, 1:]),
    "no end": ("terminals", np.zeros_like),
    "no transition": ("terminals", np.ones_like),
    "overwritten": ("bytes", lambda content: content[:3000] + b"byte" + content[3004:]),
    "a web page": ("bytes", lambda content: b"<html>404</html>"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_named_and_never_trained_on(how, path):
    (what, change), raw = DAMAGES[how], dict(np.load(path))
    if what == "bytes":
        path.write_bytes(change(path.read_bytes()))
    else:
        raw[what] = change(raw[what])
        np.savez_compressed(path, **{key: values for key, values in raw.items() if values is not None})
    with pytest.raises(common.Error, match=f"{path} is (damaged|no dataset of {TASK}).*: name another file") as refusal:
        load(path)
    assert "allow_pickle" not in str(refusal.value)  # advice that would not help


def test_data_that_cannot_be_made_end_the_run_in_a_sentence(empty_home, monkeypatch):
    """As when the process is killed for lack of memory, which says nothing."""
    monkeypatch.setattr(common.subprocess, "run", lambda _: subprocess.CompletedProcess([], -9))
    with pytest.raises(common.Error, match=f"{empty_home}/{TASK}-v0-generated1.npz was not made: see above or"):
        common.load_dataset(common.load_task(TASK), None, 1)


# ------------------------------------------------------------------------------------------------- where they are
def test_data_are_found_in_another_folder(path, tmp_path, monkeypatch):
    """By OGBENCH_DATASET_DIR, as OGBench's users set it, and by a folder as --dataset-path."""
    published = path.rename(tmp_path / f"{TASK}-v0.npz")
    about = load(published)[1]
    assert about == load(tmp_path)[1] and about["sha256"] == hashlib.sha256(published.read_bytes()).hexdigest()
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    assert common.load_dataset(common.load_task(TASK))[1] == about | {"source": "published"}


def test_without_a_home_it_says_what_to_set(tmp_path, monkeypatch):
    """As in a container of a user that has no entry in /etc/passwd."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}[0])
    with pytest.raises(common.Error, match="no home folder for data: name one by D4RL_DATASET_DIR, or a file"):
        common.load_dataset(common.load_task("pen-human-v1"))
    assert not list(tmp_path.iterdir())  # there is none that is called ~


# ------------------------------------------------------------------------------------------------------- generation
# From OGBench's own generate_manipspace.py, its env.reset and np.random seeded per episode as here: the sums of the
# first observation, and of the first 40 actions. (There, all arrays of an episode are the same bit for bit.) An action
# leads the arm from where it sees itself: what a processor rounds otherwise changes these sums by at most 3e-4.
OFFICIAL = {
    "cube-single-play": (3.4348, [5.3727, -19.3436, -2.8973, 9.5072, 6.4911]),
    "cube-double-play": (1.1885, [5.2002, -19.3097, -4.5525, 9.0798, 7.0116]),
    "scene-play": (2.8612, [9.3126, -7.9872, -2.1545, 33.7352, 0.4393]),
    "puzzle-3x3-play": (8.6047, [7.9615, -6.5279, -0.5886, 36.2282, 3.6489]),
}


@pytest.mark.parametrize("task", OFFICIAL)
def test_episodes_are_those_of_ogbenchs_own_script(task, tmp_path, monkeypatch):
    """Episode 0, also when it is made after another. Here all end after 41 steps."""
    monkeypatch.setattr(generate, "EPISODE_STEPS", 41)
    other, episode = (generate.collect_episode(f"{task}-v0", i) for i in (1, 0))
    start, actions = OFFICIAL[task]
    assert (other["actions"] != episode["actions"]).any()
    np.testing.assert_allclose(episode["observations"][0].sum(), start, atol=3e-3)
    np.testing.assert_allclose(episode["actions"][:40].sum(0), actions, atol=3e-3)
    dtypes = {"terminals": bool, "button_states": np.int64}
    assert all(array.dtype == dtypes.get(key, np.float32) for key, array in episode.items())
    np.savez(tmp_path / "data.npz", **episode)
    assert load(tmp_path / "data.npz", task)[0].obs.shape == (40, episode["observations"].shape[1])


def test_scenes_that_hide_the_block_are_made_again():
    qpos = np.zeros((10, 30))
    assert generate.healthy("scene-play-v0", qpos)
    for y, z, healthy in ((0.29, 0.02, False), (-0.3, 0.02, False), (-0.3, 0.07, True), (-0.29, 0.02, True)):
        qpos[4, 15:17] = y, z
        assert generate.healthy("scene-play-v0", qpos) == healthy
    assert generate.healthy("cube-single-play-v0", qpos + 1)


# --------------------------------------------------------------------------------------------------------- download
@pytest.mark.slow
def test_two_first_runs_make_a_file_once(path, empty_home, data_path, monkeypatch, capsys):
    path.rename(path.with_name(f"{TASK}-v0.npz"))
    monkeypatch.setattr(common.OGBench, "url", path.parent.as_uri())
    task, retrieve = common.load_task(TASK), urllib.request.urlretrieve
    monkeypatch.setattr(urllib.request, "urlretrieve", lambda *args: time.sleep(1) or retrieve(*args))
    for args, source in ((), "published"), ((None, 1), "generated"):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first, second = pool.map(lambda _, args=args: common.load_dataset(task, *args)[1], range(2))
        assert first == second and first["source"] == source
        assert capsys.readouterr().out.count("downloading") == (source == "published")
    names = [f"{TASK}-v0-generated1.npz", f"{TASK}-v0.npz"]
    assert sorted(path.name for path in empty_home.iterdir() if path.suffix != ".lock") == names
    fewer, more = np.load(empty_home / names[0]), np.load(data_path)
    for key in more.files:  # fewer episodes are the first of more
        np.testing.assert_array_equal(fewer[key], more[key][:1001])


def test_a_download_that_fails_leaves_nothing_and_says_what_helps(empty_home, monkeypatch):
    def cut_short(url, path, progress):
        path.touch()
        raise urllib.error.ContentTooShortError("cut short", None)

    monkeypatch.setattr(common.OGBench, "url", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(common.Error, match=f"cannot download http.*put the file at {empty_home}.*--generate-episodes"):
        common.load_dataset(common.load_task(TASK))
    monkeypatch.setattr(urllib.request, "urlretrieve", cut_short)
    with pytest.raises(common.Error, match="cannot download .*cut short") as error:
        common.load_dataset(common.load_task("antmaze-large-navigate"))
    assert "generate" not in str(error.value)
    assert not [path for path in empty_home.iterdir() if path.suffix != ".lock"]
