"""Plays a finished run's policies once more: with other numbers of samples (the paper's Table 4), or on film.

    python evaluate.py runs/cube-single-play/mfql/<time> --num-samples 1 2 4 8 16 32 64 128   # -> num_samples.csv
    python evaluate.py runs/cube-single-play/mfql/<time> --capture-video                      # -> episode-0.mp4, ...

Nothing is trained: the checkpoint has the states, and `act` is a function of them and of the arguments. The episodes
are those of the run's own evaluations. An algorithm's --capture-video calls this at its run's end.
"""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import signal
import sys
import warnings

import flax.serialization
import imageio_ffmpeg
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import common
from run import append_rows, read_checkpoint, read_record, read_rows


@dataclasses.dataclass(frozen=True)
class Args:
    folder: tyro.conf.Positional[pathlib.Path]
    """a run's folder, runs/<task>/<algo>/<time>"""
    num_samples: tuple[int, ...] = ()
    """evaluate with MaxQ over that many actions, each number in turn"""
    capture_video: bool = False
    """film the first episodes of the first seed"""
    num_workers: int | None = None
    """processes that step the environments (None: one per core)"""


class Film(common.Slots):
    """Environments that film what happens in them, an mp4 per slot."""

    def __init__(self, task: common.Task, slots: list[int], num_slots: int, folder: pathlib.Path):
        size = {} if task.adroit else {"width": 320, "height": 320}
        super().__init__(task, slots, render_mode="rgb_array", **size)
        self.num_slots, self.folder, self.writers = num_slots, folder, {}

    def step(self, commands: dict) -> dict:
        """See `common.Slots`; a slot's film ends with its episode."""
        answers = super().step(commands)
        for slot, (_, score) in answers.items():
            env = self.envs[slot]
            frame = np.ascontiguousarray(env.render())
            if slot not in self.writers:
                path, size = self.folder / f"episode-{slot}.mp4", frame.shape[1::-1]
                self.writers[slot] = imageio_ffmpeg.write_frames(path, size, fps=env.metadata.get("render_fps", 20))
                self.writers[slot].send(None)
            self.writers[slot].send(frame)
            if score is not None:
                self.writers.pop(slot).close()
        return answers


def main(args: Args):
    """Loads the policies, and plays."""
    common.check_ranges(args)
    if not args.num_samples and not args.capture_video:
        raise common.Error("there is nothing to do: give --num-samples or --capture-video")
    if args.capture_video and (backend := common.rendering_backend()) != os.environ["MUJOCO_GL"]:
        # MuJoCo read it when it was imported, so this starts anew
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MUJOCO_GL": backend})
    try:
        algo = json.loads((args.folder / "args.json").read_text())["algo"]
        module = importlib.import_module(f"algos.{algo}")
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        raise common.Error(f"{args.folder} is no run's folder ({error}): give one like runs/<task>/<algo>/<time>")
    _, run = read_record(str(args.folder), algo, module.Args)
    path, num_seeds = args.folder / "checkpoint.msgpack", len(run.seeds)
    saved = read_checkpoint(path, algo, run) if path.exists() else {"step": 0}
    if saved["step"] != run.num_updates:
        raise common.Error(f"{args.folder} is not finished: python algos/{algo}.py --resume {args.folder}")
    task, slots = common.load_task(run.env_name), common.slots_per_seed(num_seeds, run.eval_episodes)
    env = common.make_env(task)
    init = functools.partial(module.init, run, env.observation_space.shape[0], env.action_space.shape[0])
    empty = jax.eval_shape(jax.vmap(init), jnp.array(run.seeds, jnp.uint32))
    states = jax.tree.map(jnp.asarray, flax.serialization.from_state_dict(empty, saved["states"]))
    if args.num_samples:
        evaluate_again(args, run, module.act, states, task, slots)
    if args.capture_video:
        play = lambda obs, keys: module.act(run, states, *(np.repeat(x, num_seeds, axis=0) for x in (obs, keys)))[:1]
        warnings.filterwarnings("ignore", message="os.fork")  # jax warns, but the encoder is executed at once
        film = Film(task, list(range(min(slots, 4))), slots, args.folder)
        for episode, score in enumerate(
            common.evaluate(play, film, run.seeds[:1], run.num_updates, min(slots, 4), run.eval_seed)[0]
        ):
            print(f"{args.folder}/episode-{episode}.mp4: score {score:.1f}", flush=True)


def evaluate_again(args: Args, run, act, states, task: common.Task, slots: int):
    """Appends to num_samples.csv, for each number of samples that it lacks, a row per seed: the mean score."""
    if not hasattr(run, "num_samples"):
        raise common.Error(f"{args.folder} does not act by MaxQ: leave --num-samples out")
    path = args.folder / "num_samples.csv"
    done = {int(row["num_samples"]) for row in read_rows(path, "num_samples")}
    environments = common.Environments(task, slots * len(run.seeds), args.num_workers or os.cpu_count())
    for n in (n for n in args.num_samples if n not in done):
        play = functools.partial(act, dataclasses.replace(run, num_samples=n), states)
        scores = common.evaluate(play, environments, run.seeds, run.num_updates, run.eval_episodes, run.eval_seed).mean(
            axis=1
        )
        keys = [{"step": run.num_updates, "seed": seed, "num_samples": n} for seed in run.seeds]
        append_rows(path, [key | {"score": f"{score:.6g}"} for key, score in zip(keys, scores)])
        print(f"{n} samples: {scores.mean():.1f} +- {scores.std():.1f}", flush=True)
    environments.close()


if __name__ == "__main__":
    with jax.default_device(jax.devices("cpu")[0]):  # as in training, where it leaves the GPU to the updates
        try:
            main(tyro.cli(Args))
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
