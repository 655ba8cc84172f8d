"""adroit.py against recordings of d4rl 1.1 on MuJoCo 2.1 (adroit_reference.npz) and d4rl's own `qlearning_dataset`."""

import hashlib
import importlib.metadata
import itertools
import pathlib
import re
import subprocess
import sys

import gymnasium
import h5py
import numpy as np
import pytest

import adroit

TOLERANCE = 1e-6
HANDS = ("pen", "door", "hammer", "relocate")
same_physics = pytest.mark.skipif(
    importlib.metadata.version("mujoco") not in (adroit.MUJOCO_VERSION, adroit.MUJOCO_PYTHON_3_13),
    reason="this MuJoCo is not known to reproduce the recordings",
)


@pytest.fixture(scope="module")
def reference():
    with np.load(pathlib.Path(__file__).with_name("adroit_reference.npz")) as file:
        return dict(file)


@pytest.fixture(scope="module", params=HANDS)
def hand(request):
    return request.param


@pytest.fixture(scope="module")
def env(hand):
    return adroit.make_env(hand)


def restore(env, reference, prefix, index):
    """Puts env into the recorded state `index` and returns its observation there."""
    state = {key.split("/state_")[1]: reference[key][index] for key in reference if key.startswith(f"{prefix}/state_")}
    if prefix == "relocate/rollout":
        # d4rl's get_env_state hands out a view of the ball's position, so the recording holds where the ball ended.
        # Its start is the palm's position (which depends on qpos alone) minus the observed difference.
        env.reset(seed=0)
        env.unwrapped.set_env_state(state)
        palm = env.unwrapped.data.site("S_grasp").xpos
        state["obj_pos"] = palm - reference["relocate/rollout/obs"][index, 0, 30:33]
    env.reset(seed=0)
    env.unwrapped.set_env_state(state)
    return env.unwrapped._get_obs()


# --- The environments ---------------------------------------------------------------------------------------------


@same_physics
def test_rollouts(hand, env, reference):
    obs, action, reward, done = (reference[f"{hand}/rollout/{key}"] for key in ("obs", "action", "reward", "done"))
    for i in range(3):
        np.testing.assert_allclose(restore(env, reference, f"{hand}/rollout", i), obs[i, 0], rtol=0, atol=TOLERANCE)
        for t in range(adroit.HANDS[hand].horizon):
            step_obs, step_reward, terminated, truncated, _ = env.step(action[i, t])
            np.testing.assert_allclose(step_obs, obs[i, t + 1], rtol=0, atol=TOLERANCE)
            assert abs(step_reward - reward[i, t]) < TOLERANCE
            assert terminated == done[i, t]
            assert truncated == (t == adroit.HANDS[hand].horizon - 1)


def branches(hand, data):
    """Every condition of a hand's reward, in the state after a step."""
    at = {name: data.site(name).xpos for name in SITES[hand]}
    if hand == "door":
        hinge = data.joint("door_hinge").qpos[0]
        return {f"open {angle}": hinge > angle for angle in (0.2, 1.0, 1.35)}
    thing = data.body("Object").xpos
    if hand == "pen":
        ends = [at["object_top"] - at["object_bottom"], at["target_top"] - at["target_bottom"]]
        cosine = np.dot(*(end / np.linalg.norm(end) for end in ends))
        near = np.linalg.norm(thing - at["eps_ball"]) < 0.075
        far_but_right = not near and cosine > 0.95
        return {
            "10": near and cosine > 0.9,
            "50": near and cosine > 0.95,
            "far": far_but_right,
            "drop": thing[2] < 0.075,
        }
    if hand == "hammer":
        left = np.linalg.norm(at["S_target"] - at["nail_goal"])
        return {"lift": thing[2] > 0.04 and at["tool"][2] > 0.04, "25": left < 0.02, "75": left < 0.01}
    distance = np.linalg.norm(thing - at["target"])
    return {"lift": thing[2] > 0.04, "10": distance < 0.1, "20": distance < 0.05}


SITES = {
    "pen": ("object_top", "object_bottom", "target_top", "target_bottom", "eps_ball"),
    "door": (),
    "hammer": ("tool", "S_target", "nail_goal"),
    "relocate": ("target",),
}


@same_physics
def test_rewards_of_probes(hand, env, reference):
    obs, action, reward, done = (reference[f"{hand}/probe/{key}"] for key in ("obs", "action", "reward", "done"))
    hit = []
    for i in range(len(action)):
        np.testing.assert_allclose(restore(env, reference, f"{hand}/probe", i), obs[i, 0], rtol=0, atol=TOLERANCE)
        step_obs, step_reward, terminated, _, _ = env.step(action[i])
        if np.abs(step_obs - obs[i, 1]).max() > TOLERANCE:
            continue
        assert abs(step_reward - reward[i]) < TOLERANCE
        assert terminated == done[i]
        hit.append(branches(hand, env.unwrapped.data))
    assert len(hit) >= 99, "one door and one hammer probe start in deep contact, where the physics may differ"
    for branch in hit[0]:
        assert {bool(row[branch]) for row in hit} == {False, True}, f"no probe decides {branch!r}"
    if hand == "pen":
        assert sum(row["drop"] for row in hit) == done.sum() == 20


@pytest.mark.parametrize(("lift", "tilt", "bonus"), [(0, -0.6, 0), (0.02, 0.6, 0), (0.1, 0, 2)])
def test_hammer_counts_as_lifted_when_both_ends_are_up(lift, tilt, bonus):
    """No probe lifts one end alone, so these rewards are computed from the formula."""
    env = adroit.make_env("hammer").unwrapped
    env.reset(seed=0)
    qpos = env.init_qpos.copy()
    qpos[28], qpos[32] = lift, tilt
    env.set_state(qpos, env.init_qvel)
    data = env.data
    hammer, head, nail = data.body("Object").xpos, data.site("tool").xpos, data.site("S_target").xpos
    assert (hammer[2] > 0.04, head[2] > 0.04) == (lift > 0, tilt <= 0)
    pairs = [(0.1, data.site("S_grasp").xpos, hammer), (1, head, nail), (10, nail, data.site("nail_goal").xpos)]
    cost = sum(weight * np.linalg.norm(a - b) for weight, a, b in pairs)
    assert adroit.hammer_reward(data) == pytest.approx(bonus - cost, abs=1e-9)


def test_shapes_dtypes_and_horizon(hand, env):
    sizes = adroit.HANDS[hand]
    assert isinstance(env, gymnasium.Env)
    assert env.observation_space.shape == (sizes.obs_dim,)
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (sizes.action_dim,), np.float32)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (sizes.obs_dim,)
    assert obs.dtype == np.float64
    steps, ended = 0, False
    while not ended:
        obs, reward, terminated, truncated, info = env.step(np.zeros(sizes.action_dim, np.float32))
        assert obs.shape == (sizes.obs_dim,)
        assert obs.dtype == np.float64
        assert type(reward) is float
        assert type(terminated) is bool
        assert "success" in info
        steps, ended = steps + 1, terminated or truncated
    assert (steps, terminated, truncated) == ({"pen": 100}.get(hand, 200), False, True)


def test_actions_are_clipped(hand, env):
    big, one = np.full(adroit.HANDS[hand].action_dim, 5.0), np.ones(adroit.HANDS[hand].action_dim)
    outcomes = []
    for action in (big, one):
        env.reset(seed=1)
        outcomes.append(env.step(action)[0])
    np.testing.assert_array_equal(*outcomes)


# d4rl's ranges, in the order in which its reset_model draws them.
RESET_RANGES = {
    "pen": [(-1, 1), (-1, 1)],
    "door": [(-0.3, -0.2), (0.25, 0.35), (0.252, 0.35)],
    "hammer": [(0.1, 0.25)],
    "relocate": [(-0.15, 0.15), (-0.15, 0.3), (-0.2, 0.2), (-0.2, 0.2), (0.15, 0.35)],
}


def randomised(hand, model):
    """The quantities that reset draws; for pen, the two Euler angles of the target."""
    if hand == "pen":
        w, x, y, z = model.body("target").quat
        np.testing.assert_allclose(w * z, x * y, atol=1e-12)  # no rotation about the third axis
        return [2 * np.arctan2(x, w), 2 * np.arctan2(y, w)]
    if hand == "door":
        return model.body("frame").pos
    if hand == "hammer":
        return model.body("nail_board").pos[2:]
    return [*model.body("Object").pos[:2], *model.site("target").pos]


def test_initial_states_are_distributed_as_d4rls(hand):
    env = adroit.make_env(hand)
    for seed in range(20):
        env.reset(seed=seed)
        rng, _ = gymnasium.utils.seeding.np_random(seed)
        drawn = [rng.uniform(low, high) for low, high in RESET_RANGES[hand]]
        np.testing.assert_allclose(randomised(hand, env.unwrapped.model), drawn, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(env.unwrapped.data.qpos, env.unwrapped.init_qpos)
        assert not env.unwrapped.data.qvel.any()


def test_recorded_resets_start_where_ours_do(hand, env, reference):
    np.testing.assert_array_equal(reference[f"{hand}/rollout/state_qpos"], np.tile(env.unwrapped.init_qpos, (3, 1)))
    assert not reference[f"{hand}/rollout/state_qvel"].any()


def test_seed_determines_the_episode(hand, env):
    """Also after other episodes, and without touching the global random state."""
    before = np.random.get_state()[1].copy()
    trajectories = []
    for run in range(2):
        if run == 1:
            env.reset(seed=5)
            for _ in range(20):
                env.step(env.action_space.low)
        rng = np.random.default_rng(0)
        trajectory = [env.reset(seed=3)[0]]
        trajectory += [env.step(rng.uniform(-1, 1, env.action_space.shape))[0] for _ in range(60)]
        trajectories.append(trajectory)
    np.testing.assert_array_equal(*trajectories)
    assert (env.reset(seed=4)[0] != trajectories[0][0]).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_import_prints_nothing():
    """gymnasium-robotics prints on import that another release has the older rewards, which would mislead."""
    command = [sys.executable, "-W", "ignore", "-c", "import adroit; adroit.make_env('pen')"]
    root = pathlib.Path(adroit.__file__).parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_unknown_hand_is_refused():
    with pytest.raises(ValueError, match="unknown Adroit hand 'foot': one of pen, door, hammer, relocate"):
        adroit.make_env("foot")


# What d4rl 1.1's get_normalized_score returns, times 100, for a return of 1000.
@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("pen", 30.320948986046826),
        ("door", 35.9715112488389),
        ("hammer", 9.754819929654657),
        ("relocate", 23.734760058064246),
    ],
)
def test_normalized_scores(name, score):
    assert adroit.normalized_score(name, 1000.0) == pytest.approx(score, rel=1e-12)
    assert adroit.normalized_score(name, adroit.HANDS[name].min_return) == 0
    assert adroit.normalized_score(name, adroit.HANDS[name].max_return) == 100


def test_task_names_and_url():
    assert len(adroit.TASKS) == 12
    assert adroit.TASKS["relocate-cloned-v1"] == "relocate"
    url = "http://rail.eecs.berkeley.edu/datasets/offline_rl/hand_dapg_v1/pen-human-v1.hdf5"
    assert f"{adroit.DATASET_URL}/pen-human-v1.hdf5" == url


def test_mujoco_versions():
    assert adroit.check_mujoco_version("3.1.6") == ""
    advice = r"pip install mujoco==3\.1\.6 \(or, on Python 3\.13, 3\.2\.6\)"
    messages = dict.fromkeys(("3.2.7", "3.1.5", "2.3.7"), advice) | {"3.2.6": r"stands in for 3\.1\.6, and matches .*"}
    for version, message in messages.items():
        assert re.fullmatch(f"MuJoCo {version} .*{message}", adroit.check_mujoco_version(version))
    for version in ("3.3.0", "3.10.0", "4.0.0"):
        with pytest.raises(ValueError, match=f"^MuJoCo {version} .*{advice}$"):
            adroit.check_mujoco_version(version)


def test_make_env_refuses_a_wrong_mujoco(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"mujoco": "3.3.7"}[name])
    with pytest.raises(ValueError, match=r"MuJoCo 3\.3\.7"):
        adroit.make_env("pen")


# --- The loader ---------------------------------------------------------------------------------------------------


def write(path, rows):
    """Writes rows in D4RL's layout, with the groups that the published files also have."""
    with h5py.File(path, "w") as file:
        for key, values in rows.items():
            file.create_dataset(key, data=values, compression="gzip")
        file["infos/qpos"] = np.zeros((len(rows["rewards"]), 30), np.float32)
        file["metadata/algorithm"] = np.bytes_("DAPG")
    return path


def original_rows(reference):
    """The recorded pen rollouts as a data set: an episode that ends by a drop, one by a timeout, one by both, one cut.

    It is what d4rl recorded, so that its `qlearning_dataset` has one answer to it on any machine.
    """
    drop = [int(np.argmax(done)) + 1 for done in reference["pen/rollout/done"]]
    episodes = [(0, drop[0], True, False), (1, 30, False, True), (2, drop[2], True, True), (1, 10, False, False)]
    rows = {key: [] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for i, length, terminal, timeout in episodes:
        rows["observations"].append(reference["pen/rollout/obs"][i, :length])
        rows["actions"].append(reference["pen/rollout/action"][i, :length])
        rows["rewards"].append(reference["pen/rollout/reward"][i, :length])
        last = np.arange(length) == length - 1
        rows["terminals"].append(last & terminal)
        rows["timeouts"].append(last & timeout)
    rows = {key: np.concatenate(values) for key, values in rows.items()}
    return {key: values.astype(np.float32 if values.dtype == np.float64 else bool) for key, values in rows.items()}


# SHA-256 of what d4rl 1.1's get_dataset and qlearning_dataset make of these rows (float32, C order; terminals bool).
D4RL_ROWS = 122
D4RL_SHA256 = {
    "observations": "cd2977f4294c27b97318c2d210961b38f869475a56db1ddd1d4b412654db4609",
    "actions": "dd653cb86c2f7186b32250eccf47013c9c9501fc225a70a31bcd5fb59e89454a",
    "next_observations": "6028729bb5770e4c383018d00129d270b203d9d09fd458e3a0316096b21e2cca",
    "rewards": "1d380e025b2c382386188a5d447d9602b3d9bfb39ec4886c910d974a6b52f9fe",
    "terminals": "6bd3d56858474604d2ee2b49852c8e3f946b1c240e59747857952a7a17dcdcce",
}


def test_transitions_equal_d4rls(tmp_path, reference):
    data = adroit.load_transitions(write(tmp_path / "pen.hdf5", original_rows(reference)), "pen")
    ours = {
        "observations": data["obs"],
        "actions": data["action"],
        "next_observations": data["next_obs"],
        "rewards": data["reward"],
        "terminals": data["mask"] == 0,
    }
    assert {key: len(values) for key, values in ours.items()} == dict.fromkeys(ours, D4RL_ROWS)
    assert {key: hashlib.sha256(values.tobytes()).hexdigest() for key, values in ours.items()} == D4RL_SHA256


@pytest.fixture(scope="module")
def recording():
    """Five episodes of our own pen environment; returns rows as D4RL stores them and the transitions as they happened.

    Idle episodes last until the timeout, random ones until the pen drops.
    """
    env = adroit.make_env("pen")
    rng = np.random.default_rng(0)
    rows, transitions = [], []
    for episode, idle in enumerate((False, True, False, True, False)):
        obs, _ = env.reset(seed=episode)
        ended, steps = False, []
        while not ended:
            action = rng.uniform(-1, 1, 24) * (0.01 if idle else 1)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            steps.append((obs, action, reward, terminated, truncated, next_obs))
            obs, ended = next_obs, terminated or truncated
        assert steps[-1][4] == idle
        rows += steps
        # d4rl drops the row of a timeout; so the next action is missing only where nothing comes after it.
        transitions += [(*row, following[1]) for row, following in itertools.pairwise(steps)]
        transitions += [(*steps[-1], None)] * (not idle)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    columns = [np.array(column) for column in list(zip(*rows, strict=True))[:5]]
    columns = [column.astype(np.float32) if column.dtype == np.float64 else column for column in columns]
    # The file's last row has no row after it, and d4rl leaves it out.
    return dict(zip(names, columns, strict=True)), transitions[:-1]


def test_transitions_are_those_that_happened(tmp_path, recording):
    rows, transitions = recording
    data = adroit.load_transitions(write(tmp_path / "pen.hdf5", rows), "pen")
    assert list(data) == ["obs", "action", "reward", "mask", "next_obs", "next_action"]
    n = len(transitions)
    shapes = {key: values.shape for key, values in data.items()}
    wide = {"obs": (n, 45), "next_obs": (n, 45), "action": (n, 24), "next_action": (n, 24)}
    assert shapes == wide | {"reward": (n,), "mask": (n,)}
    assert all(values.dtype == np.float32 for values in data.values())
    assert all(np.isfinite(values).all() for values in data.values())
    terminals = 0
    for i, (obs, action, reward, terminated, truncated, next_obs, next_action) in enumerate(transitions):
        assert not truncated
        np.testing.assert_array_equal(data["obs"][i], obs.astype(np.float32))
        np.testing.assert_array_equal(data["action"][i], action.astype(np.float32))
        assert data["reward"][i] == np.float32(reward)
        assert data["mask"][i] == 1 - terminated
        terminals += terminated
        if not terminated:
            np.testing.assert_array_equal(data["next_obs"][i], next_obs.astype(np.float32))
            np.testing.assert_array_equal(data["next_action"][i], next_action.astype(np.float32))
    assert terminals == 2  # of three drops, one is the file's last row


def test_actions_are_not_clipped_and_other_types_accepted(tmp_path, recording):
    rows = dict(recording[0])
    rows["actions"] = np.where(rows["actions"] > 0, 1.0, -1.0)
    rows["observations"] = rows["observations"].astype(np.float64)
    rows["rewards"] = rows["rewards"][:, None]
    rows["terminals"] = rows["terminals"].astype(np.uint8)[:, None]
    rows["timeouts"] = rows["timeouts"].astype(np.float32)
    data = adroit.load_transitions(write(tmp_path / "pen.hdf5", rows), "pen")
    assert set(np.unique(data["action"])) == {-1, 1}
    plain = adroit.load_transitions(write(tmp_path / "plain.hdf5", recording[0]), "pen")
    for key in ("obs", "reward", "mask", "next_obs"):
        np.testing.assert_array_equal(data[key], plain[key])


def replace(key, change):
    def damage(path):
        with h5py.File(path, "r+") as file:
            values = change(file[key][()])
            del file[key]
            file[key] = values

    return damage


def set_item(key, index, value):
    return replace(
        key, lambda values: np.concatenate([values[:index], [value + 0 * values[index]], values[index + 1 :]])
    )


def relink(key, link):
    """Keeps the values elsewhere, in this file or in its copy, and puts `link` in their place."""

    def damage(path):
        path.with_name("other.hdf5").write_bytes(path.read_bytes())
        with h5py.File(path, "r+") as file:
            file.move(key, "elsewhere")
            file[key] = link

    return damage


def virtual(path):
    path.with_name("other.hdf5").write_bytes(path.read_bytes())
    with h5py.File(path, "r+") as file:
        layout = h5py.VirtualLayout(file["rewards"].shape, np.float32)
        layout[:] = h5py.VirtualSource(path.with_name("other.hdf5"), "rewards", file["rewards"].shape)
        del file["rewards"]
        file.create_virtual_dataset("rewards", layout)


def external(path):
    path.with_name("raw").write_bytes(bytes(4096))
    with h5py.File(path, "r+") as file:
        shape = file["rewards"].shape
        del file["rewards"]
        file.create_dataset("rewards", shape, np.float32, external=[(str(path.with_name("raw")), 0, 4 * shape[0])])


def group(path):
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        file.create_group("rewards")


def every(length):
    def damage(path):
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            replace(key, lambda values: values[:length])(path)

    return damage


def corrupt_chunk(path):
    with h5py.File(path) as file:
        offset = file["observations"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 20 : offset + 200] = bytes(180)
    path.write_bytes(content)


UNREADABLE = "is not an HDF5 file, or it is cut short or damaged: "
DAMAGES = {
    "absent": (lambda path: path.unlink(), "no such file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "no such file"),
    "empty": (lambda path: path.write_bytes(b""), UNREADABLE),
    "text": (lambda path: path.write_text("<html>404</html>"), UNREADABLE),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-2000]), UNREADABLE),
    "chunk": (corrupt_chunk, UNREADABLE),
    "observations": (replace("observations", lambda v: v[:, :39]), r'"observations" has shape .* expected \(N, 45\)'),
    "actions": (replace("actions", lambda v: v[:, :, None]), r'"actions" has shape .* expected \(N, 24\)'),
    "rewards": (replace("rewards", lambda v: np.stack([v, v], 1)), r'"rewards" has shape .* expected \(N,\)'),
    "scalar": (replace("rewards", lambda v: v[0]), r'"rewards" has shape \(\), expected \(N,\)'),
    "nothing": (replace("rewards", lambda v: h5py.Empty("f4")), '"rewards" is not an array of this file'),
    "length": (replace("timeouts", lambda v: v[:-1]), "differ in length"),
    "strings": (replace("rewards", lambda v: np.array([b"1"] * len(v))), '"rewards" is not numeric'),
    "complex": (replace("rewards", lambda v: v.astype(np.complex64)), '"rewards" is not numeric'),
    "objects": (replace("rewards", lambda v: ["x"] * len(v)), '"rewards" is not numeric'),
    "nan": (set_item("observations", 7, np.float32("nan")), '"observations" holds values that are not finite'),
    "overflow": (
        replace("rewards", lambda v: 1e300 + v.astype(np.float64)),
        '"rewards" holds values that are not finite',
    ),
    "flag": (replace("terminals", lambda v: v.astype(np.uint8) * 2), "terminals and timeouts must be 0 or 1"),
    "no rows": (every(0), "no transitions"),
    "one row": (every(1), "no transitions"),
    "all timeouts": (replace("timeouts", np.ones_like), "no transitions"),
    "soft link": (relink("rewards", h5py.SoftLink("/elsewhere")), '"rewards" is not an array of this file'),
    "external link": (relink("rewards", h5py.ExternalLink("other.hdf5", "/rewards")), '"rewards" is not an array'),
    "virtual": (virtual, '"rewards" is stored outside this file'),
    "external": (external, '"rewards" is stored outside this file'),
    "group": (group, '"rewards" is not an array of this file'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bad_files_are_refused(tmp_path, recording, name):
    damage, message = DAMAGES[name]
    path = write(tmp_path / "some-file.hdf5", recording[0])
    adroit.load_transitions(path, "pen")
    damage(path)
    with pytest.raises(ValueError, match=message) as refusal:
        adroit.load_transitions(path, "pen")
    assert "some-file.hdf5" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals", "timeouts"])
def test_missing_keys_are_named(tmp_path, recording, key):
    rows = {name: values for name, values in recording[0].items() if name != key}
    path = tmp_path / "some-file.hdf5"
    with h5py.File(path, "w") as file:
        for name, values in rows.items():
            file[name] = values
    with pytest.raises(ValueError, match=f'some-file.hdf5 is not D4RL\'s pen data: "{key}" is missing'):
        adroit.load_transitions(path, "pen")


def test_other_hands_data_is_refused(tmp_path, recording):
    path = write(tmp_path / "pen.hdf5", recording[0])
    with pytest.raises(ValueError, match=r"is not D4RL's relocate data: .* expected \(N, 39\)"):
        adroit.load_transitions(path, "relocate")
