"""Times training and evaluation, beside FQL's official code and the DOAL authors' code where clones of them are given.

    python scripts/benchmark.py --num-seeds 8                                     # ours
    python scripts/benchmark.py --fql-dir ../fql --doal-dir ../DOAL               # every file beside theirs
    python scripts/benchmark.py --fql-dir ../fql --algos ifql fql --eval-episodes 50

The clones are github.com/seohongpark/fql and, at 155f517, github.com/Xyu-Chern/DOAL; what they import beside our
requirements comes by `pip install distrax ml_collections jaxopt tfp-nightly`. The output is a Markdown table.

Each contestant is a process of its own. They take turns, and a ratio compares two of the same turn, so that the load of
the machine hardly matters; it is shown as its median over the turns (and its range). Each is driven as its own main
does: ours by one call for all updates of a turn, FQL's by a call per update with a batch of numpy arrays, the authors'
by a call per 20 updates with 20 such batches. Networks and batches have the paper's sizes; data are random, since no
time depends on their values.

"Of a product's rate": the time that an update's operations (XLA's count) take at the rate of a large matrix product
of the same turn, over the time that the update takes.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from run import git_commit

# our file: the agent that does the same in FQL's or in the authors' code, and what to change in its configuration
FQL = {algo: (algo, {}) for algo in ("iql", "ifql", "fql", "rebrac")}
DOAL = {algo: (algo, {}) for algo in (*FQL, "diql", "difql", "trigflow", "dtrigflow", "mfql", "dmfql", "dmfrebrac")}
DOAL |= {"etrigflow": ("trigflow", {"use_q_loss": True}), "mfql_bptt": ("mfql", {"bptt": True})}
DOAL |= {"mfrebrac": ("dmfrebrac", {"alpha": 0.0})}  # their name of delta; they compute the gradient of Q all the same
SCAN = 20  # updates per call of the authors' code
TRANSITIONS = 1_000_000
COLUMNS = ["file", "updates/s", "of a product's rate", "times FQL's speed", "times the authors' speed"]
COLUMNS += ["s/episode", "FQL's s/episode"]


@dataclasses.dataclass(frozen=True)
class Args:
    algos: tuple[str, ...] = tuple(sorted(path.stem for path in (common.ROOT / "algos").glob("*.py")))
    """files of algos/"""
    num_seeds: int = 1
    """seeds that ours trains side by side (the others train one)"""
    env_name: str = "scene-play"
    """task whose sizes are taken"""
    num_updates: int = 40
    """updates per turn, a multiple of 20"""
    turns: int = 7
    """turns of each contestant"""
    eval_episodes: int | None = None
    """episodes of an evaluation, ours and FQL's (None: no evaluation)"""
    fql_dir: str | None = None
    """clone of FQL's official code"""
    doal_dir: str | None = None
    """clone of the authors' code"""


def random_data(task: common.Task) -> dict[str, np.ndarray]:
    """Transitions of the task's shapes, by FQL's names."""
    env, rng = task.make_env(), np.random.default_rng(0)
    draw = lambda *shape: rng.uniform(-1, 1, (TRANSITIONS, *shape)).astype(np.float32)
    obs, action = env.observation_space.shape, env.action_space.shape
    data = {"observations": draw(*obs), "actions": draw(*action), "rewards": draw(), "masks": draw()}
    return data | {"next_observations": draw(*obs), "terminals": draw()}


class Ours:
    """An algorithm of ours."""

    def __init__(self, args: Args, algo: str):
        self.module, self.task = common.load_algo(algo), common.load_task(args.env_name)
        self.args = self.module.Args(env_name=args.env_name, seeds=tuple(range(args.num_seeds)))
        self.args, self.num_updates = common.resolve(self.args, self.task, self.module.PAPER), args.num_updates
        obs, action, reward, mask, next_obs, _ = map(jnp.asarray, random_data(self.task).values())
        self.dataset = common.Dataset(obs, action, reward, mask, next_obs, action)
        init = functools.partial(self.module.init, self.args, obs.shape[-1], action.shape[-1])
        self.states = jax.jit(jax.vmap(init))(jnp.arange(args.num_seeds, dtype=jnp.uint32))
        update = jax.jit(functools.partial(self.module.update, self.args), compiler_options=common.XLA_OPTIONS)
        update = update.lower(self.dataset, jax.tree.map(lambda array: array[0], self.states), None).compile()
        self.flops, self.matrix = update.cost_analysis()["flops"], jnp.ones((2048, 2048))
        self.multiply = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, y: x @ y, x)).lower(self.matrix).compile()

    def train(self) -> float:
        """Seconds per update of one seed."""
        begun = time.perf_counter()
        self.states, metrics = self.module.train(self.args, self.num_updates, self.dataset, self.states)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - begun) / self.num_updates / len(self.args.seeds)

    def products(self) -> float:
        """Seconds that as many operations as an update's take in a large matrix product."""
        begun = time.perf_counter()
        self.multiply(self.matrix).block_until_ready()
        return (time.perf_counter() - begun) * self.flops / (8 * 2 * 2048**3)

    def evaluate(self, num_episodes: int) -> float:
        """Seconds per episode."""
        seeds, workers = self.args.seeds, common.usable_cores()
        slots = common.slots_per_seed(len(seeds), num_episodes, workers)
        envs = common.Environments(self.task, slots * len(seeds), workers)
        policy = functools.partial(self.module.act, self.args, self.states)
        common.evaluate(policy, envs, seeds, 0, slots)  # makes the environments and compiles
        begun = time.perf_counter()
        common.evaluate(policy, envs, seeds, 0, num_episodes)
        took = time.perf_counter() - begun
        envs.close()
        return took / num_episodes / len(seeds)


class Theirs:
    """An agent of FQL's code or, with `scan`, of the authors' code."""

    def __init__(self, args: Args, algo: str, scan: bool):
        folder, (name, changes) = (args.doal_dir, DOAL[algo]) if scan else (args.fql_dir, FQL[algo])
        sys.path.insert(0, folder)
        self.config = importlib.import_module(f"agents.{name}").get_config()
        self.config.update({"alpha_actor": 1.0} | changes)  # the authors' main.py sets it per task
        task = common.load_task(args.env_name)
        buffer = importlib.import_module("utils.datasets").ReplayBuffer
        self.data = buffer.create_from_initial_dataset(random_data(task), 2 * TRANSITIONS)
        self.data.return_next_actions = "rebrac" in name or self.config.get("return_next_actions", False)
        example, agents = self.data.sample(1), importlib.import_module("agents").agents
        with contextlib.redirect_stdout(None):
            self.agent = agents[name].create(0, example["observations"], example["actions"], self.config)
        self.env, self.scan, self.num_updates = task.make_env(), scan, args.num_updates
        self.update = jax.jit(lambda agent, batch: agent.update(batch))

    def train(self) -> float:
        """Seconds per update."""
        begun, size = time.perf_counter(), self.config["batch_size"]
        for step in range(0, self.num_updates, SCAN if self.scan else 1):
            if self.scan:
                batches = self.data.sample(SCAN * size)
                batches = jax.tree.map(lambda array: array.reshape(SCAN, size, *array.shape[1:]), batches)
                self.agent, _ = jax.jit(jax.lax.scan, static_argnums=0)(self.update, self.agent, batches)
            else:
                full = {"full_update": step % self.config["actor_freq"] == 0} if "actor_freq" in self.config else {}
                self.agent, _ = self.agent.update(self.data.sample(size), **full)
        jax.block_until_ready(self.agent.network.params)
        return (time.perf_counter() - begun) / self.num_updates

    def evaluate(self, num_episodes: int) -> float:
        """Seconds per episode."""
        evaluate = importlib.import_module("utils.evaluation").evaluate
        evaluate(self.agent, self.env, self.config, 1)  # compiles
        begun = time.perf_counter()
        evaluate(self.agent, self.env, self.config, num_episodes)
        return (time.perf_counter() - begun) / num_episodes


def enter(kind: type, *args):
    """Makes this process a contestant."""
    global contestant
    contestant = kind(*args)


def call(method: str, *args) -> float:
    return getattr(contestant, method)(*args)


def compare(args: Args, algo: str) -> list[str]:
    """Times one algorithm: its row of the table."""
    kinds = {"ours": (Ours, args, algo)}
    kinds |= {"FQL": (Theirs, args, algo, False)} if args.fql_dir and algo in FQL else {}
    kinds |= {"DOAL": (Theirs, args, algo, True)} if args.doal_dir and algo in DOAL else {}
    spawn = multiprocessing.get_context("spawn")
    pools = {name: concurrent.futures.ProcessPoolExecutor(1, spawn, enter, kind) for name, kind in kinds.items()}
    ask = lambda name, *what: pools[name].submit(call, *what).result()
    turns = []
    for _ in range(args.turns + 1):
        turns.append({name: ask(name, "train") for name in kinds} | {"products": ask("ours", "products")})
    row = [algo, f"{1 / np.median([turn['ours'] for turn in turns[1:]]):.1f}"]  # the first turn compiles
    for name in ("products", "FQL", "DOAL"):
        ratios = [turn[name] / turn["ours"] for turn in turns[1:] if name in turn]
        row.append(f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")
    for name in ("ours", "FQL"):
        played = args.eval_episodes and name in kinds
        row.append(f"{ask(name, 'evaluate', args.eval_episodes):.2f}" if played else "")
    for pool in pools.values():
        pool.shutdown()
    return row


def main(args: Args):
    """Times one algorithm after another, and prints a row after each."""
    common.check_numbers(args)
    if args.num_updates % SCAN:
        raise common.Error(f"--num-updates {args.num_updates} is impossible: give a multiple of {SCAN}")
    print(f"{args.env_name}, {args.num_seeds} seed(s) of ours, {common.usable_cores()} cores, commit {git_commit()}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for algo in args.algos:
        print(f"| {' | '.join(compare(args, algo))} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
