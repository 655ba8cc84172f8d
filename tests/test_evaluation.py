"""Evaluation: every episode once, from the same states, whoever plays it and wherever."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import gymnasium
import jax
import numpy as np
import pytest
from conftest import TASK

import common


def random_act(obs, keys):
    """Random policies, one per seed, which the seeds' index scales."""
    scale = np.arange(1, 1 + len(obs))[:, None, None] / len(obs)
    return scale * jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (5,), minval=-1)))(keys)


def play_all(act, num_seeds, num_episodes, slots, workers, task=TASK, update=7, eval_seed=0):
    """The scores of the policies, from environments of their own."""
    environments = common.Environments(common.load_task(task), num_seeds * slots, workers)
    try:
        return common.evaluate(act, environments, range(num_seeds), update, num_episodes, eval_seed)
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
def test_episodes_start_alike_for_every_policy(task):
    """They differ by the training seed, the update, the episode and eval_seed, and by nothing else."""
    dims = {TASK: 5, "antmaze-large-navigate": 8}[task]
    still = lambda obs, keys: np.zeros((*obs.shape[:2], dims), np.float32)
    broken = lambda obs, keys: np.full((*obs.shape[:2], dims), np.nan, np.float32)  # its episodes end at once
    first = {}
    for act in (still, broken):
        scores, seen = observations_of(2, 4, 2, workers=2, act=act, task=task)
        starts = [obs for obs, _ in seen[: 1 if act is still else 2]]
        first[act] = np.stack(starts)
    np.testing.assert_array_equal(first[still][0], first[broken][0])
    assert len(np.unique(first[broken].reshape(8, -1), axis=0)) == 8  # two seeds of four episodes
    assert np.isnan(scores).all()
    for changes in ({"eval_seed": 1}, {"update": 8}):
        _, seen = observations_of(1, 1, 1, workers=1, act=broken, task=task, **changes)
        assert (seen[0][0][0, 0] != first[broken][0, 0, 0]).any()


def test_every_episode_is_played_once_and_scored_by_its_own_environment(monkeypatch):
    """Three slots play eleven episodes of unequal length; the score of episode i is that of its seed. No slot waits
    while there is an episode to play."""
    starts = [int(np.random.SeedSequence((0, 5, 70, i)).generate_state(1)[0]) for i in range(11)]

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

    fake, calls = Fake(), []
    scores = common.evaluate(lambda obs, keys: calls.append(0) or np.zeros((1, 3, 2)), fake, [5], 70, 11)
    assert fake.started == starts
    np.testing.assert_array_equal(scores[0], [start % 97 for start in starts])
    busy_until = [0, 0, 0]
    for start in starts:  # each goes to the slot that is free first, and takes a reset and 1 + start % 5 steps
        first = busy_until.index(min(busy_until))
        busy_until[first] += 2 + start % 5
    assert len(calls) == max(busy_until)


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("num_episodes", [1, 6, 20, 50])
def test_about_16_episodes_are_played_at_a_time(num_seeds, num_episodes):
    """As few seats as that allows are empty in the last round."""
    slots = common.slots_per_seed(num_seeds, num_episodes)
    rounds = -(-num_episodes // slots)
    assert 1 <= slots <= num_episodes and slots == -(-num_episodes // rounds)
    assert slots * num_seeds <= max(24, num_seeds)
    assert slots * num_seeds >= min(12, num_seeds * num_episodes)


def test_a_policys_noise_does_not_depend_on_the_episodes_before():
    """In one slot or in two, episode 1 draws by the same keys: its steps are counted from 0."""
    _, alone = observations_of(1, 2, 1, workers=1)
    _, beside = observations_of(1, 2, 2, workers=1)
    second = [keys[0, 0] for _, keys in alone[-len(beside) :]]
    np.testing.assert_array_equal(second[:150], [keys[0, 1] for _, keys in beside[:150]])


def test_keys_are_made_of_the_episodes_seed_and_step():
    seed, step = np.array([[8, 9], [8, 2**32 - 1]], np.uint32), np.array([[0, 0], [0, 5]])
    keys = np.asarray(common.episode_keys(seed, step))
    fold = lambda seed, step: np.asarray(jax.random.fold_in(jax.random.PRNGKey(seed), step))
    np.testing.assert_array_equal(keys, [[fold(8, 0), fold(9, 0)], [fold(8, 0), fold(2**32 - 1, 5)]])


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


class Drawing:
    """An environment, so far as `common.Slots` asks for one, that draws from np.random when it is reset and stepped."""

    unwrapped = None

    def reset(self, seed):
        return np.random.uniform(size=2), {}

    def step(self, action):
        return np.random.uniform(size=2), 0.0, False, False, {}


def test_an_episode_draws_the_same_whoever_its_neighbours_are(monkeypatch):
    monkeypatch.setattr(common, "make_env", lambda task: Drawing())
    alone, together = common.Slots(common.load_task(TASK), [1]), common.Slots(common.load_task(TASK), [0, 1])
    for other, command in [(7, 3), (np.zeros(5), np.zeros(5)), (np.zeros(5), np.zeros(5))]:
        obs, answers = alone.step({1: command})[1][0], together.step({0: other, 1: command})
        np.testing.assert_array_equal(obs, answers[1][0])
        assert (obs != answers[0][0]).all()


FAULTS = {"killed": "EOFError|BrokenPipe|ConnectionReset", "hangs": "no answer in 2 s", "raises": "ValueError"}
FAULTS |= {"nan reward": "not finite", "nan observation": "not finite"}


class Faulty(gymnasium.Wrapper):
    """An environment that fails `how` in the third step of every episode that starts from one of `seeds`."""

    def __init__(self, env, how, seeds):
        super().__init__(env)
        self.how, self.faulty_seeds = how, seeds

    def reset(self, seed):
        self.steps, self.faulty = 0, seed in self.faulty_seeds
        return self.env.reset(seed=seed)

    def step(self, action):
        self.steps += 1
        obs, reward, *rest = self.env.step(action)
        if self.faulty and self.steps == 3:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "hangs":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif self.how == "raises":
                raise ValueError("a fault")
            elif self.how == "nan reward":
                reward = np.nan
            else:
                obs = obs * np.nan
        return obs, reward, *rest


def play_faulty(connection, task, slots, how, seeds):
    """`common.play`, in a process where environments are faulty."""
    make_env = common.make_env
    common.make_env = lambda task: Faulty(make_env(task), how, seeds)
    common.play(connection, task, slots)


@pytest.mark.parametrize("how", FAULTS)
def test_a_failing_episode_ends_the_evaluation_by_its_name(how, monkeypatch):
    """Two seeds of three slots each in two workers. Each seed's episode 1 fails, that of seed 8 first."""
    starts = [int(np.random.SeedSequence((0, seed, 70, 1)).generate_state(1)[0]) for seed in (7, 8)]
    monkeypatch.setattr(common, "play", functools.partial(play_faulty, how=how, seeds=starts))
    environments = common.Environments(common.load_task("antmaze-large-navigate"), 6, 2)
    step = environments.step
    step({slot: 1 for slot in range(6)})  # all are made: from here on each answer is quick
    environments.step = functools.partial(step, patience=2)
    act = lambda obs, keys: np.zeros((2, 3, 8), np.float32)
    begun = time.monotonic()
    with pytest.raises(common.Error, match=f"evaluation failed in episode 1 of seed 8 .*({FAULTS[how]})"):
        common.evaluate(act, environments, (7, 8), 70, 5)
    assert time.monotonic() - begun < 10
    assert not any(worker.is_alive() for worker in environments.workers)


def play_slowly(connection, task, slots):
    """`common.play`, where a step takes a second of the time in which the process runs."""
    step = common.Slots.step
    common.Slots.step = lambda self, commands: [time.sleep(0.01) for _ in range(100)] and step(self, commands)
    common.play(connection, task, slots)


def wait_for_a_slow_answer():
    """The main program of the test below."""
    common.play = play_slowly
    environments = common.Environments(common.load_task("antmaze-large-navigate"), 1, 1)
    environments.step({0: 1})
    print("made", flush=True)
    environments.step({0: np.zeros(8, np.float32)}, patience=3)
    environments.close()


def test_time_in_which_all_is_suspended_does_not_count():
    """As on a laptop that is shut for longer than a run waits for an answer."""
    command = [sys.executable, "-c", "import test_evaluation; test_evaluation.wait_for_a_slow_answer()"]
    process = subprocess.Popen(
        command, cwd=pathlib.Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "made\n", process.communicate()
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.killpg(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
