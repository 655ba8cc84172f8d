"""Data: what a transition is at an episode's end, what is refused, and how episodes are generated."""

import functools
import http.server
import multiprocessing
import os
import shutil
import threading
import zipfile

import h5py
import numpy as np
import ogbench
import pytest
from conftest import EPISODES, TASK, assert_same

import common
import generate


@pytest.fixture(scope="module", autouse=True)
def one_environment():
    """Each load makes an environment, which takes more than a second: here all share one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "make_env", functools.cache(common.make_env))
        yield


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


def rewrite(path, **changes):
    """Writes an .npz file anew with some of its arrays changed, or left out where None."""
    arrays = dict(np.load(path)) | changes
    np.savez_compressed(path, **{key: values for key, values in arrays.items() if values is not None})


def write_member(path, header, size):
    """Writes an .npz file whose observations declare what `header` says and are `size` zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("observations.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False} | header)
        for _ in range(0, size, 10**6):
            file.write(bytes(10**6))


def damage(path, how):
    raw = dict(np.load(path))
    steps = len(raw["terminals"])
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "bit flipped":
        flip(path, zipfile.ZipFile(path).getinfo("actions.npy").header_offset + 5000)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no archive":
        path.write_text("<html>404</html>")
    elif how == "a lone array":
        with open(path, "wb") as file:
            np.save(file, raw["actions"])
    elif how == "key missing":
        rewrite(path, qpos=None)
    elif how == "NaN":
        raw["observations"][7, 3] = np.nan
        rewrite(path, observations=raw["observations"])
    elif how == "infinite as float32":
        rewrite(path, actions=raw["actions"].astype(np.float64) + 1e300)
    elif how == "pickled":
        rewrite(path, actions=np.array([{}] * steps, object))
    elif how == "wrong length":
        rewrite(path, actions=raw["actions"][:-1])
    elif how == "wrong width":
        rewrite(path, qpos=raw["qpos"][:, :-1])
    elif how == "no dimension":
        rewrite(path, terminals=np.array(True))
    elif how == "no end":
        rewrite(path, terminals=np.zeros(steps, bool))
    elif how == "strings":
        rewrite(path, terminals=raw["terminals"].astype(str))
    elif how == "complex":
        rewrite(path, actions=raw["actions"].astype(complex))
    elif how == "a bomb":
        write_member(path, {"shape": (2 * 10**7,)}, 8 * 10**7)
    elif how == "more declared than there is":
        write_member(path, {"shape": (10**14,)}, 10**6)


HOWS = [
    *("truncated", "bit flipped", "empty", "no archive", "a lone array", "key missing", "NaN", "infinite as float32"),
    *("pickled", "wrong length", "wrong width", "no dimension", "no end", "strings", "complex", "a bomb"),
    "more declared than there is",
]


@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_file_is_named_and_never_trained_on(how, data_path, tmp_path):
    """Also at its first load, when there is no sha256 to compare with."""
    path = tmp_path / "data.npz"
    shutil.copy(data_path, path)
    damage(path, how)
    sentence = "would unpack to 0.1 GB" if how == "a bomb" else ""
    with pytest.raises(common.Error, match=f"{path} is .*{sentence}"):
        load(path)
    assert not list(tmp_path.glob("*.sha256"))  # what was refused is not recorded


def flip(path, position, bit=0):
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def write_pen(path):
    """A small file as d4rl's are, of random numbers: two episodes of the pen."""
    rng, shapes = np.random.default_rng(0), {"observations": (200, 45), "actions": (200, 24), "rewards": (200,)}
    with h5py.File(path, "w") as file:
        for key, shape in shapes.items():
            file.create_dataset(key, data=rng.standard_normal(shape, np.float32), compression="gzip")
        for key in ("terminals", "timeouts"):
            file.create_dataset(key, data=np.arange(200) % 100 == 99 if key == "timeouts" else np.zeros(200, bool))


@pytest.mark.parametrize("kind", ["npz", "hdf5"])
def test_no_flipped_bit_goes_unnoticed_after_the_first_load(kind, data_path, tmp_path):
    """HDF5 has no checksums: the sha256 that the first load left beside the file decides."""
    path, task = tmp_path / f"data.{kind}", TASK if kind == "npz" else "pen-human-v1"
    shutil.copy(data_path, path) if kind == "npz" else write_pen(path)
    first, about = load(path, task)
    assert path.with_name(f"{path.name}.sha256").read_text() == f"{about['sha256']}  {path.name}\n"
    rng, size = np.random.default_rng(0), path.stat().st_size
    for position, bit in zip(rng.integers(size, size=20), rng.integers(8, size=20)):
        flip(path, position, bit)
        with pytest.raises(common.Error, match=f"{path} is damaged: its sha256 is not the one of its first load"):
            load(path, task)
        flip(path, position, bit)
    assert_same(load(path, task)[0], first)


def test_a_sha256_cut_short_is_written_again(data_path, tmp_path):
    path, record = tmp_path / "data.npz", tmp_path / "data.npz.sha256"
    shutil.copy(data_path, path)
    load(path)
    whole = record.read_text()
    record.write_text(whole[:20])
    load(path)
    assert record.read_text() == whole


def test_an_hdf5_bomb_is_refused(tmp_path):
    path = tmp_path / "data.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("observations", (10**12, 45), np.float32, chunks=(1000, 45))  # of zeros that nobody wrote
    with pytest.raises(common.Error, match=f"{path} is not D4RL's pen data: .*would unpack to 180,000.0 GB"):
        load(path, "pen-human-v1")


def test_another_tasks_file_is_refused(data_path):
    with pytest.raises(common.Error, match="is no dataset of cube-double-play: its observations are float32"):
        load(data_path, "cube-double-play")
    with pytest.raises(common.Error, match="no dataset of scene-play .'button_states"):
        load(data_path, "scene-play")


def test_an_episode_depends_on_its_number_alone(data_path):
    """The same alone as after others, and as the file of another process has it, up to floating-point of the
    machine."""
    raw = np.load(data_path)
    for episode in (2, 0):
        alone = generate.collect_episode(f"{TASK}-v0", episode)
        for key in raw.files:
            np.testing.assert_array_equal(alone[key], raw[key][1001 * episode : 1001 * (episode + 1)])
    assert (raw["actions"][:1001] != raw["actions"][1001:2002]).any()


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
    episode = generate.collect_episode(dataset, 0)
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
    episode = generate.collect_episode(dataset, 0)
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
    name = f"{TASK}-v0-generated1"
    assert left == [f"{name}-val.npz", f"{name}.npz", f"{name}.npz.sha256"]


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
