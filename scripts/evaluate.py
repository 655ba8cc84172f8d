"""Evaluates a run's policies again: with other numbers of samples (the paper's Table 4), or on video.

    python scripts/evaluate.py runs/cube-single-play/mfql/<time> --num-samples 1 2 4 8 16 32 64 128
    python scripts/evaluate.py runs/cube-single-play/mfql/<time> --capture-video

The first writes num_samples.csv into the run's folder, the second episode-0.mp4 and three more.
Nothing is trained. The episodes are those of the run's last evaluation: the same initial states and noise.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import sys
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # leaves the GPU to training

import imageio_ffmpeg
import numpy as np
import pandas as pd
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from run import hold, load_run, read_rows, write_file


@dataclasses.dataclass(frozen=True)
class Args:
    folder: tyro.conf.Positional[pathlib.Path]  # of a run, like runs/<task>/<algorithm>/<time>
    num_samples: tuple[int, ...] = ()  # evaluate with MaxQ over this many actions, one number after another
    capture_video: bool = False  # film the first four episodes of the first seed
    num_workers: int | None = None  # processes that step the environments (None: one per core)


class Film(common.Slots):
    """Environments that film what happens in them, an mp4 per episode."""

    def __init__(self, task: common.Task, num_envs: int, num_slots: int, folder: pathlib.Path):
        size = {"width": 320, "height": 320} if isinstance(task, common.OGBench) else {}
        super().__init__(task, list(range(num_envs)), render_mode="rgb_array", **size)
        self.num_slots, self.folder, self.writers, self.numbers = num_slots, folder, {}, itertools.count()

    def step(self, commands: dict) -> dict:
        """See `common.Slots`; a film begins and ends with its episode."""
        answers = super().step(commands)
        for slot, (_, score) in answers.items():
            env = self.envs[slot]
            frame = np.ascontiguousarray(env.render())
            if isinstance(commands[slot], int):  # the episodes begin in their order
                path, fps = self.folder / f"episode-{next(self.numbers)}.mp4", env.metadata.get("render_fps", 20)
                self.writers[slot] = imageio_ffmpeg.write_frames(path, frame.shape[1::-1], fps=fps)
                self.writers[slot].send(None)
            self.writers[slot].send(frame)
            if score is not None:
                self.writers.pop(slot).close()
        return answers


def main(args: Args):
    """Loads the policies and evaluates them."""
    common.check_numbers(args)
    if not args.num_samples and not args.capture_video:
        raise common.Error("there is nothing to do: give --num-samples or --capture-video")
    if args.capture_video:
        os.environ["MUJOCO_GL"] = common.rendering_backend()  # before anything imports MuJoCo, which reads it
    module, run, step, states = load_run(args.folder)
    if step < run.num_updates:
        raise common.Error(f"{args.folder} is not finished: resume it by --resume first")
    if args.num_samples and not hasattr(run, "num_samples"):
        raise common.Error(f"{args.folder} does not act by MaxQ: leave --num-samples out")
    lock = hold(args.folder)  # noqa: F841 (until this process ends)
    task, seeds = common.load_task(run.env_name, run.dataset_path), run.seeds
    workers = args.num_workers or common.usable_cores()
    slots = common.slots_per_seed(len(seeds), run.eval_episodes, workers)
    diverged = {row["seed"] for row in read_rows(args.folder / "train.csv") if row["diverged"] == "1"}
    lost = np.where([str(seed) in diverged for seed in seeds], np.nan, 0)  # such a seed may act, and scores nan
    if args.num_samples:
        path = args.folder / "num_samples.csv"
        rows = read_rows(path)
        done = {row["num_samples"] for row in rows}
        with common.Environments(task, len(seeds), run.eval_episodes, workers) as envs:
            for n in [n for n in args.num_samples if str(n) not in done]:
                policy = functools.partial(module.act, dataclasses.replace(run, num_samples=n), states)
                scores = common.evaluate(policy, envs, seeds, step, run.eval_episodes, run.eval_seed)
                scores = scores.mean(axis=1) + lost
                row = {"step": step, "num_samples": n}
                rows += [row | {"seed": seed, "score": f"{score:.6g}"} for seed, score in zip(seeds, scores)]
                write_file(path, pd.DataFrame(rows).to_csv(index=False).encode())
                spread = f" +- {scores.std():.1f}" if len(seeds) > 1 else ""
                print(f"{n} samples: {scores.mean():.1f}{spread} {task.unit}", flush=True)
    if args.capture_video:  # the first seed's first episodes; the policy acts for all seeds
        policy = lambda obs, keys: module.act(run, states, *(np.repeat(x, len(seeds), axis=0) for x in (obs, keys)))[:1]
        warnings.filterwarnings("ignore", message="os.fork")  # jax warns, but the encoder is executed at once
        num_films = min(4, run.eval_episodes)
        film = Film(task, min(slots, num_films), slots, args.folder)
        scores = common.evaluate(policy, film, seeds[:1], step, num_films, run.eval_seed)
        for env in film.envs.values():
            env.close()  # while OpenGL is still there
        for episode, score in enumerate(scores[0] + lost[0]):
            print(f"{args.folder}/episode-{episode}.mp4: score {score:.1f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
