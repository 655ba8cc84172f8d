"""adroit.py against recordings of d4rl 1.1 on MuJoCo 2.1 (adroit_reference.npz) and d4rl's own `qlearning_dataset`."""

import fcntl
import hashlib
import importlib.metadata
import pathlib
import types

import gymnasium
import numpy as np
import pytest
from conftest import write_hdf5

import adroit
import common

RECORDED = dict(np.load(pathlib.Path(__file__).with_name("adroit_reference.npz")))
HANDS = ("pen", "door", "hammer", "relocate")
TOLERANCE = 1e-6


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
def test_rollouts(hand, env):
    obs, action, reward, done = recorded(f"{hand}/rollout")
    horizon = action.shape[1]
    for i in range(3):
        restore(env, f"{hand}/rollout", i)
        for t in range(horizon):
            step_obs, step_reward, terminated, truncated, _ = env.step(action[i, t])
            np.testing.assert_allclose(step_obs, obs[i, t + 1], rtol=0, atol=TOLERANCE)
            assert abs(step_reward - reward[i, t]) < TOLERANCE
            assert terminated == done[i, t] and truncated == (t == horizon - 1)


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


@pytest.mark.parametrize("handle, head, bonus", [(0.03, 0.05, 0), (0.05, 0.03, 0), (0.05, 0.05, 2)])
def test_hammer_counts_as_lifted_when_both_ends_are_up(handle, head, bonus):
    """No probe lifts one end alone. Here all else lies still at one place, the nail as deep as it can be."""
    at = lambda name: types.SimpleNamespace(xpos=np.array([0, 0, {"Object": handle, "tool": head}.get(name, 0)]))
    data = types.SimpleNamespace(body=at, site=at, qvel=np.zeros(1))
    assert adroit.hammer_reward(data) == pytest.approx(bonus + 100 - 0.1 * handle - head)


# What d4rl's reset_model draws, in its order: where it is found in the model, and its range.
DRAWN = {
    "pen": (lambda m: 2 * np.arctan2(m.body("target").quat[1:3], m.body("target").quat[0]), [(-1, 1), (-1, 1)]),
    "door": (lambda m: m.body("frame").pos, [(-0.3, -0.2), (0.25, 0.35), (0.252, 0.35)]),
    "hammer": (lambda m: m.body("nail_board").pos[2:], [(0.1, 0.25)]),
    "relocate": (
        lambda m: [*m.body("Object").pos[:2], *m.site("target").pos],
        [(-0.15, 0.15), (-0.15, 0.3), (-0.2, 0.2), (-0.2, 0.2), (0.15, 0.35)],
    ),
}


def test_initial_states_are_distributed_as_d4rls(hand, env):
    drawn, ranges = DRAWN[hand]
    for seed in range(20):
        env.reset(seed=seed)
        rng, _ = gymnasium.utils.seeding.np_random(seed)
        expected = [rng.uniform(low, high) for low, high in ranges]
        np.testing.assert_allclose(drawn(env.unwrapped.model), expected, rtol=0, atol=1e-12)
    recorded = RECORDED[f"{hand}/rollout/state_qpos"], RECORDED[f"{hand}/rollout/state_qvel"]
    for values, each in zip((env.unwrapped.data.qpos, env.unwrapped.data.qvel), recorded):
        np.testing.assert_array_equal(each, np.tile(values, (3, 1)))


def test_normalized_scores():
    """What d4rl 1.1's get_normalized_score returns, times 100, for a return of 1000."""
    scores = dict(pen=30.320948986046826, door=35.9715112488389, hammer=9.754819929654657, relocate=23.734760058064246)
    for hand, score in scores.items():
        assert adroit.normalized_score(hand, 1000.0) == pytest.approx(score, rel=1e-12)
    assert common.load_task("pen-human-v1").score(1000.0, {}) == pytest.approx(scores["pen"], rel=1e-12)


def test_another_mujoco_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.3.0")
    with pytest.raises(common.Error, match=r"MuJoCo 3.3.0 .*: pip install mujoco==3\.1\.6 \(or, on Python 3\.13, 3\.2"):
        common.load_task("pen-human-v1")


# ------------------------------------------------------------------------------------------------------- the loader
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
D4RL_SHA256 = "cef8aff139f359e2736b42768225e806bc9b10a20c924fcd70181efd967607b5"


def test_transitions_equal_d4rls(tmp_path, rows):
    """Also where a file has columns, as d4rl reads them, and another process has locked it."""
    columns = {key: rows[key][:, None].astype(np.float64) for key in ("rewards", "terminals", "timeouts")}
    path = write_hdf5(tmp_path / "pen.hdf5", rows | columns)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        data = common.load_task("pen-human-v1").load(path)
    ours = [data.obs, data.action, data.next_obs, data.reward, data.mask == 0]
    assert hashlib.sha256(b"".join(values.tobytes() for values in ours)).hexdigest() == D4RL_SHA256
    assert all(values.dtype == np.float32 and len(values) == 122 for values in data)
    taken = {obs.tobytes(): action for obs, action in zip(rows["observations"], rows["actions"])}
    alive = data.mask == 1
    for next_obs, next_action in zip(data.next_obs[alive], data.next_action[alive]):
        np.testing.assert_array_equal(next_action, taken[next_obs.tobytes()])
    assert (~alive).sum() == 1  # the other drop came with a timeout, and d4rl leaves its row out


def test_what_is_no_data_of_a_hand_is_refused(tmp_path, rows):
    """In one sentence, which names the file."""
    path = write_hdf5(tmp_path / "some-file.hdf5", rows | {"timeouts": 2 * rows["timeouts"]})
    for damage in ("no dataset of pen-human-v1: its timeouts", "damaged"):
        with pytest.raises(common.Error, match=f"^error: {path} is {damage}[^\n]*$"):
            common.load_dataset(common.load_task("pen-human-v1"), str(path))
        path.write_bytes(path.read_bytes()[:-2000])
