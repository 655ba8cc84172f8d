"""Evaluation: every episode once, from the same states, whoever plays it and wherever."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import types

import evaluate
import jax
import numpy as np
import pytest
from conftest import ROOT, TASK, LocalEnvironments

import common

PENDULUM = common.load_task("Pendulum-v1", "data.npz")


def random_act(obs, keys):
    """Policies that act by their key alone."""
    return np.asarray(jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (1,), minval=-1)))(keys))


def watch(environments, seeds, num_episodes, act=random_act, update=7, eval_seed=0):
    """The scores, and the observations and keys [calls, seeds, slots, ...] that the policies were asked with."""
    seen = []
    watched = lambda obs, keys: seen.append((obs.copy(), np.asarray(keys))) or np.float32(act(obs, keys))
    scores = common.evaluate(watched, environments, seeds, update, num_episodes, eval_seed)
    return scores, *map(np.stack, zip(*seen))


@pytest.mark.slow
def test_the_numbers_do_not_depend_on_the_workers():
    expected, held = watch(LocalEnvironments(PENDULUM, 2, 3), (5, 6), 3), []
    for workers in (1, 4, 4):
        with common.Environments(PENDULUM, 2, 3, workers) as environments:
            for found, wanted in zip(watch(environments, (5, 6), 3), expected):
                np.testing.assert_array_equal(found, wanted)
        held = [*held, len(os.listdir("/dev/fd"))]
    assert held[1] == held[2] == held[0]  # by the first, the server that starts the processes


def test_an_episode_starts_by_its_numbers_alone():
    """By eval_seed, the training seed, the update and its own number; not by the policy, or who else is evaluated. Here
    where an environment draws from np.random and from its own generator."""
    environments = LocalEnvironments(common.load_task("antmaze-large-navigate"), 2, 1)
    broken = lambda obs, keys: np.full((*obs.shape[:2], 8), np.nan)  # its episodes end at once
    still = lambda obs, keys: np.zeros((*obs.shape[:2], 8))
    scores, starts, _ = watch(environments, (5, 6), 3, broken)
    assert np.isnan(scores).all() and starts.shape[:3] == (3, 2, 1)  # episodes, seeds, slots
    assert len(np.unique(starts.reshape(6, -1), axis=0)) == 6
    _, alone, _ = watch(environments, (6,), 2, still)
    np.testing.assert_array_equal(alone[0, 0], starts[:2, 1, 0])
    for changes in ({"eval_seed": 1}, {"update": 8}):
        _, others, _ = watch(environments, (5, 6), 3, broken, **changes)
        assert len(np.unique(np.concatenate([others, starts]).reshape(12, -1), axis=0)) == 12


def test_noise_depends_on_the_episode_and_its_step_alone():
    """Not on the episode before it in its slot: steps are counted from 0."""
    _, _, keys = watch(LocalEnvironments(PENDULUM, 1, 1), (5,), 2)
    starts = [int(np.random.SeedSequence((0, 5, 7, i)).generate_state(1)[0]) for i in range(2)]
    fold = lambda seed: jax.vmap(functools.partial(jax.random.fold_in, jax.random.PRNGKey(seed)))(np.arange(200))
    each = np.split(keys[:, 0, 0], [201])  # the state after the last of 200 steps is asked for, too
    for found, seed in zip(each, starts):
        np.testing.assert_array_equal(found[:200], fold(seed))


class Drawing:
    """An environment that draws its rewards from np.random, and whose seed says how many there are."""

    unwrapped = None

    def reset(self, seed):
        self.left = 1 + seed % 5
        return np.zeros(2), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(2), np.random.uniform(), not self.left, False, {}


@pytest.mark.parametrize("num_episodes", [11, 1])
def test_every_episode_is_played_once_and_scored_by_its_own_environment(num_episodes):
    """Three slots play episodes of unequal length; the score of episode i is that of its seed, whatever its neighbours
    draw. No slot waits while there is an episode to play."""
    starts = [int(np.random.SeedSequence((0, 5, 70, i)).generate_state(1)[0]) for i in range(num_episodes)]
    task = types.SimpleNamespace(make_env=Drawing, score=PENDULUM.score)
    scores, asked, _ = watch(LocalEnvironments(task, 1, 3), (5,), num_episodes, update=70)
    returns = [np.random.RandomState(start).uniform(size=1 + start % 5).sum() for start in starts]
    np.testing.assert_allclose(scores[0], returns)
    busy_until = [0, 0, 0]
    for start in starts:  # each goes to the slot that is free first, and takes a reset and 1 + start % 5 steps
        busy_until[busy_until.index(min(busy_until))] += 2 + start % 5
    assert len(asked) == max(busy_until)


def test_a_solved_episode_scores_100():
    """The cube is laid at its goal, and the environment says so at the end of that very step (success is judged at
    s')."""
    task = common.load_task(TASK)
    env = task.make_env()
    common.reset_env(env, 3)
    _, _, terminated, _, info = env.step(np.zeros(5))
    assert not terminated and task.score(-1.0, info) == 0
    data = env.unwrapped._data
    data.joint("object_joint_0").qpos[:3] = data.mocap_pos[0]
    data.joint("object_joint_0").qvel[:] = 0
    _, reward, terminated, _, info = env.step(np.zeros(5))
    assert terminated and reward == 0 and task.score(-1.0, info) == 100


def test_ogbenchs_simulator_forgets_how_it_settled():
    env = common.load_task(TASK).make_env()
    common.reset_env(env, 3)
    assert not env.unwrapped._data.qacc_warmstart.any()


NOTEBOOK = """
import common, gymnasium
mine = lambda: gymnasium.wrappers.TransformReward(gymnasium.make("Pendulum-v1"), lambda reward: 1.0)
gymnasium.register("Mine-v0", mine, max_episode_steps=3)
with common.Environments(common.load_task("Mine-v0", "data.npz"), 1, 2, 1) as environments:
    print(common.evaluate(lambda obs, keys: obs[..., :1], environments, [0], 10, 2))
"""


@pytest.mark.slow
def test_an_environment_of_a_notebooks_own_is_found_by_the_workers(tmp_path):
    """Its code is in no file. And TMPDIR is so long that no socket can be made there."""
    folder = tmp_path / ("f" * 60)
    folder.mkdir()
    env = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", NOTEBOOK], env=env, cwd=folder, capture_output=True, text=True)
    assert run.stdout == "[[3. 3.]]\n", run.stderr


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_evaluation():
    task = types.SimpleNamespace(make_env=lambda: os.kill(os.getpid(), signal.SIGKILL))
    with common.Environments(task, 1, 1, 1) as environments:
        with pytest.raises(common.Error, match="evaluation failed: an environment's process ended"):
            common.evaluate(random_act, environments, [5], 70, 1)


def test_workers_are_as_many_as_the_process_may_use(monkeypatch):
    """By its affinity and its container's quota, not by what the machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: {"/sys/fs/cgroup/cpu.max": "250000 100000"}[str(path)])
    assert common.usable_cores() == 2


@pytest.mark.filterwarnings("ignore:os.fork")
def test_four_episodes_are_filmed_however_few_are_played_at_a_time(tmp_path):
    """As many at a time as in the run's evaluations: with many seeds on few cores, two."""

    def make_env(**_):
        env = PENDULUM.make_env()
        env.render = lambda: np.zeros((16, 16, 3), np.uint8)
        return env

    task = types.SimpleNamespace(make_env=make_env, score=PENDULUM.score)
    film = evaluate.Film(task, 2, 2, tmp_path)
    scores = common.evaluate(lambda obs, keys: obs[..., :1], film, (7,), 70, 4)
    assert {path.name for path in tmp_path.iterdir()} == {f"episode-{i}.mp4" for i in range(4)} and not film.writers
    assert np.isfinite(scores).all()
