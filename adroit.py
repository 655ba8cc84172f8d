"""D4RL's Adroit tasks (d4rl 1.1) on today's Python: environments and scores without the d4rl package.

The physics is that of gymnasium-robotics, whose four hands are d4rl's. What that library changed is changed back:

    reward           the palm's distance to door handle, hammer or ball is a cost (there the sign is flipped)
    termination      dropping the pen ends the episode (there it never ends)
    episode length   100 steps for pen (there 200)

Observations (float64), actions in [-1, 1] and the distributions of initial states are the same in both.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np

MUJOCO_VERSIONS = ("3.1.6", "3.2.6")


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
    """Bring the palm to the handle (m) and turn the hinge to 90 degrees (rad); bonuses as the door opens."""
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
    """One of the four tasks: steps per episode, d4rl's reference returns (random, expert) and its reward."""

    horizon: int
    min_return: float
    max_return: float
    reward: Callable[[Any], float]


HANDS = {
    "pen": Hand(100, 96.262799, 3076.8331017826877, pen_reward),
    "door": Hand(200, -56.512833, 2880.5693087298737, door_reward),
    "hammer": Hand(200, -274.856578, 12794.134825156867, hammer_reward),
    "relocate": Hand(200, -6.425911, 4233.877797728884, relocate_reward),
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


def check_mujoco():
    """Raises ValueError if the installed MuJoCo is not known to reproduce d4rl's rollouts. (3.2.6 is the first with a
    wheel for Python 3.13. With 3.2.7 door and relocate differ, from 3.3 on all hands.)"""
    version, (wanted, on_3_13) = importlib.metadata.version("mujoco"), MUJOCO_VERSIONS
    if version not in MUJOCO_VERSIONS:
        raise ValueError(f"MuJoCo {version} simulates Adroit's contacts differently from d4rl: "
                         f"pip install mujoco=={wanted} (or, on Python 3.13, {on_3_13})")  # fmt: skip


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
