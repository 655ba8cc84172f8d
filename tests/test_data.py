"""Data: what a transition is at an episode's end, what is refused, where files are kept, and how episodes are made."""

import concurrent.futures
import hashlib
import http.server
import multiprocessing
import os
import shutil
import threading

import generate
import gymnasium
import h5py
import numpy as np
import ogbench
import pytest
from conftest import EPISODES, TASK, load_algo

import adroit
import common


@pytest.fixture(scope="module", autouse=True)
def one_environment_per_task():
    """Each load makes an environment, which takes a second: here all share one."""
    made, make = {}, common.OGBench.make_env
    with pytest.MonkeyPatch.context() as patch:
        make_once = lambda task: made.get(task.name) or made.setdefault(task.name, make(task))
        patch.setattr(common.OGBench, "make_env", make_once)
        yield


@pytest.fixture
def path(data_path, tmp_path):
    """An .npz file of one short episode, as OGBench's are."""
    raw = {key: values[:41] for key, values in np.load(data_path).items()} | {"terminals": np.arange(41) == 40}
    np.savez_compressed(tmp_path / "data.npz", **raw)
    return tmp_path / "data.npz"


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ogbench" / "data"


def load(path, task=TASK):
    return common.load_dataset(common.load_task(task, str(path)), str(path))


def clip(action):
    return np.clip(np.float32(action), -1 + 1e-5, 1 - 1e-5)


def random_episodes(env):
    """Rows of two random episodes under D4RL's keys: {key: [steps, ...]}."""
    rng, space = np.random.default_rng(0), env.action_space
    rows = {key: [] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for seed in range(2):
        (obs, _), over = env.reset(seed=seed), False
        while not over:
            action = rng.uniform(space.low, space.high)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            for key, value in zip(rows, (obs, action, reward, terminated, truncated)):
                rows[key].append(value)
            obs, over = next_obs, terminated or truncated
    return {key: np.array(values) for key, values in rows.items()}


def record_hand(hand, path):
    """Writes random episodes of one of Adroit's hands as D4RL's files are."""
    with h5py.File(path, "w") as file:
        for key, values in random_episodes(adroit.make_env(hand)).items():
            file[key] = values


def record_pendulum(path):
    """Writes random episodes of gymnasium's pendulum as a user's own file is."""
    rows = random_episodes(gymnasium.make("Pendulum-v1"))
    np.savez(path, **rows | {"masks": 1.0 - rows["terminals"], "terminals": rows.pop("timeouts")})


# ------------------------------------------------------------------------------------------------------ transitions
def test_transitions_follow_the_episodes(data_path, dataset):
    """The next action is the one taken at s', also in an episode's last transition, where actions[i + 1] of the
    filtered array would be another episode's first."""
    raw = dict(np.load(data_path))
    assert list(np.flatnonzero(raw["terminals"])) == [1001 * (i + 1) - 1 for i in range(EPISODES)]
    assert dataset.obs.shape == (1000 * EPISODES, 28)
    for i in (0, 1, 999, 1000, 2500, 1000 * EPISODES - 1):
        row = i + i // 1000
        np.testing.assert_array_equal(dataset.obs[i], raw["observations"][row])
        np.testing.assert_array_equal(dataset.next_obs[i], raw["observations"][row + 1])
        np.testing.assert_array_equal(dataset.action[i], clip(raw["actions"][row]))
        np.testing.assert_array_equal(dataset.next_action[i], clip(raw["actions"][row + 1]))
    assert (np.asarray(dataset.next_action[999]) != np.asarray(dataset.action[1000])).any()
    assert all(array.dtype == np.float32 for array in dataset)


def test_rewards_and_masks_are_ogbenchs(data_path, dataset):
    """Those of r(s), from the library's own loader, on the same transitions."""
    shutil.copy(data_path, data_path.with_stem(f"{data_path.stem}-val"))  # which the loader reads as well
    _, train, _ = ogbench.make_env_and_datasets(f"{TASK}-singletask-v0", dataset_path=str(data_path))
    names = {"obs": "observations", "next_obs": "next_observations", "reward": "rewards", "mask": "masks"}
    for ours, theirs in names.items():
        np.testing.assert_array_equal(getattr(dataset, ours), train[theirs])
    np.testing.assert_array_equal(dataset.action, clip(train["actions"]))


def test_masks_end_where_the_task_is_solved(path):
    """A cube laid at the goal by hand: reward 0 and mask 0 at that state, and nowhere else."""
    raw, env = dict(np.load(path)), common.load_task(TASK).make_env()
    env.reset()
    raw["qpos"][:, 14:17] = env.unwrapped._data.mocap_pos[0] + 1
    raw["qpos"][5, 14:17] = env.unwrapped._data.mocap_pos[0]
    np.savez(path, **raw)
    dataset, _ = load(path)
    np.testing.assert_array_equal(np.flatnonzero(dataset.mask == 0), [5])
    np.testing.assert_array_equal(np.flatnonzero(dataset.reward == 0), [5])


def test_a_users_own_environment(tmp_path, monkeypatch):
    """Of the user's module: actions, here in [-2, 2], become [-1, 1], and the score is the return."""
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Mine-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=200)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name, path = "my_envs:Mine-v0", tmp_path / "data.npz"
    record_pendulum(path)
    raw, (dataset, about) = np.load(path), load(path, name)
    assert about["source"] == "given" and dataset.obs.shape == (398, 3) and np.abs(raw["actions"]).max() > 1.9
    start = np.flatnonzero(~raw["terminals"])
    np.testing.assert_allclose(dataset.action, clip(raw["actions"][start] / 2), atol=1e-6)
    np.testing.assert_allclose(dataset.next_action, clip(raw["actions"][start + 1] / 2), atol=1e-6)
    np.testing.assert_array_equal(dataset.reward, np.float32(raw["rewards"][start]))
    task, plain = common.load_task(name, str(path)), gymnasium.make("Pendulum-v1")
    env = task.make_env()
    assert (env.reset(seed=1)[0] == plain.reset(seed=1)[0]).all()
    assert env.step(np.array([0.5], np.float32))[1] == plain.step(np.array([1.0], np.float32))[1]
    assert task.unit == "return" and task.score(-3.0, {}) == -3.0
    algo = load_algo("dmfql")
    with pytest.raises(common.Error, match=f"no values for {name}: give --num-updates --num-samples --alpha --delta"):
        common.resolve(algo.Args(env_name=name, dataset_path=str(path)), task, algo.PAPER)


@pytest.mark.parametrize(
    "name, dataset_path, sentence",
    [
        ("scene-pley", None, "there is no task 'scene-pley': give one like scene-play, "),
        ("halfcheetah-medium-v2", None, "there is no task 'halfcheetah-medium-v2': give one like "),
        ("visual-scene-play-singletask-v0", None, "a single task of OGBench in states"),
        ("Pendulum-v1", None, "or, with --dataset-path, any gymnasium id"),
        ("CartPole-v1", "data.npz", "CartPole-v1 has .* actions Discrete"),
        ("no_such_module:Env-v0", "data.npz", "no_such_module:Env-v0 cannot be made"),
    ],
)
def test_a_task_that_is_not_here_says_what_is(name, dataset_path, sentence):
    with pytest.raises(common.Error, match=sentence):
        common.load_task(name, dataset_path)


def test_a_numbered_task_is_played_as_that_task():
    assert common.load_task("cube-double-play-singletask-task4-v0").env_id == "cube-double-singletask-task4-v0"


# ---------------------------------------------------------------------------------------------------- damaged files
DAMAGES = {  # what is changed, the file's bytes or one of its arrays, and how
    "key missing": ("qpos", lambda values: None),
    "NaN": ("observations", lambda values: values * np.nan),
    "wrong length": ("actions", lambda values: values[1:]),
    "wrong width": ("actions", lambda values: values[:, 1:]),
    "no end": ("terminals", np.zeros_like),
    "truncated": ("bytes", lambda content: content[:-1000]),
    "bit flipped": ("bytes", lambda content: flip(content, content.find(b"actions.npy") + 200)),
    "a web page": ("bytes", lambda content: b"<html>404</html>"),
}


def flip(content, position):
    """The content with one bit changed."""
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


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


def test_a_damaged_file_of_ones_own_and_another_tasks_file_are_refused(path, tmp_path):
    for task, sentence in (("cube-double-play", "its observations are .41, 28., not"), ("Pendulum-v1", "'rewards")):
        with pytest.raises(common.Error, match=f"{path} is .*no dataset of {task}.*{sentence}"):
            load(path, task)
    record_pendulum(tmp_path / "own.npz")
    np.savez(tmp_path / "own.npz", **dict(np.load(tmp_path / "own.npz")) | {"rewards": np.full(400, np.inf)})
    with pytest.raises(common.Error, match="own.npz is damaged: its rewards hold NaN or infinity"):
        load(tmp_path / "own.npz", "Pendulum-v1")


# ------------------------------------------------------------------------------------------------- where they are
def test_data_are_found_in_another_folder(path, tmp_path, monkeypatch):
    """By OGBENCH_DATASET_DIR, as OGBench's users set it, and by a folder as --dataset-path."""
    published = path.rename(tmp_path / f"{TASK}-v0.npz")
    about = load(tmp_path)[1]
    assert about == load(published)[1] and about["sha256"] == hashlib.sha256(published.read_bytes()).hexdigest()
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    assert common.load_dataset(common.load_task(TASK))[1] == load(published)[1] | {"source": "published"}


def test_a_home_that_is_read_only_says_what_to_set(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path))
    sentence = "cannot read or write .*data.npz.*or data in another folder by OGBENCH_DATASET_DIR"
    with pytest.raises(common.Error, match=sentence):
        common.load_dataset(common.load_task(TASK))


# ------------------------------------------------------------------------------------------------------- generation
@pytest.fixture
def short_episodes(monkeypatch):
    """Episodes that are made end after 41 steps, and are else what they were."""
    monkeypatch.setattr(generate, "EPISODE_STEPS", 41)
    generate.collection_env.cache_clear()
    yield
    generate.collection_env.cache_clear()


def test_an_episode_depends_on_its_number_alone(data_path, short_episodes):
    """The same alone as after others, and as the file of other processes has it."""
    raw = np.load(data_path)
    for episode in (2, 0):
        alone = generate.collect_episode(f"{TASK}-v0", episode)
        for key in ("observations", "actions", "qpos", "qvel"):
            np.testing.assert_array_equal(alone[key], raw[key][1001 * episode :][:41])
    assert (raw["actions"][:41] != raw["actions"][1001:][:41]).any()


# From OGBench's own generate_manipspace.py, its env.reset and np.random seeded per episode as here: the sums of the
# first observation, and of the first 40 actions. (There, all arrays of an episode are the same bit for bit.) An action
# leads the arm from where it sees itself: what a processor rounds otherwise changes these sums by at most 3e-4.
OFFICIAL = {
    "cube-single-play": (3.4348, [5.3727, -19.3436, -2.8973, 9.5072, 6.4911]),
    "cube-double-play": (1.1885, [5.2002, -19.3097, -4.5525, 9.0798, 7.0116]),
    "scene-play": (2.8612, [9.3126, -7.9872, -2.1545, 33.7352, 0.4393]),
    "puzzle-3x3-play": (8.6047, [7.9615, -6.5279, -0.5886, 36.2282, 3.6489]),
    "puzzle-4x4-play": (15.6047, [6.6442, -12.0107, -0.3864, 36.192, 4.0186]),
}


@pytest.mark.parametrize("task", OFFICIAL)
def test_episodes_are_those_of_ogbenchs_own_script(task, short_episodes, tmp_path, monkeypatch):
    episode = generate.collect_episode(f"{task}-v0", 0)
    start, actions = OFFICIAL[task]
    np.testing.assert_allclose(episode["observations"][0].sum(), start, atol=3e-3)
    np.testing.assert_allclose(episode["actions"][:40].sum(0), actions, atol=3e-3)
    dtypes = {"terminals": bool, "button_states": np.int64}
    assert all(array.dtype == dtypes.get(key, np.float32) for key, array in episode.items())
    np.savez(tmp_path / "data.npz", **episode)
    assert load(tmp_path / "data.npz", task)[0].obs.shape == (40, episode["observations"].shape[1])
    monkeypatch.setitem(generate.NOISE, "noise", 0.11)  # is more than the tolerance
    other = generate.collect_episode(f"{task}-v0", 0)
    assert np.abs(other["actions"][:40].sum(0) - actions).max() > 1e-2


def test_scenes_that_hide_the_block_are_made_again():
    qpos = np.zeros((10, 30))
    assert generate.healthy("scene-play-v0", qpos)
    for y, z, healthy in ((0.29, 0.02, False), (-0.3, 0.02, False), (-0.3, 0.07, True), (-0.29, 0.02, True)):
        qpos[4, 15:17] = y, z
        assert generate.healthy("scene-play-v0", qpos) == healthy
    assert generate.healthy("cube-single-play-v0", qpos + 1)


# --------------------------------------------------------------------------------------------------------- download
@pytest.fixture
def server(path):
    """Serves the short file over loopback, cut off after `size` bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            self.wfile.write(path.read_bytes()[: server.size])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.asked, server.size = f"http://127.0.0.1:{server.server_port}", [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def load_in_child(home, url, *args):
    os.environ["HOME"], common.OGBench.url = home, url
    return common.load_dataset(common.load_task(TASK), *args)[1]


@pytest.mark.slow
def test_two_first_runs_make_a_file_once(empty_home, server, data_path):
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool:
        for args, source in ((), "published"), ((None, 1), "generated"):
            both = [pool.submit(load_in_child, os.environ["HOME"], server.url, *args) for _ in range(2)]
            first, second = (each.result() for each in both)
            assert first == second and first["source"] == source
    assert server.asked == [f"/{TASK}-v0.npz"]
    names = [f"{TASK}-v0-generated1.npz", f"{TASK}-v0.npz"]
    assert sorted(path.name for path in empty_home.iterdir() if path.suffix != ".lock") == names
    fewer, more = np.load(empty_home / names[0]), np.load(data_path)
    for key in more.files:  # fewer episodes are the first of more
        np.testing.assert_array_equal(fewer[key], more[key][:1001])


def test_a_download_that_fails_leaves_nothing_and_says_what_helps(empty_home, server, monkeypatch):
    server.size = 1000
    for url in (server.url, "http://127.0.0.1:9"):
        monkeypatch.setattr(common.OGBench, "url", url)
        with pytest.raises(common.Error, match=f"cannot download {url}/.*put the file at {empty_home}.*--generate-epi"):
            common.load_dataset(common.load_task(TASK))
    with pytest.raises(common.Error, match="cannot download") as error:
        common.load_dataset(common.load_task("antmaze-large-navigate"))
    assert "generate" not in str(error.value)
    assert not [path for path in empty_home.iterdir() if path.suffix != ".lock"]
