"""adroit.py against recordings of d4rl 1.1 on MuJoCo 2.1 (adroit_reference.npz) and d4rl's own `qlearning_dataset`."""

import fcntl
import hashlib
import importlib.metadata
import pathlib

import gymnasium
import h5py
import numpy as np
import pytest

import adroit
import common

RECORDED = dict(np.load(pathlib.Path(__file__).with_name("adroit_reference.npz")))
HANDS = ("pen", "door", "hammer", "relocate")
TOLERANCE = 1e-6
same_physics = pytest.mark.skipif(
    importlib.metadata.version("mujoco") not in adroit.MUJOCO_VERSIONS,
    reason="this MuJoCo is not known to reproduce the recordings",
)


@pytest.fixture(scope="module", params=HANDS)
def hand(request):
    return request.param


@pytest.fixture(scope="module")
def env(hand):
    return adroit.make_env(hand)


def recorded(prefix):
    """What was recorded: observations, of which there is one more than of the others; actions, rewards, ends."""
    return (RECORDED[f"{prefix}/{key}"] for key in ("obs", "action", "reward", "done"))


def restore(env, prefix, index):
    """Puts env into the recorded state `index`, whose observation it then has to give."""
    state = {key.split("/state_")[1]: RECORDED[key][index] for key in RECORDED if key.startswith(f"{prefix}/state_")}
    obs = next(recorded(prefix))[index, 0]
    if prefix == "relocate/rollout":
        # d4rl's get_env_state hands out a view of the ball's position, so the recording holds where the ball ended.
        # Its start is the palm's position (which depends on qpos alone) minus the observed difference.
        env.reset(seed=0)
        env.unwrapped.set_env_state(state)
        state["obj_pos"] = env.unwrapped.data.site("S_grasp").xpos - obs[30:33]
    env.reset(seed=0)
    env.unwrapped.set_env_state(state)
    np.testing.assert_allclose(env.unwrapped._get_obs(), obs, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------- the environments
@same_physics
def test_rollouts(hand, env):
    obs, action, reward, done = recorded(f"{hand}/rollout")
    for i in range(3):
        restore(env, f"{hand}/rollout", i)
        for t in range(adroit.HANDS[hand].horizon):
            step_obs, step_reward, terminated, truncated, _ = env.step(action[i, t])
            np.testing.assert_allclose(step_obs, obs[i, t + 1], rtol=0, atol=TOLERANCE)
            assert abs(step_reward - reward[i, t]) < TOLERANCE
            assert terminated == done[i, t]
            assert truncated == (t == adroit.HANDS[hand].horizon - 1)


@same_physics
def test_rewards_of_probes(hand, env):
    """In states that lie on both sides of each condition of each reward."""
    obs, action, reward, done = recorded(f"{hand}/probe")
    compared = 0
    for i in range(len(action)):
        restore(env, f"{hand}/probe", i)
        step_obs, step_reward, terminated, _, _ = env.step(action[i])
        if np.abs(step_obs - obs[i, 1]).max() <= TOLERANCE:
            assert abs(step_reward - reward[i]) < TOLERANCE and terminated == done[i]
            compared += 1
    assert compared >= 99, "one door and one hammer probe start in deep contact, where the physics may differ"
    assert done.sum() == {"pen": 20}.get(hand, 0)


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


def test_spaces_and_horizon(hand, env):
    """Actions beyond [-1, 1] count as the largest one. (The pen stays in the still hand.)"""
    sizes, ended, steps = adroit.HANDS[hand], False, 0
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (sizes.action_dim,), np.float32)
    assert env.observation_space.shape == (sizes.obs_dim,)
    after = [(env.reset(seed=1), env.step(np.full(sizes.action_dim, size)))[1][0] for size in (1.0, 5.0)]
    np.testing.assert_array_equal(*after)
    obs, _ = env.reset(seed=0)
    while not ended:
        assert (obs.shape, obs.dtype) == ((sizes.obs_dim,), np.float64)
        obs, reward, terminated, truncated, info = env.step(np.zeros(sizes.action_dim, np.float32))
        assert (type(reward), type(terminated)) == (float, bool) and "success" in info
        steps, ended = steps + 1, terminated or truncated
    assert (steps, terminated, truncated) == ({"pen": 100}.get(hand, 200), False, True)


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


def test_initial_states_are_distributed_as_d4rls(hand, env):
    """And depend on the seed alone, without touching the global random state."""
    before = np.random.get_state()[1].copy()
    for seed in range(20):
        env.reset(seed=seed)
        rng, _ = gymnasium.utils.seeding.np_random(seed)
        drawn = [rng.uniform(low, high) for low, high in RESET_RANGES[hand]]
        np.testing.assert_allclose(randomised(hand, env.unwrapped.model), drawn, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(env.unwrapped.data.qpos, env.unwrapped.init_qpos)
        assert not env.unwrapped.data.qvel.any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.testing.assert_array_equal(RECORDED[f"{hand}/rollout/state_qpos"], np.tile(env.unwrapped.init_qpos, (3, 1)))
    assert not RECORDED[f"{hand}/rollout/state_qvel"].any()


def test_normalized_scores():
    """What d4rl 1.1's get_normalized_score returns, times 100, for a return of 1000."""
    scores = dict(pen=30.320948986046826, door=35.9715112488389, hammer=9.754819929654657, relocate=23.734760058064246)
    for hand, score in scores.items():
        assert adroit.normalized_score(hand, 1000.0) == pytest.approx(score, rel=1e-12)
        assert adroit.normalized_score(hand, adroit.HANDS[hand].min_return) == 0
        assert adroit.normalized_score(hand, adroit.HANDS[hand].max_return) == 100
    assert common.load_task("pen-human-v1").score(1000.0, {}) == pytest.approx(scores["pen"], rel=1e-12)


def test_another_mujoco_is_refused(monkeypatch):
    common.load_task("pen-human-v1")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.3.0")
    with pytest.raises(common.Error, match=r"MuJoCo 3.3.0 .*: pip install mujoco==3\.1\.6 \(or, on Python 3\.13, 3\.2"):
        common.load_task("pen-human-v1")


# ------------------------------------------------------------------------------------------------------- the loader
def write(path, rows):
    """Writes rows in D4RL's layout, with a group that the published files also have."""
    with h5py.File(path, "w") as file:
        for key, values in rows.items():
            file.create_dataset(key, data=values, compression="gzip")
        file["metadata/algorithm"] = np.bytes_("DAPG")
    return path


@pytest.fixture(scope="module")
def rows():
    """The recorded pen rollouts as a data set: an episode that ends by a drop, one by a timeout, one by both, one cut.

    It is what d4rl recorded, so that its `qlearning_dataset` has one answer to it on any machine.
    """
    drop = [int(np.argmax(done)) + 1 for done in RECORDED["pen/rollout/done"]]
    episodes = [(0, drop[0], True, False), (1, 30, False, True), (2, drop[2], True, True), (1, 10, False, False)]
    rows = {key: [] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for i, length, terminal, timeout in episodes:
        last = np.arange(length) == length - 1
        taken = [RECORDED[f"pen/rollout/{key}"][i, :length] for key in ("obs", "action", "reward")]
        for key, values in zip(rows, [*taken, last & terminal, last & timeout]):
            rows[key].append(values)
    rows = {key: np.concatenate(values) for key, values in rows.items()}
    return {key: values.astype(np.float32 if values.dtype == np.float64 else bool) for key, values in rows.items()}


# SHA-256 of what d4rl 1.1's get_dataset and qlearning_dataset make of these rows (float32, C order; terminals bool).
D4RL_SHA256 = {
    "observations": "cd2977f4294c27b97318c2d210961b38f869475a56db1ddd1d4b412654db4609",
    "actions": "dd653cb86c2f7186b32250eccf47013c9c9501fc225a70a31bcd5fb59e89454a",
    "next_observations": "6028729bb5770e4c383018d00129d270b203d9d09fd458e3a0316096b21e2cca",
    "rewards": "1d380e025b2c382386188a5d447d9602b3d9bfb39ec4886c910d974a6b52f9fe",
    "terminals": "6bd3d56858474604d2ee2b49852c8e3f946b1c240e59747857952a7a17dcdcce",
}


def test_transitions_equal_d4rls(tmp_path, rows):
    data = adroit.load_transitions(write(tmp_path / "pen.hdf5", rows), "pen")
    ours = {"observations": "obs", "actions": "action", "next_observations": "next_obs", "rewards": "reward"}
    ours = {key: data[name] for key, name in ours.items()} | {"terminals": data["mask"] == 0}
    assert {key: hashlib.sha256(values.tobytes()).hexdigest() for key, values in ours.items()} == D4RL_SHA256
    assert all(values.dtype == np.float32 and len(values) == 122 for values in data.values())
    taken = {obs.tobytes(): action for obs, action in zip(rows["observations"], rows["actions"])}
    alive = data["mask"] == 1
    for next_obs, next_action in zip(data["next_obs"][alive], data["next_action"][alive]):
        np.testing.assert_array_equal(next_action, taken[next_obs.tobytes()])
    assert (~alive).sum() == 1  # the other drop came with a timeout, and d4rl leaves its row out


def test_columns_are_read_also_where_another_holds_the_files_lock(tmp_path, rows):
    """d4rl takes columns, too. And actions are not clipped here."""
    plain = adroit.load_transitions(write(tmp_path / "plain.hdf5", rows), "pen")
    columns = {key: rows[key][:, None].astype(np.float64) for key in ("rewards", "terminals", "timeouts")}
    path = write(tmp_path / "pen.hdf5", rows | columns | {"actions": 3 * rows["actions"]})
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        data = adroit.load_transitions(path, "pen")
    for key, values in plain.items():
        np.testing.assert_array_equal(data[key], 3 * values if key.endswith("action") else values)


DAMAGES = {  # which array is changed, or the file's bytes, and how
    "other hand": ("observations", lambda values: values[:, :39]),
    "short": ("timeouts", lambda values: values[:-1]),
    "nan": ("observations", lambda values: values * np.nan),
    "flag": ("terminals", lambda values: 2 * values),
    "all timeouts": ("timeouts", lambda values: values | True),
    "key missing": ("timeouts", lambda values: None),
    "a web page": ("bytes", lambda content: b"<html>404</html>"),
    "truncated": ("bytes", lambda content: content[:-2000]),
    "overwritten": ("bytes", lambda content: content.replace(content[5000:5180], bytes(180))),  # a compressed array
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_no_data_of_the_hand_is_refused(name, tmp_path, rows):
    """In one sentence, which names the file."""
    (what, change), path = DAMAGES[name], tmp_path / "some-file.hdf5"
    if what == "bytes":
        path.write_bytes(change(write(path, rows).read_bytes()))
    else:
        changed = rows | {what: change(rows[what])}
        write(path, {key: values for key, values in changed.items() if values is not None})
    with pytest.raises(ValueError, match=f"^{path} is damaged[^\n]*$"):
        adroit.load_transitions(path, "pen")
