"""Times training and evaluation, beside FQL's code and the DOAL authors' code if clones of them are given.

    python scripts/benchmark.py --fql-dir ../fql --doal-dir ../DOAL
    python scripts/benchmark.py --fql-dir ../fql --algos ifql fql --eval-episodes 50

The clones are github.com/seohongpark/fql and, at 155f517, github.com/Xyu-Chern/DOAL. In addition to our requirements
they need `pip install distrax ml_collections jaxopt tfp-nightly`.

Each contestant is a process of its own, called as its own main does. All compile at the same time; then they take
turns. A ratio compares the speeds per seed in the same turn, so that other load on the machine affects both alike; the
table has its median over the turns, and its range. Sizes are the paper's; data are random.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import multiprocessing
import pathlib
import signal
import subprocess
import sys
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from run import git_commit

ALGOS = tuple(sorted(path.stem for path in (common.ROOT / "algos").glob("*.py")))
# our file: the agent that does the same in FQL's or in the authors' code, and what to change in its configuration
FQL = {algo: (algo, {}) for algo in ("iql", "ifql", "fql", "rebrac")}
DOAL = {algo: (algo, {}) for algo in (*FQL, "diql", "difql", "trigflow", "dtrigflow", "mfql", "dmfql", "dmfrebrac")}
DOAL |= {"etrigflow": ("trigflow", {"use_q_loss": True}), "mfql_bptt": ("mfql", {"bptt": True})}
DOAL |= {"mfrebrac": ("dmfrebrac", {"alpha": 0.0})}  # their name of delta; they still compute the gradient of Q
SCAN = 20  # updates per call of the authors' code
TRANSITIONS = 1_000_000
COLUMNS = ["file", "seeds", "ms/update", "per seed", "times FQL's speed", "times the authors' speed"]
COLUMNS += ["s/episode", "FQL's s/episode"]


@dataclasses.dataclass(frozen=True)
class Args:
    algos: tuple[Literal[ALGOS], ...] = ALGOS  # files of algos/
    num_seeds: tuple[int, ...] = (1, 8)  # numbers of seeds side by side in ours, a row each (the others train one)
    env_name: str = "scene-play"  # task that gives the sizes
    num_updates: int | None = None  # updates per turn, of all seeds together (None: 40, on a GPU 1000)
    turns: int = 7  # turns of each contestant
    eval_episodes: int | None = None  # episodes of an evaluation, ours and FQL's (None: no evaluation)
    fql_dir: str | None = None  # clone of FQL's code
    doal_dir: str | None = None  # clone of the authors' code


def random_data(env) -> dict[str, np.ndarray]:
    """Transitions of an environment's shapes, by FQL's names."""
    rng, obs, action = np.random.default_rng(0), env.observation_space.shape, env.action_space.shape
    shapes = {"observations": obs, "actions": action, "rewards": (), "masks": (), "next_observations": obs}
    shapes["terminals"] = ()
    return {name: rng.uniform(-1, 1, (TRANSITIONS, *shape)).astype(np.float32) for name, shape in shapes.items()}


class Ours:
    """An algorithm of ours. Each method returns the seconds that it took per update or episode of one seed."""

    def __init__(self, bench: Args, algo: str, num_seeds: int):
        self.bench, self.module, self.task = bench, common.load_algo(algo), common.load_task(bench.env_name)
        args = self.module.Args(env_name=bench.env_name, seeds=tuple(range(num_seeds)))
        self.args = common.resolve(args, self.task, self.module.PAPER_COLUMNS)
        obs, action, reward, mask, next_obs, _ = map(jnp.asarray, random_data(self.task.make_env()).values())
        self.dataset = common.Dataset(obs, action, reward, mask, next_obs, action)
        init = functools.partial(self.module.init, self.args, obs.shape[-1], action.shape[-1])
        self.states = jax.jit(jax.vmap(init))(jnp.arange(num_seeds, dtype=jnp.uint32))

    def train(self) -> float:
        num_updates = max(1, self.bench.num_updates // len(self.args.seeds))
        begun = time.perf_counter()
        self.states, metrics = self.module.train(self.args, num_updates, self.dataset, self.states)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - begun) / num_updates / len(self.args.seeds)

    def evaluate(self) -> float:
        policy = functools.partial(self.module.act, self.args, self.states)
        num_seeds, num_episodes = len(self.args.seeds), self.bench.eval_episodes
        with common.Environments(self.task, num_seeds, num_episodes) as envs:
            warm_up = envs.num_slots // num_seeds  # makes the environments and compiles
            for episodes in (warm_up, num_episodes):
                begun = time.perf_counter()
                common.evaluate(policy, envs, self.args.seeds, 0, episodes)
        return (time.perf_counter() - begun) / num_episodes / num_seeds


class Theirs:
    """The same for an agent of FQL's code or, with `scan`, of the authors'."""

    def __init__(self, bench: Args, algo: str, scan: bool):
        folder, (name, changes) = (bench.doal_dir, DOAL[algo]) if scan else (bench.fql_dir, FQL[algo])
        sys.path.insert(0, folder)
        agents, datasets = importlib.import_module("agents"), importlib.import_module("utils.datasets")
        self.config = importlib.import_module(f"agents.{name}").get_config()
        self.config.update({"alpha_actor": 1.0} | changes)  # the authors' main.py sets it per task
        self.bench, self.scan, self.env = bench, scan, common.load_task(bench.env_name).make_env()
        self.data = datasets.ReplayBuffer.create_from_initial_dataset(random_data(self.env), 2 * TRANSITIONS)
        self.data.return_next_actions = "rebrac" in name or self.config.get("return_next_actions", False)
        batch = self.data.sample(1)
        self.agent = agents.agents[name].create(0, batch["observations"], batch["actions"], self.config)
        self.updates = jax.jit(functools.partial(jax.lax.scan, lambda agent, batch: agent.update(batch)))

    def train(self) -> float:
        begun, size = time.perf_counter(), self.config["batch_size"]
        for step in range(0, self.bench.num_updates, SCAN if self.scan else 1):
            if self.scan:
                batches = self.data.sample(SCAN * size)
                batches = jax.tree.map(lambda array: array.reshape(SCAN, size, *array.shape[1:]), batches)
                self.agent, _ = self.updates(self.agent, batches)
            else:
                full = {"full_update": step % self.config["actor_freq"] == 0} if "actor_freq" in self.config else {}
                self.agent, _ = self.agent.update(self.data.sample(size), **full)
        jax.block_until_ready(self.agent.network.params)
        return (time.perf_counter() - begun) / self.bench.num_updates

    def evaluate(self) -> float:
        evaluation = importlib.import_module("utils.evaluation")
        for num_episodes in (1, self.bench.eval_episodes):  # the first compiles
            begun = time.perf_counter()
            evaluation.evaluate(self.agent, self.env, self.config, num_episodes)
        return (time.perf_counter() - begun) / self.bench.eval_episodes


make = functools.cache(lambda kind, *args: kind(*args))


def call(contestant: tuple, method: str) -> float:
    """Calls a method of a contestant, which is made at the first call in a process."""
    return getattr(make(*contestant), method)()


def compare(bench: Args, algo: str) -> list[list[str]]:
    """Times one algorithm: a row of the table for each number of seeds."""
    contestants = {num_seeds: (Ours, bench, algo, num_seeds) for num_seeds in bench.num_seeds}
    contestants |= {"FQL": (Theirs, bench, algo, False)} if bench.fql_dir and algo in FQL else {}
    contestants |= {"DOAL": (Theirs, bench, algo, True)} if bench.doal_dir and algo in DOAL else {}
    spawn = multiprocessing.get_context("spawn")
    pools = {name: concurrent.futures.ProcessPoolExecutor(1, spawn, common.follow_parent) for name in contestants}
    ask = lambda name, method: pools[name].submit(call, contestants[name], method)
    concurrent.futures.wait([ask(name, "train") for name in pools])  # compiles
    turns = [{name: ask(name, "train").result() for name in pools} for _ in range(bench.turns)]
    episode = {name: ask(name, "evaluate").result() for name in pools if bench.eval_episodes and name != "DOAL"}
    for pool in pools.values():
        pool.shutdown()  # so that a GPU has room for the next algorithm
    rows = []
    for num_seeds in bench.num_seeds:
        took = 1000 * np.median([turn[num_seeds] for turn in turns])
        row = [algo, f"{num_seeds}", f"{took * num_seeds:.3f}", f"{took:.3f}"]
        for name in ("FQL", "DOAL"):
            ratios = [turn[name] / turn[num_seeds] for turn in turns if name in turn]
            row.append(f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")
        rows.append(row + [f"{episode[name]:.2f}" if name in episode else "" for name in (num_seeds, "FQL")])
    return rows


def main(bench: Args):
    """Times one algorithm after another, and prints its rows."""
    common.check_numbers(bench)
    gpu = jax.default_backend() == "gpu"
    bench = dataclasses.replace(bench, num_updates=bench.num_updates or (1000 if gpu else 40))
    if bench.num_updates % SCAN:
        raise common.Error(f"--num-updates {bench.num_updates} is impossible: give a multiple of {SCAN}")
    device, cores = jax.devices()[0].device_kind, common.usable_cores()
    if gpu:
        device += ", driver " + subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader -i 0")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax"))
    print(f"{bench.env_name} on {device}, {cores} cores, {versions}, commit {git_commit()}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for algo in bench.algos:
        for row in compare(bench, algo):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback, and its processes follow
    main(tyro.cli(Args))
