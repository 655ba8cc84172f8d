"""D4RL's Adroit tasks (d4rl 1.1) on today's Python: environments, scores and datasets without the d4rl package.

The physics is gymnasium-robotics', whose four hands are d4rl's own models. What that library changed is changed back:

    reward           the palm's distance to door handle, hammer or ball is a cost (there the sign is flipped)
    termination      dropping the pen ends the episode (there it never ends)
    episode length   100 steps for pen (there 200)

Observations (float64), actions in [-1, 1] and the distributions of initial states are the same in both.
"""

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import h5py
import numpy as np

DATASET_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/hand_dapg_v1"
MUJOCO_VERSION = "3.1.6"
MUJOCO_PYTHON_3_13 = "3.2.6"


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b))


# Drop and rewards are read from the simulator's state after a step (mujoco.MjData).


def pen_dropped(data: Any) -> bool:
    """Whether the pen fell out of the hand: its centre is less than 7.5 cm high."""
    return bool(data.body("Object").xpos[2] < 0.075)


def pen_reward(data: Any) -> float:
    """Hold the pen at its place (m) and turn it to the target's direction (cosine); costs 5 when dropped."""
    pen = data.site("object_top").xpos - data.site("object_bottom").xpos
    target = data.site("target_top").xpos - data.site("target_bottom").xpos
    cosine = float(pen @ target / (np.linalg.norm(pen) * np.linalg.norm(target)))
    distance = _distance(data.body("Object").xpos, data.site("eps_ball").xpos)
    reward = cosine - distance
    if distance < 0.075:
        reward += 10 * (cosine > 0.9) + 50 * (cosine > 0.95)
    return reward - 5 * pen_dropped(data)


def door_reward(data: Any) -> float:
    """Bring the palm to the handle (m), turn the hinge to 90 degrees (rad); bonuses as the door opens."""
    hinge = float(data.joint("door_hinge").qpos[0])
    reward = -0.1 * _distance(data.site("S_grasp").xpos, data.site("S_handle").xpos)
    reward -= 0.1 * (hinge - 1.57) ** 2
    reward -= 1e-5 * float(np.sum(data.qvel**2))
    return reward + 2 * (hinge > 0.2) + 8 * (hinge > 1.0) + 10 * (hinge > 1.35)


def hammer_reward(data: Any) -> float:
    """Palm to hammer, head to nail, nail into the board (m); bonuses for a lifted hammer and a driven nail."""
    hammer, head, nail = data.body("Object").xpos, data.site("tool").xpos, data.site("S_target").xpos
    depth_left = _distance(nail, data.site("nail_goal").xpos)
    reward = -0.1 * _distance(data.site("S_grasp").xpos, hammer)
    reward -= _distance(head, nail) + 10 * depth_left
    reward -= 1e-2 * float(np.linalg.norm(data.qvel))
    lifted = hammer[2] > 0.04 and head[2] > 0.04
    return float(reward + 2 * lifted + 25 * (depth_left < 0.02) + 75 * (depth_left < 0.01))


def relocate_reward(data: Any) -> float:
    """Palm to ball, then the lifted ball (and the palm) to the target (m); bonuses close to the target."""
    ball, palm, target = data.body("Object").xpos, data.site("S_grasp").xpos, data.site("target").xpos
    to_target = _distance(ball, target)
    reward = -0.1 * _distance(palm, ball)
    if ball[2] > 0.04:
        reward += 1 - 0.5 * _distance(palm, target) - 0.5 * to_target
    return reward + 10 * (to_target < 0.1) + 20 * (to_target < 0.05)


class Hand(NamedTuple):
    """One of the four tasks: sizes, steps per episode, d4rl's reference returns (random, expert) and its reward."""

    obs_dim: int
    action_dim: int
    horizon: int
    min_return: float
    max_return: float
    reward: Callable[[Any], float]


HANDS = {
    "pen": Hand(45, 24, 100, 96.262799, 3076.8331017826877, pen_reward),
    "door": Hand(39, 28, 200, -56.512833, 2880.5693087298737, door_reward),
    "hammer": Hand(46, 26, 200, -274.856578, 12794.134825156867, hammer_reward),
    "relocate": Hand(39, 30, 200, -6.425911, 4233.877797728884, relocate_reward),
}
# Dataset name -> hand.
TASKS = {f"{hand}-{source}-v1": hand for hand in HANDS for source in ("human", "cloned", "expert")}


class D4RLReward(gymnasium.Wrapper):
    """Gives one of gymnasium-robotics' hands d4rl's reward and termination, computed from the simulator's state."""

    def __init__(self, env: gymnasium.Env, hand: str):
        super().__init__(env)
        self.hand = hand

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, _, _, truncated, info = self.env.step(action)
        data = self.unwrapped.data
        terminated = self.hand == "pen" and pen_dropped(data)
        return obs, HANDS[self.hand].reward(data), terminated, truncated, info


def check_mujoco_version(version: str | None = None) -> str:
    """What to say of the installed MuJoCo (or the given version), in one sentence; nothing, "", of 3.1.6.

    The first wheel for Python 3.13, 3.2.6, reproduced d4rl's rollouts as well; with 3.2.7 those of door and relocate
    differ. Raises ValueError from 3.3 on, where all four hands move differently from the first contacts on.
    """
    version = version or importlib.metadata.version("mujoco")
    wanted = f"pip install mujoco=={MUJOCO_VERSION} (or, on Python 3.13, {MUJOCO_PYTHON_3_13})"
    if tuple(int(part) for part in version.split(".")[:2]) >= (3, 3):
        raise ValueError(f"MuJoCo {version} simulates Adroit's contacts differently from d4rl: {wanted}")
    if version == MUJOCO_PYTHON_3_13:
        return f"MuJoCo {version} stands in for {MUJOCO_VERSION}, and matches d4rl's recordings as closely"
    if version != MUJOCO_VERSION:
        return f"MuJoCo {version} may simulate Adroit's contacts differently from d4rl: {wanted}"
    return ""


def make_env(hand: str, render_mode: str | None = None) -> gymnasium.Env:
    """Makes d4rl 1.1's environment of a hand: "pen", "door", "hammer" or "relocate".

    Observations are float64 [obs_dim], actions are clipped to [-1, 1]. Dropping the pen terminates, the horizon
    truncates. `info["success"]` is d4rl's `goal_achieved`. Episodes depend on `reset(seed=)` and the actions alone.
    """
    # On import the library prints that older releases had other rewards. Ours do not depend on its release.
    from farama_notifications import notifications

    notifications.pop("gymnasium_robotics", None)
    # Imported here because MuJoCo reads MUJOCO_GL when it is imported.
    from gymnasium_robotics.envs import adroit_hand

    env = getattr(adroit_hand, f"AdroitHand{hand.capitalize()}Env")(render_mode=render_mode)
    return gymnasium.wrappers.TimeLimit(D4RLReward(env, hand), HANDS[hand].horizon)


def normalized_score(hand: str, episode_return: float) -> float:
    """d4rl 1.1's normalized score in percent: 0 is a random policy's return, 100 the expert's."""
    low, high = HANDS[hand].min_return, HANDS[hand].max_return
    return (episode_return - low) / (high - low) * 100


def _read(file: h5py.File, key: str, width: int | None) -> np.ndarray:
    """One array of a file: float32 [N, width], or [N] where width is None. Raises ValueError where it is not that."""
    if not isinstance(file.get(key), h5py.Dataset):
        raise ValueError(f'"{key}" is missing')
    values = np.asarray(file[key][()])
    if values.dtype.kind not in "fbiu":
        raise ValueError(f'"{key}" is not numeric but {values.dtype}')
    if width is None and values.shape[1:] == (1,):  # d4rl takes columns, too
        values = values[:, 0]
    expected = (width,) if width else ()
    if not values.shape or values.shape[1:] != expected:
        raise ValueError(f'"{key}" has shape {list(values.shape)}, not {["N", *expected]}'.replace("'", ""))
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f'"{key}" holds values that are not finite')
    return values


def load_transitions(path: str | os.PathLike, hand: str) -> dict[str, np.ndarray]:
    """Reads D4RL's hdf5 layout into the transitions of d4rl 1.1's `qlearning_dataset`, all float32.

    Rows that end in a timeout are dropped, since the observation after them was not stored; terminal rows are kept,
    with a next_obs and next_action that belong to the next episode and are masked. The last row has no successor.

    Gives obs, next_obs [N, obs_dim]; action, next_action [N, action_dim], as stored (next_action is the one taken at
    next_obs); reward [N]; mask [N], 0 at terminals and 1 elsewhere. Raises ValueError, naming the file and its fault.
    """
    widths = {"observations": HANDS[hand].obs_dim, "actions": HANDS[hand].action_dim}
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    try:
        with h5py.File(path, "r", locking=False) as file:  # some NFS have no locks, and reading needs none
            obs, action, reward, terminal, timeout = arrays = [_read(file, key, widths.get(key)) for key in keys]
    except ValueError as error:
        raise ValueError(f"{path} is not D4RL's {hand} data: {error}")
    except Exception as error:  # a damaged file can make HDF5 raise anything
        raise ValueError(f"{path} is not an HDF5 file, or it is cut short or damaged: {error}")
    if len(lengths := {len(values) for values in arrays}) > 1:
        raise ValueError(f"{path}: {', '.join(keys)} differ in length: {lengths}")
    if not np.isin([terminal, timeout], (0, 1)).all():
        raise ValueError(f"{path}: terminals and timeouts must be 0 or 1")
    kept = timeout[:-1] == 0
    if not kept.any():
        raise ValueError(f"{path}: no transitions")
    # A kept row that is not terminal is followed by the next row of the same episode, so the shift must come first.
    rows = {"obs": obs[:-1], "action": action[:-1], "reward": reward[:-1], "mask": 1 - terminal[:-1]}
    return {key: values[kept] for key, values in (rows | {"next_obs": obs[1:], "next_action": action[1:]}).items()}
