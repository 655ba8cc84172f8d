"""Evaluation: every episode once, from the same states, whoever plays it and wherever."""

import multiprocessing
import os
import time

import jax
import numpy as np
import pytest
from conftest import TASK

import common


def random_act(obs, keys):
    """Random policies, one per seed, which the seeds' index scales."""
    scale = np.arange(1, 1 + len(obs))[:, None, None] / len(obs)
    return scale * jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (5,), minval=-1)))(keys)


def play_all(act, num_seeds, num_episodes, slots, workers, task=TASK, eval_seed=0):
    """The scores of the policies, from environments of their own."""
    environments = common.Environments(common.load_task(task), num_seeds * slots, workers)
    try:
        return common.evaluate(act, environments, num_seeds, num_episodes, eval_seed)
    finally:
        environments.close()


def observations_of(num_seeds, num_episodes, slots, workers, act=random_act, **kwargs):
    """The scores, and (observations, keys) of every call of the policy."""
    seen = []

    def watched(obs, keys):
        seen.append((obs.copy(), np.asarray(keys)))
        return np.asarray(act(obs, keys), np.float32)

    scores = play_all(watched, num_seeds, num_episodes, slots, workers, **kwargs)
    return scores, seen


def test_the_numbers_do_not_depend_on_the_workers():
    alone, seen_alone = observations_of(2, 3, 2, workers=1)
    many, seen_many = observations_of(2, 3, 2, workers=3)
    np.testing.assert_array_equal(alone, many)
    assert len(seen_alone) == len(seen_many) >= 400  # two episodes of 200 steps in the first slot
    for (obs, keys), (obs_many, keys_many) in zip(seen_alone, seen_many):
        np.testing.assert_array_equal(obs, obs_many)
        np.testing.assert_array_equal(keys, keys_many)


@pytest.mark.parametrize("task", [TASK, "antmaze-large-navigate"])
def test_episodes_start_alike_for_every_policy_and_seed(task):
    dims = {TASK: 5, "antmaze-large-navigate": 8}[task]
    still = lambda obs, keys: np.zeros((*obs.shape[:2], dims), np.float32)
    broken = lambda obs, keys: np.full((*obs.shape[:2], dims), np.nan, np.float32)  # its episodes end at once
    first = {}
    for act in (still, broken):
        scores, seen = observations_of(2, 4, 2, workers=2, act=act, task=task)
        starts = [obs for obs, _ in seen[: 1 if act is still else 2]]
        first[act] = np.stack(starts)
    np.testing.assert_array_equal(first[still][0], first[broken][0])
    np.testing.assert_array_equal(first[broken][:, 0], first[broken][:, 1])  # the seeds' episodes start alike
    assert len(np.unique(first[broken][:, 0].reshape(4, -1), axis=0)) == 4  # the episodes differ
    assert np.isnan(scores).all()
    _, seen = observations_of(1, 1, 1, workers=1, act=broken, task=task, eval_seed=1)
    assert (seen[0][0][0, 0] != first[broken][0, 0, 0]).any()


def test_every_episode_is_played_once_and_scored_by_its_own_environment(monkeypatch):
    """Three slots play seven episodes of unequal length; the score of episode i is that of its seed."""
    starts = [int(np.random.SeedSequence((0, i)).generate_state(1)[0]) for i in range(7)]

    class Fake:
        num_slots, started, left = 3, [], {}

        def step(self, commands):
            answers = {}
            for slot, command in commands.items():
                if isinstance(command, int):
                    self.started.append(command)
                    self.left[slot] = [1 + command % 5, float(command % 97)]
                    answers[slot] = np.zeros(2), None
                else:
                    self.left[slot][0] -= 1
                    answers[slot] = np.zeros(2), self.left[slot][1] if not self.left[slot][0] else None
            return answers

    fake = Fake()
    scores = common.evaluate(lambda obs, keys: np.zeros((1, 3, 2)), fake, 1, 7)
    assert sorted(fake.started) == sorted(starts)
    np.testing.assert_array_equal(scores[0], [start % 97 for start in starts])


def test_keys_are_made_of_seed_episode_and_step():
    episode, step = np.array([[0, 1], [0, 1]]), np.array([[0, 0], [0, 5]])
    keys = np.asarray(common.episode_keys(0, episode, step))
    fold = lambda *path: np.asarray(
        jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(path[0]), path[1]), path[2])
    )
    np.testing.assert_array_equal(keys, [[fold(0, 0, 0), fold(0, 1, 0)], [fold(0, 0, 0), fold(0, 1, 5)]])
    assert (keys != np.asarray(common.episode_keys(1, episode, step))).any(-1).all()


def test_a_solved_episode_scores_100():
    """The cube is laid at its goal, and the environment says so at the end of that very step (success is judged at
    s')."""
    env = common.make_env(common.load_task(TASK))
    common.reset_env(env, 3)
    _, _, terminated, _, info = env.step(np.zeros(5))
    assert not terminated and not info["success"]
    data = env.unwrapped._data
    data.joint("object_joint_0").qpos[:3] = data.mocap_pos[0]
    data.joint("object_joint_0").qvel[:] = 0
    _, reward, terminated, _, info = env.step(np.zeros(5))
    assert terminated and info["success"] and reward == 0


def test_an_episode_repeats_exactly():
    env, actions = common.make_env(common.load_task("scene-play")), np.random.default_rng(0).uniform(-1, 1, (60, 5))
    runs = []
    for _ in range(2):
        obs = [common.reset_env(env, 11)]
        for action in actions:
            obs.append(env.step(action)[0])
        runs.append(np.stack(obs))
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("how", ["killed", "hangs", "fails"])
def test_a_worker_that_fails_ends_the_evaluation_with_a_sentence(how):
    environments = common.Environments(common.load_task("antmaze-large-navigate"), 2, 2)
    environments.step({0: 1, 1: 2})
    action = np.zeros(8)
    if how == "killed":
        environments.workers[1].kill()
    elif how == "hangs":
        os.kill(environments.workers[1].pid, 19)  # SIGSTOP
    else:
        action = np.zeros(3)  # of the wrong size
    begun = time.monotonic()
    with pytest.raises(common.Error, match="evaluation failed"):
        environments.step({0: np.zeros(8), 1: action}, patience=2)
    assert time.monotonic() - begun < 10
    assert not multiprocessing.active_children() or not any(worker.is_alive() for worker in environments.workers)
