"""generate.py: what an episode is made of, in an environment where every step reaches its target."""

import types

import generate
import numpy as np
import pytest

import common


@pytest.fixture
def env(monkeypatch):
    """Records the seeds of its resets and the p_stack of its targets; each oracle is done after each step."""
    env = types.SimpleNamespace(seeds=[], p_stack=[], _control_timestep=0.05)
    info = {"privileged/target_task": "cube", "prev_qpos": np.zeros(20)}
    env.reset = lambda seed: env.seeds.append(seed) or (np.zeros(2), info)
    env.step = lambda action: (np.zeros(2), 0.0, False, len(env.p_stack) % 3 == 2, info)
    env.set_new_target = lambda p_stack: env.p_stack.append(p_stack) or (np.zeros(2), info)
    env.unwrapped = env
    oracle = types.SimpleNamespace(reset=lambda obs, info: None, select_action=lambda obs, info: np.zeros(1), done=True)
    monkeypatch.setattr(generate, "collection_env", lambda dataset: env)
    monkeypatch.setattr(generate, "make_oracles", lambda env, dataset: {"cube": oracle})
    return env


@pytest.mark.parametrize("dataset, high", [("cube-single", 0), ("cube-double", 0.25), ("scene", None)])
def test_cubes_are_stacked_as_often_as_in_ogbenchs_own_script(dataset, high, env):
    """With a probability that is drawn by the episode's seed, in cube-double from U[0, 0.25]."""
    generate.collect_episode(f"{dataset}-play-v0", 0)
    draw = np.random.RandomState(env.seeds[0]).uniform(0, high) if high else high
    assert env.p_stack == 3 * [0.5 if draw is None else draw]


def test_every_oracle_has_the_noise_of_ogbenchs_own_script():
    env = types.SimpleNamespace(_control_timestep=0.05)
    env.unwrapped = env
    for dataset in ("scene-play-v0", "puzzle-3x3-play-v0"):
        oracles = generate.make_oracles(env, dataset)
        noise = {kind: (oracle._noise, oracle._noise_smoothing) for kind, oracle in oracles.items()}
        assert noise == dict.fromkeys(("cube", "button", "drawer", "window"), (0.1, 0.5))


def test_an_episode_that_is_refused_is_made_from_another_seed(env, monkeypatch):
    answers = iter([False, False, True])
    monkeypatch.setattr(generate, "healthy", lambda dataset, qpos: next(answers))
    generate.collect_episode("scene-play-v0", 0)
    assert len(set(env.seeds)) == len(env.seeds) == 3


def test_what_cannot_be_made_or_written_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(generate.concurrent.futures, "ProcessPoolExecutor", None)
    for dataset, episodes in (("scene-play-v0", 0), ("antmaze-large-navigate-v0", 1)):
        with pytest.raises(common.Error, match=f"{episodes} episodes of {dataset} cannot be made"):
            generate.main(generate.Args(dataset, episodes, tmp_path / "x.npz"))
    for path in (tmp_path / "nowhere" / "x.npz", tmp_path):
        with pytest.raises(common.Error, match=f"cannot write {path}"):
            generate.main(generate.Args("scene-play-v0", 1, path))
