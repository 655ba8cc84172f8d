"""Data: what a transition is at an episode's end, what is refused, and how episodes are generated."""

import functools
import http.server
import multiprocessing
import os
import shutil
import threading
import zipfile

import numpy as np
import ogbench
import pytest
from conftest import EPISODES, TASK

import common
import generate


def load(path, task=TASK):
    return common.load_dataset(common.load_task(task), str(path))


def test_transitions_follow_the_episodes(data_path, dataset):
    """The next action is the one taken at s', also in an episode's last transition, where actions[i + 1] of the
    filtered array would be another episode's first."""
    raw = dict(np.load(data_path))
    ends = np.flatnonzero(raw["terminals"])
    assert list(ends) == [1001 * (i + 1) - 1 for i in range(EPISODES)]
    clip = lambda action: np.clip(action, -1 + 1e-5, 1 - 1e-5)
    assert dataset.obs.shape == (1000 * EPISODES, 28)
    for i in (0, 1, 999, 1000, 2500, 1000 * EPISODES - 1):
        row = i + i // 1000
        np.testing.assert_array_equal(dataset.obs[i], raw["observations"][row])
        np.testing.assert_array_equal(dataset.next_obs[i], raw["observations"][row + 1])
        np.testing.assert_array_equal(dataset.action[i], clip(raw["actions"][row]))
        np.testing.assert_array_equal(dataset.next_action[i], clip(raw["actions"][row + 1]))
    assert (np.asarray(dataset.next_action[999]) != np.asarray(dataset.action[1000])).any()
    assert all(array.dtype == np.float32 for array in dataset)
    assert np.abs(dataset.action).max() <= 1 - 1e-5 + 1e-8


def test_rewards_and_masks_are_ogbenchs(data_path, dataset):
    """Those of r(s), from the library's own loader, on the same transitions."""
    _, train, _ = ogbench.make_env_and_datasets(f"{TASK}-singletask-v0", dataset_path=str(data_path))
    for key, array in (("observations", dataset.obs), ("next_observations", dataset.next_obs)):
        np.testing.assert_array_equal(array, train[key])
    for key, array in (("rewards", dataset.reward), ("masks", dataset.mask)):
        np.testing.assert_array_equal(array, train[key])
    np.testing.assert_array_equal(dataset.action, np.clip(train["actions"], -1 + 1e-5, 1 - 1e-5))


def test_masks_end_where_the_task_is_solved(data_path, tmp_path):
    """A cube laid at the goal by hand: reward 0 and mask 0 at that state, and nowhere else."""
    raw = dict(np.load(data_path))
    env = common.make_env(common.load_task(TASK))
    env.reset()
    raw["qpos"][:, 14:17] = env.unwrapped._data.mocap_pos[0] + 1
    raw["qpos"][5, 14:17] = env.unwrapped._data.mocap_pos[0]
    np.savez(tmp_path / "solved.npz", **raw)
    dataset, about = load(tmp_path / "solved.npz")
    assert about["source"] == "given"
    np.testing.assert_array_equal(np.flatnonzero(dataset.mask == 0), [5])
    np.testing.assert_array_equal(np.flatnonzero(dataset.reward == 0), [5])


def damage(path, how):
    raw = dict(np.load(path))
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "bit flipped":
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            content[archive.getinfo("actions.npy").header_offset + 5000] ^= 1
        path.write_bytes(content)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no archive":
        path.write_text("<html>404</html>")
    elif how == "key missing":
        np.savez(path, **{key: raw[key] for key in raw if key != "qpos"})
    elif how == "NaN":
        raw["observations"][7, 3] = np.nan
        np.savez(path, **raw)
    elif how == "pickled":
        np.savez(path, **(raw | {"actions": np.array([{}] * len(raw["actions"]), object)}))
    elif how == "wrong length":
        np.savez(path, **(raw | {"actions": raw["actions"][:-1]}))
    elif how == "no end":
        np.savez(path, **(raw | {"terminals": np.zeros(len(raw["terminals"]), bool)}))
    elif how == "strings":
        np.savez(path, **(raw | {"terminals": raw["terminals"].astype(str)}))


HOWS = [
    "truncated",
    "bit flipped",
    "empty",
    "no archive",
    "key missing",
    "NaN",
    "pickled",
    "wrong length",
    "no end",
    "strings",
]


@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_file_is_named_and_never_trained_on(how, data_path, tmp_path):
    path = tmp_path / "data.npz"
    shutil.copy(data_path, path)
    load(path)
    damage(path, how)
    with pytest.raises(common.Error, match=str(path)):
        load(path)


def test_another_tasks_file_is_refused(data_path):
    with pytest.raises(common.Error, match="is no dataset of cube-double-play: its observations are float32"):
        load(data_path, "cube-double-play")
    with pytest.raises(common.Error, match="no dataset of scene-play .'button_states"):
        load(data_path, "scene-play")


def test_an_episode_depends_on_seed_and_number_alone(data_path):
    """The same alone as after others, and as the file of another process has it, up to floating-point of the
    machine."""
    raw = np.load(data_path)
    for episode in (2, 0):
        alone = generate.collect_episode(f"{TASK}-v0", 0, episode)
        for key in raw.files:
            np.testing.assert_array_equal(alone[key], raw[key][1001 * episode : 1001 * (episode + 1)])
    other = generate.collect_episode(f"{TASK}-v0", 1, 0)
    assert (other["actions"] != raw["actions"][:1001]).any()


# From OGBench's own generate_manipspace.py, its env.reset and np.random seeded per episode as here: of the first
# episode, the sums of observations 0, 40 and 80, and of the first 40 actions. (The whole arrays were the same, bit for
# bit, for 10 + 1, 4, 20 + 2, 4 and 2 episodes of cube-single, cube-double, scene, puzzle-3x3 and puzzle-4x4.)
OFFICIAL = {
    "cube-single-play-v0": [3.434847, 2.19796, -5.559432, 5.372677, -19.343645, -2.897277, 9.507219, 6.491101],
    "scene-play-v0": [2.861245, 1.180527, 0.910510, 9.312635, -7.987193, -2.154518, 33.735153, 0.439288],
    "puzzle-3x3-play-v0": [8.604689, 10.333373, 10.629379, 7.961474, -6.527891, -0.588633, 36.228168, 3.648830],
}


@pytest.mark.parametrize("dataset", OFFICIAL)
def test_episodes_are_those_of_ogbenchs_own_script(dataset):
    episode = generate.collect_episode(dataset, 0, 0)
    sums = [*episode["observations"][[0, 40, 80]].sum(1), *episode["actions"][:40].sum(0)]
    np.testing.assert_allclose(sums, OFFICIAL[dataset], atol=1e-3)
    dtypes = {"terminals": bool, "button_states": np.int64}
    assert all(array.dtype == dtypes.get(key, np.float32) for key, array in episode.items())


def test_fewer_episodes_are_the_first_of_more(data_path, home):
    less = data_path.with_name("less.npz")
    generate.generate(f"{TASK}-v0", 2, less, num_workers=1)
    for suffix, episodes in (("", 2), ("-val", 1)):
        found, whole = (np.load(path.with_stem(path.stem + suffix)) for path in (less, data_path))
        for key in whole.files:
            np.testing.assert_array_equal(found[key], whole[key][: 1001 * episodes])


@pytest.mark.parametrize("dataset", ["scene-play-v0", "puzzle-3x3-play-v0", "cube-double-play-v0"])
def test_the_other_tasks_are_generated(dataset, tmp_path):
    """An episode of each kind of environment, through file and loader."""
    episode = generate.collect_episode(dataset, 0, 0)
    np.savez(tmp_path / "data.npz", **episode)
    data, _ = load(tmp_path / "data.npz", dataset.removesuffix("-v0"))
    assert len(data.obs) == 1000 and np.abs(data.action).mean() > 0.05
    assert episode["qpos"][:, 14:].std(axis=0).max() > 0.003  # the arm moves things


def test_scenes_that_hide_the_block_are_made_again():
    qpos = np.zeros((10, 30))
    assert generate.healthy("scene-play-v0", qpos)
    for y, z, healthy in ((0.29, 0.02, False), (-0.3, 0.02, False), (-0.3, 0.07, True), (-0.29, 0.02, True)):
        qpos[4, 15:17] = y, z
        assert generate.healthy("scene-play-v0", qpos) == healthy
    qpos[4, 15] = 1
    assert generate.healthy("cube-single-play-v0", qpos)


def load_in_child(home, url, args, queue):
    os.environ["HOME"] = home
    ogbench.utils.DATASET_URL = url
    try:
        queue.put(common.load_dataset(*args)[1])
    except common.Error as error:
        queue.put(str(error))


def load_twice_at_once(url, *args):
    """What load_dataset gives in two processes that start together."""
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    children = [context.Process(target=load_in_child, args=(os.environ["HOME"], url, args, queue)) for _ in range(2)]
    for child in children:
        child.start()
    answers = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    return answers


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_two_first_runs_generate_once(empty_home):
    first, second = load_twice_at_once("", common.load_task(TASK), None, 1)
    assert first == second and first["source"] == "generated" and first["transitions"] == 1000
    left = sorted(path.name for path in (empty_home / ".ogbench/data").iterdir())
    assert [name for name in left if not name.endswith(".lock")] == [
        f"{TASK}-v0-generated1-val.npz",
        f"{TASK}-v0-generated1.npz",
    ]


class Server:
    """Serves a folder over loopback and counts the requests."""

    def __init__(self, folder, truncate=False):
        served = self.served = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                served.append(self.path)
                super().do_GET()

            def copyfile(self, source, outputfile):
                outputfile.write(source.read(50_000 if truncate else -1))

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()


@pytest.fixture
def served_folder(data_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(data_path, folder / f"{TASK}-v0.npz")
    return folder


def test_two_first_runs_download_once(empty_home, served_folder):
    with Server(served_folder) as server:
        first, second = load_twice_at_once(server.url, common.load_task(TASK))
    assert first == second and first["source"] == "published" and first["transitions"] == 1000 * EPISODES
    assert server.served == [f"/{TASK}-v0.npz"]


def test_a_download_that_breaks_off_leaves_nothing(empty_home, served_folder):
    with Server(served_folder, truncate=True) as server:
        for answer in load_twice_at_once(server.url, common.load_task(TASK)):
            assert "cannot download" in answer and str(empty_home) in answer
    assert [p.name for p in (empty_home / ".ogbench/data").iterdir() if not p.name.endswith(".lock")] == []


def test_an_unreachable_host_is_named_with_the_remedy(empty_home, monkeypatch):
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", "http://127.0.0.1:9")
    with pytest.raises(common.Error, match="cannot download http://127.0.0.1:9/.*by hand.*--generate-episodes"):
        common.load_dataset(common.load_task(TASK))
    with pytest.raises(common.Error, match="cannot download") as error:
        common.load_dataset(common.load_task("antmaze-large-navigate"))
    assert "generate" not in str(error.value)
    with pytest.raises(common.Error, match="cannot be generated"):
        common.load_dataset(common.load_task("antmaze-large-navigate"), None, 3)
