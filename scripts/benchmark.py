"""Times training and evaluation, beside FQL's official code and the DOAL authors' code where clones of them are given.

    python scripts/benchmark.py --algos dmfql                                            # ours, 1 seed and 8
    python scripts/benchmark.py --num-seeds 1 --fql-dir ../fql --doal-dir ../DOAL        # every file beside theirs
    python scripts/benchmark.py --num-seeds 1 --fql-dir ../fql --algos ifql fql --eval-episodes 50

The clones are github.com/seohongpark/fql and, at 155f517, github.com/Xyu-Chern/DOAL; what they import beside our
requirements comes by `pip install distrax ml_collections jaxopt`.

Each contestant is a process of its own. They take turns, and a ratio compares two of the same turn, so that the load of
the machine hardly matters. Each is driven as its own main does: ours by one call for all updates of a turn, FQL's by a
call per update with a batch of numpy arrays, the authors' by a call per 20 updates with 20 such batches. Networks and
batches have the paper's sizes; data are random, since no time depends on their values.

"% of the products' time": the time that an update's operations (XLA's count) would take at the rate that a large matrix
product reaches in the same turn, over the time that the update takes.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import pathlib
import platform
import re
import resource
import shlex
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from run import PACKAGES, git_commit

# our file: the agent that does the same in FQL's or in the authors' code, and what to change in its configuration
FQL = {algo: (algo, {}) for algo in ("iql", "ifql", "fql", "rebrac")}
DOAL = {algo: (algo, {}) for algo in (*FQL, "diql", "difql", "trigflow", "dtrigflow", "mfql", "dmfql", "dmfrebrac")}
DOAL |= {"etrigflow": ("trigflow", {"use_q_loss": True}), "mfql_bptt": ("mfql", {"bptt": True})}
DOAL |= {"mfrebrac": ("dmfrebrac", {"alpha": 0.0})}  # their name of delta; they compute the gradient of Q all the same
SCAN = 20  # updates per call of the authors' code


@dataclasses.dataclass(frozen=True)
class Args:
    algos: tuple[str, ...] = tuple(sorted(path.stem for path in (common.ROOT / "algos").glob("*.py")))
    """files of algos/"""
    num_seeds: tuple[int, ...] = (1, 8)
    """numbers of seeds that ours trains side by side (the others train one)"""
    env_name: str = "scene-play"
    """task whose sizes are taken"""
    num_transitions: int = 1_000_000
    """transitions of the random data"""
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
    out: pathlib.Path = pathlib.Path("runs/benchmark.json")
    """file for every figure"""


def random_data(task: common.Task, num_transitions: int) -> dict[str, np.ndarray]:
    """Transitions of the task's shapes, by FQL's names."""
    env, rng = task.make_env(), np.random.default_rng(0)
    draw = lambda *shape: rng.uniform(-1, 1, (num_transitions, *shape)).astype(np.float32)
    obs, action = env.observation_space.shape, env.action_space.shape
    data = {"observations": draw(*obs), "actions": draw(*action), "rewards": draw(), "masks": draw()}
    return data | {"next_observations": draw(*obs), "terminals": draw()}


class Ours:
    """An algorithm of ours."""

    def __init__(self, args: Args, algo: str, num_seeds: int):
        self.module, self.task = common.load_algo(algo), common.load_task(args.env_name)
        self.args = self.module.Args(env_name=args.env_name, seeds=tuple(range(num_seeds)))
        self.args, self.num_updates = common.resolve(self.args, self.task, self.module.PAPER), args.num_updates
        obs, action, reward, mask, next_obs, _ = map(jnp.asarray, random_data(self.task, args.num_transitions).values())
        self.dataset = common.Dataset(obs, action, reward, mask, next_obs, action)
        init = functools.partial(self.module.init, self.args, obs.shape[-1], action.shape[-1])
        self.states = jax.jit(jax.vmap(init))(jnp.arange(num_seeds, dtype=jnp.uint32))
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

    def about(self) -> dict:
        """The count of operations, the device, and the most memory used: on a CPU, by all of the process."""
        device, resident = jax.devices()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", resident)
        return {"flops": self.flops, "device": device.device_kind, "peak_gigabytes": peak / 1e9}


class Theirs:
    """An agent of FQL's code or, with `scan`, of the authors' code."""

    def __init__(self, args: Args, algo: str, scan: bool):
        folder, (name, changes) = (args.doal_dir, DOAL[algo]) if scan else (args.fql_dir, FQL[algo])
        sys.path.insert(0, folder)
        self.config = importlib.import_module(f"agents.{name}").get_config()
        self.config.update({"alpha_actor": 1.0} | changes)  # the authors' main.py sets it per task
        task, size = common.load_task(args.env_name), max(2_000_000, args.num_transitions + 1)
        buffer = importlib.import_module("utils.datasets").ReplayBuffer
        self.data = buffer.create_from_initial_dataset(random_data(task, args.num_transitions), size)
        self.data.return_next_actions = "rebrac" in name or self.config.get("return_next_actions", False)
        example, create = self.data.sample(1), importlib.import_module("agents").agents[name].create
        with contextlib.redirect_stdout(None):
            self.agent = create(0, example["observations"], example["actions"], self.config)
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


def call(method: str, *args):
    return getattr(contestant, method)(*args)


def compare(args: Args, algo: str, num_seeds: int) -> dict:
    """Prints a line about one algorithm and number of seeds, and gives every figure; a ratio is [median, min, max]."""
    kinds = {"ours": (Ours, args, algo, num_seeds)}
    kinds |= {"FQL's code": (Theirs, args, algo, False)} if args.fql_dir and algo in FQL else {}
    kinds |= {"the authors' code": (Theirs, args, algo, True)} if args.doal_dir and algo in DOAL else {}
    spawn = multiprocessing.get_context("spawn")
    pools = {name: concurrent.futures.ProcessPoolExecutor(1, spawn, enter, kind) for name, kind in kinds.items()}
    ask = lambda name, *what: pools[name].submit(call, *what).result()
    others = [name for name in kinds if name != "ours"]
    first, took = {name: ask(name, "train") for name in kinds}, {name: [] for name in ("products", *kinds)}
    for _ in range(args.turns):
        for name in kinds:
            took[name].append(ask(name, "train"))
        took["products"].append(ask("ours", "products"))
    row = {"algo": algo, "num_seeds": num_seeds, "update_seconds": took, "ratios": {}}
    for name in ["products", *others]:
        ratios = sorted(a / b for a, b in zip(took[name], took["ours"]))
        row["ratios"][name] = statistics.median(ratios), ratios[0], ratios[-1]
    played = [name for name in kinds if args.eval_episodes and name != "the authors' code"]
    row["episode_seconds"] = {name: ask(name, "evaluate", args.eval_episodes) for name in played}
    row |= {"first_call_seconds": first["ours"] * args.num_updates * num_seeds, **ask("ours", "about")}
    for pool in pools.values():
        pool.shutdown()
    parts = [f"{1 / statistics.median(took['ours']):.1f} updates/s"]
    parts += ["{:.0%} of the products' time ({:.0%} to {:.0%})".format(*row["ratios"]["products"])]
    parts += ["{:.2f} x {name} ({:.2f} to {:.2f})".format(*row["ratios"][name], name=name) for name in others]
    parts += [f"{took:.2f} s per episode of {name}" for name, took in row["episode_seconds"].items()]
    parts += [f"first call {row['first_call_seconds']:.0f} s, {row['peak_gigabytes']:.1f} GB"]
    print(f"{algo:10}{num_seeds} seed{'s' * (num_seeds > 1)}: {'; '.join(parts)}", flush=True)
    return row


def main(args: Args):
    """Times every algorithm at every number of seeds, and writes all figures after each."""
    common.check_numbers(args)
    common.load_task(args.env_name)
    files = [common.ROOT / "algos" / f"{algo}.py" for algo in args.algos]
    files += [pathlib.Path(folder, "agents", "iql.py") for folder in (args.fql_dir, args.doal_dir) if folder]
    if missing := [path for path in files if not path.exists()]:
        raise common.Error(f"there is no {missing[0]}: --algos takes files of algos/, --fql-dir and --doal-dir clones")
    if args.num_updates % SCAN:
        raise common.Error(f"--num-updates {args.num_updates} is impossible: give a multiple of {SCAN}")
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.+)", info.read_text() if info.exists() else "") + [platform.processor()]
    result = {"date": str(datetime.date.today()), "machine": f"{names[0]}, {common.usable_cores()} cores"}
    result |= {"command": shlex.join(["python", *sys.argv]), "commit": git_commit(), "rows": []}
    result |= {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for algo, num_seeds in itertools.product(args.algos, args.num_seeds):
        result["rows"].append(compare(args, algo, num_seeds))
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
