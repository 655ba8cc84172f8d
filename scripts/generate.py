"""Generates OGBench's `*-play` datasets of cube, scene and puzzle with the scripted oracles in its package.

    python scripts/generate.py scene-play-v0 100 scene.npz

The recipe is that of OGBench's `data_gen_scripts/generate_manipspace.py`: episodes of 1001 steps, oracle noise 0.1 with
smoothing 0.5, a new target whenever the oracle is done. That script never uses its seed; here episode i depends on
i alone, so 100 episodes are the first 100 of 1000, whatever the number of processes.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import signal
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gymnasium
import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

EPISODE_STEPS = 1001
NOISE = dict(noise=0.1, noise_smoothing=0.5)
STACKING = dict(single=(0, 0), double=(0, 0.25), triple=(0.05, 0.35), quadruple=(0.1, 0.5), octuple=(0, 0.35))


@dataclasses.dataclass(frozen=True)
class Args:
    dataset: tyro.conf.Positional[str]  # name of the published dataset, like scene-play-v0
    num_episodes: tyro.conf.Positional[int]  # how many to generate
    path: tyro.conf.Positional[pathlib.Path | None] = None  # file to write (None: <dataset>.npz here)


@functools.cache
def collection_env(dataset: str) -> gymnasium.Env:
    """OGBench's data-collection environment of `dataset`: one per process, since making it takes a second."""
    import ogbench  # noqa: F401 (registers its environments)

    free = {"terminate_at_goal": False, "mode": "data_collection", "disable_env_checker": True}
    return gymnasium.make(dataset.replace("-play", ""), max_episode_steps=EPISODE_STEPS, **free)


def make_oracles(env: gymnasium.Env, dataset: str) -> dict:
    """The oracle of each kind of target that the environment can set."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    closed = {"gripper_always_closed": True} if dataset.startswith("puzzle") else {}
    return {
        "cube": cube_plan.CubePlanOracle(env=env, **NOISE),
        "button": button_plan.ButtonPlanOracle(env=env, **closed, **NOISE),
        "drawer": drawer_plan.DrawerPlanOracle(env=env, **NOISE),
        "window": window_plan.WindowPlanOracle(env=env, **NOISE),
    }


def healthy(dataset: str, qpos: np.ndarray) -> bool:
    """Whether the block of a scene [steps, qpos_dim] stays in view: not far right, and far left only in the drawer."""
    if not dataset.startswith("scene"):
        return True
    y, z = qpos[:, 15], qpos[:, 16]
    return not ((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any()


def collect_episode(dataset: str, episode: int) -> dict[str, np.ndarray]:
    """One episode as the published files hold it: a dict of arrays [1001, ...], a pure function of its arguments.

    OGBench's oracles draw from the global np.random, so it is seeded here: call this in a process of its own.
    """
    env = collection_env(dataset)
    for attempt in itertools.count():  # an episode that loses its block is generated again
        attempt_seed = int(np.random.SeedSequence((0, episode, attempt)).generate_state(1)[0])
        np.random.seed(attempt_seed)
        obs, info = env.reset(seed=attempt_seed)
        low, high = STACKING.get(dataset.split("-")[1], (0.5, 0.5))
        p_stack = np.random.uniform(low, high) if low < high else low
        oracles = make_oracles(env, dataset)
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        steps, done = collections.defaultdict(list), False
        while not done:
            np.random.rand()  # the official script draws here too, to decide on a random action that it never takes
            action = np.clip(oracle.select_action(obs, info), -1, 1)
            next_obs, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            if oracle.done:
                target_obs, target_info = env.unwrapped.set_new_target(p_stack=p_stack)
                oracle = oracles[target_info["privileged/target_task"]]
                oracle.reset(target_obs, target_info)
            row = {"observations": obs, "actions": action, "terminals": done}
            row |= {key: info[f"prev_{key}"] for key in ("qpos", "qvel", "button_states") if f"prev_{key}" in info}
            for key, value in row.items():
                steps[key].append(value)
            obs = next_obs
        if healthy(dataset, np.array(steps["qpos"])):
            dtypes = {"terminals": bool, "button_states": np.int64}
            return {key: np.array(values, dtypes.get(key, np.float32)) for key, values in steps.items()}


def main(args: Args):
    """Makes the episodes on all cores and writes the file, which appears whole or not at all.

    Its keys, dtypes and shapes are those of the published files, so that ogbench's own loader reads it.
    """
    if not common.can_generate(f"{args.dataset}.npz") or args.num_episodes < 1:
        raise common.Error(f"{args.num_episodes} episodes of {args.dataset} cannot be made: "
                           f"give a set like scene-play-v0, of cube, scene or puzzle")  # fmt: skip
    path = args.path or pathlib.Path(f"{args.dataset}.npz")
    if path.is_dir() or not os.access(path.parent, os.W_OK):  # better now than after the work
        raise common.Error(f"cannot write {path}: give another path, in a folder that is there and yours")
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(common.usable_cores(), context, common.follow_parent) as pool:
        episodes = pool.map(functools.partial(collect_episode, args.dataset), range(args.num_episodes))
        episodes = list(tqdm(episodes, f"generating {args.dataset}", args.num_episodes, unit="episode"))
    temporary = path.with_suffix(".tmp.npz")
    try:
        np.savez_compressed(temporary, **{key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]})
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise common.Error(f"cannot write {path} ({error.strerror}): make room there, or give another path")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback, and its processes follow
    main(tyro.cli(Args))
