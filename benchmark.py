"""Times training and evaluation, beside the machine's floor and, given a clone of it, the official FQL code.

    python benchmark.py --algos dmfrebrac                        # 1 seed and 8
    python benchmark.py --algos iql ifql fql rebrac --num-seeds 1 --fql-dir ../fql
    python benchmark.py --algos ifql fql --num-seeds 1 --fql-dir ../fql --eval-episodes 50
    python benchmark.py --algos dmfrebrac --run-updates 50000    # whole runs, too: start-up, training, evaluation,
                                                                 # from which those of 1M updates are extrapolated

Every contestant is a process of its own, and they take turns, so that all see the same load on the machine. Data are
random numbers of the task's shapes, in the published number; nothing that is timed depends on their values. The FQL
code is used as its main.py does: numpy batches, one call per update, and its own evaluation loop. Its packages
(distrax, ml_collections) must be installed beside ours.

The floor of an update is what arithmetic alone would take: every matrix product that `update` asks for, timed in a
program that does nothing else (what two losses both ask for counts once), and the bytes that Adam (7 arrays per
network: parameters and both moments read and written, gradients read) and the targets (3) must move, at the bandwidth
measured on an array of that size. What lies above it is activations, layer norms, sampling and waiting. The floor of
an evaluation is the environment's steps, spread over all cores, and the policy's matrix products.

Writes <out>.json and <out>.png.
"""

import collections
import concurrent.futures
import dataclasses
import datetime
import functools
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.training.train_state import TrainState
from jax.extend.core import ClosedJaxpr, Literal

ROOT = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Args:
    algos: tuple[str, ...] = ("dmfrebrac",)
    """files of algos/"""
    num_seeds: tuple[int, ...] = (1, 8)
    """numbers of seeds to train side by side"""
    env_name: str = "scene-play"
    """task whose sizes are taken"""
    num_transitions: int = 1_000_000
    """transitions of the random dataset"""
    num_updates: int = 20
    """updates per turn"""
    turns: int = 7
    """turns of each contestant"""
    fql_dir: str | None = None
    """a clone of the official FQL code, which then takes its turns with those of iql, ifql, fql and rebrac it has"""
    eval_episodes: int | None = None
    """episodes of one evaluation (None: none, but 50 in a whole run)"""
    fql_eval_episodes: int = 5
    """episodes of FQL's evaluation loop, before and again after ours"""
    run_updates: int | None = None
    """updates of a whole run from the command line, evaluated at each tenth (None: no such run)"""
    out: str = "runs/benchmark"
    """where to write, without the ending"""


def import_common():
    """common.py, without the flags that it gives to XLA: the FQL code is timed as it is, also in a later process."""
    flags = os.environ.get("XLA_FLAGS", "")
    import common

    os.environ["XLA_FLAGS"] = flags
    return common


def seconds(function, *args) -> float:
    """How long `function(*args)` takes until its result is there."""
    begun = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------- the floor of an update
def products(closed, inputs: list, share=1.0) -> tuple[dict, list]:
    """The matrix products of a jaxpr, {name: (left shape, right shape, dimension numbers, how many)}, and the names of
    its results, given those of its inputs.

    A name says how a value is made, so what the algorithm's text asks for twice, like Q(s, a) in a loss and again in
    DOAL's gradient, is one product, as it is to the compiler. The branches of a condition are taken equally often, the
    body of a loop once.
    """
    jaxpr, found = closed.jaxpr, {}
    names = dict(zip(jaxpr.invars, inputs)) | {v: id(value) for v, value in zip(jaxpr.constvars, closed.consts)}
    name_of = lambda variable: hash(str(variable)) if isinstance(variable, Literal) else names[variable]
    for equation in jaxpr.eqns:
        arguments, results = [name_of(variable) for variable in equation.invars], None
        parts = [part for part in equation.params.values() if isinstance(part, ClosedJaxpr)]
        taken, given = share, arguments
        if equation.primitive.name == "cond":
            parts, given = equation.params["branches"], arguments[1:]
            taken = share / len(parts)
        for part in parts:
            inner, results = products(part, given, taken)
            found |= inner
        if equation.primitive.name == "cond" or not parts:
            plain = {key: value for key, value in equation.params.items() if key != "branches"}
            made = hash((equation.primitive.name, str(plain), *arguments))
            results = [hash((made, i)) for i in range(len(equation.outvars))]
        if equation.primitive.name == "dot_general":
            left, right = (variable.aval.shape for variable in equation.invars)
            found[results[0]] = left, right, equation.params["dimension_numbers"], share
        names.update(zip(equation.outvars, results))
    return found, [name_of(variable) for variable in jaxpr.outvars]


def flops(left, right, dimension_numbers) -> int:
    """Floating-point operations of a matrix product: 2 x (elements on the left) x (free elements on the right)."""
    (_, contracted), (_, batch) = dimension_numbers
    return 2 * math.prod(left) * math.prod(n for axis, n in enumerate(right) if axis not in (*contracted, *batch))


def dots(products: list, times: int) -> Callable:
    """A program that does each of `products` (left shape, right shape, dimension numbers) so many times; they do not
    wait for each other."""
    lefts, rights, numbers = zip(*products)
    rights = [jnp.ones(right) for right in rights]

    def all_dots(_, lefts):
        results = map(jax.lax.dot_general, lefts, rights, numbers)
        # by a single number, the next round waits for this one
        return [left.at[(0,) * left.ndim].set(result.ravel()[0]) for left, result in zip(lefts, results)]

    program = jax.jit(lambda lefts: jax.lax.fori_loop(0, times, all_dots, lefts))
    return functools.partial(program, [jnp.zeros(left) for left in lefts])


class Floor(NamedTuple):
    """What a function cannot do without, as programs that do it 20 times."""

    programs: list[Callable]
    gflop: float  # of its matrix products
    megabytes: float = 0  # that Adam and the targets move

    def seconds(self) -> float:
        """How long the function would take at the rates that the machine reaches on these."""
        return sum(map(seconds, self.programs)) / 20


def floor_of(function, *args) -> Floor:
    """The floor of `function(*args)`: its matrix products."""
    closed = jax.make_jaxpr(function)(*args)
    found = products(closed, list(range(len(closed.jaxpr.invars))))[0].values()
    shares = sorted({share for *_, share in found})
    programs = [dots([product for *product, share in found if share == s], round(20 * s)) for s in shares]
    return Floor(programs, sum(share * flops(*product) for *product, share in found) / 1e9)


def floor_of_update(update, state) -> Floor:
    """The floor of `update(state)`: its matrix products, and the memory traffic of Adam and the targets."""
    networks = [part for part in state if isinstance(part, TrainState)]
    targets = [part for part in state if isinstance(part, dict)]
    size = lambda parts: sum(array.size for array in jax.tree.leaves(parts))
    moved = 4 * (7 * sum(size(network.params) for network in networks) + 3 * size(targets))
    stream = jnp.ones(moved // 12)  # of three accesses, one writes
    run_bytes = jax.jit(lambda x, y: jax.lax.fori_loop(0, 20, lambda _, x: 0.5 * x + y, x))
    floor = floor_of(update, state)
    programs = [*floor.programs, functools.partial(run_bytes, stream, stream + 1)]
    return Floor(programs, floor.gflop, moved / 1e6)


# --------------------------------------------------------------------------------------------------- the contestants
class Ours:
    """One of our algorithms: `train`, `act` and `evaluate` as its `main` uses them."""

    def __init__(self, algo: str, num_seeds: int, args: Args):
        import common

        os.chdir(ROOT)
        self.module, self.task = importlib.import_module(f"algos.{algo}"), common.load_task(args.env_name)
        self.args = self.module.Args(env_name=args.env_name, seeds=tuple(range(num_seeds)))
        self.args = common.resolve(self.args, self.task, self.module.COLUMNS)
        env = common.make_env(self.task)
        sizes = env.observation_space.shape[0], env.action_space.shape[0]
        draw = np.random.default_rng(0).uniform
        array = lambda *shape: jnp.asarray(draw(-1, 1, (args.num_transitions, *shape)).astype(np.float32))
        obs, action = (sizes[0],), (sizes[1],)
        dataset = common.Dataset(array(*obs), array(*action), array(), array(), array(*obs), array(*action))
        init = functools.partial(self.module.init, self.args, *sizes)
        states = jax.jit(jax.vmap(init))(jnp.arange(num_seeds, dtype=jnp.uint32))
        apart, everywhere = common.shardings(num_seeds)
        self.dataset, self.states = jax.device_put(dataset, everywhere), jax.device_put(states, apart)
        update = lambda state: self.module.update(self.args, self.dataset, state, None)
        self.floor = floor_of_update(update, jax.tree.map(lambda array: array[0], self.states))
        self.num_updates, self.num_seeds, self.eval_episodes = args.num_updates, num_seeds, args.eval_episodes
        begun = time.perf_counter()
        self.train()
        self.compile_seconds = time.perf_counter() - begun
        self.floor_seconds()

    def train(self) -> float:
        """Seconds per update of one seed."""

        def chunk():
            self.states, metrics = self.module.train(self.args, self.num_updates, self.dataset, self.states)
            return metrics

        return seconds(chunk) / self.num_updates / self.num_seeds

    def floor_seconds(self) -> float:
        """Seconds that an update of one seed could not go below."""
        return self.floor.seconds()

    def evaluate(self) -> dict:
        """Seconds per episode of an evaluation, and those it could not go below: the steps of the environment spread
        over all cores, and the matrix products of the policy."""
        import common

        slots, cpu = common.slots_per_seed(self.num_seeds, self.eval_episodes), jax.devices("cpu")[0]
        environments = common.Environments(self.task, slots * self.num_seeds, os.cpu_count())
        answers = environments.step({slot: slot for slot in range(environments.num_slots)})  # makes them
        obs = np.stack([answers[slot][0] for slot in answers]).reshape(self.num_seeds, slots, -1).astype(np.float32)
        act = functools.partial(self.module.act, self.args, jax.device_put(self.states, cpu))
        with jax.default_device(cpu):
            keys = common.episode_keys(*np.zeros((2, self.num_seeds, slots), np.uint32))
            action, policy = np.asarray(act(obs, keys)), floor_of(act, obs, keys)
            policy.seconds()  # compiles
            begun = time.perf_counter()
            common.evaluate(act, environments, range(self.num_seeds), 0, self.eval_episodes)
            took = (time.perf_counter() - begun) / self.eval_episodes / self.num_seeds
            acting = policy.seconds() / slots / self.num_seeds
        environments.close()
        env, steps, ended = common.make_env(self.task), 0, False
        common.reset_env(env, 0)
        begun = time.perf_counter()
        while not ended:
            _, _, terminated, truncated, _ = env.step(action[0, 0])
            steps, ended = steps + 1, terminated or truncated
        stepping = (time.perf_counter() - begun) / os.cpu_count()
        return {"ours": [took], "floor": [stepping + steps * acting]}

    def about(self) -> dict:
        """What else there is to say."""
        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        return {
            "device": f"{jax.device_count()} x {device.device_kind}",
            "gflop_per_update": self.floor.gflop,
            "megabytes_per_update": self.floor.megabytes,
            "first_call_seconds": self.compile_seconds,
            "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "peak_device_gigabytes": stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
        }


class Official:
    """An agent of the official FQL code, used as its main.py does."""

    def __init__(self, algo: str, num_seeds: int, args: Args):
        sys.path.insert(0, args.fql_dir)
        from agents import agents
        from utils.datasets import Dataset

        common = import_common()
        self.env = common.make_env(common.load_task(args.env_name))
        self.config = importlib.import_module(f"agents.{algo}").get_config()
        draw = np.random.default_rng(0).uniform
        array = lambda *shape: draw(-1, 1, (args.num_transitions, *shape)).astype(np.float32)
        obs, action = self.env.observation_space.shape, self.env.action_space.shape
        fields = {"observations": array(*obs), "actions": array(*action), "rewards": array(), "terminals": array()}
        self.dataset = Dataset.create(**fields, masks=array(), next_observations=array(*obs))
        self.dataset.return_next_actions = algo == "rebrac"
        example = self.dataset.sample(1)
        self.agent = agents[algo].create(0, example["observations"], example["actions"], self.config)
        self.num_updates, self.eval_episodes = args.num_updates, args.fql_eval_episodes
        self.train()

    def train(self) -> float:
        """Seconds per update."""

        def loop():
            for i in range(1, self.num_updates + 1):
                batch = self.dataset.sample(self.config["batch_size"])
                if self.config["agent_name"] == "rebrac":
                    self.agent, _ = self.agent.update(batch, full_update=i % self.config["actor_freq"] == 0)
                else:
                    self.agent, _ = self.agent.update(batch)
            return self.agent.network.params

        return seconds(loop) / self.num_updates

    def evaluate(self) -> list[float]:
        """Seconds of each episode."""
        from utils.evaluation import evaluate

        took = []
        for _ in range(self.eval_episodes + 1):
            begun = time.perf_counter()
            evaluate(self.agent, self.env, self.config, num_eval_episodes=1)
            took.append(time.perf_counter() - begun)
        return took[1:]  # the first compiles


def enter(kind, *args):
    """Makes a process a contestant."""
    global contestant
    contestant = kind(*args)


def call(method: str):
    return getattr(contestant, method)()


# ------------------------------------------------------------------------------------------------------------- turns
def compare(algo: str, num_seeds: int, args: Args) -> dict:
    """The figures of one algorithm and number of seeds."""
    kinds = {"ours": Ours}
    if args.fql_dir and pathlib.Path(args.fql_dir, "agents", f"{algo}.py").exists():
        kinds["official"] = Official
    context = multiprocessing.get_context("spawn")
    processes = {
        name: concurrent.futures.ProcessPoolExecutor(1, context, enter, (kind, algo, num_seeds, args))
        for name, kind in kinds.items()
    }
    ask = lambda name, method: processes[name].submit(call, method).result()
    times = collections.defaultdict(list)
    row = {"algo": algo, "num_seeds": num_seeds, "env_name": args.env_name, **ask("ours", "about")}
    for _ in range(args.turns):
        for name in kinds:
            times[name].append(ask(name, "train"))
        times["floor"].append(ask("ours", "floor_seconds"))
    row["train_seconds"] = dict(times)
    row["updates_per_second"] = {name: 1 / statistics.median(values) for name, values in times.items()}
    row["fraction_of_floor"] = spread([f / t for f, t in zip(times["floor"], times["ours"])])
    if "official" in kinds:
        row["speedup"] = spread([theirs / mine for theirs, mine in zip(times["official"], times["ours"])])
    if args.eval_episodes:
        theirs = ask("official", "evaluate") if "official" in kinds else []
        row["eval_seconds"] = took = ask("ours", "evaluate")
        row["eval_fraction_of_floor"] = took["floor"][0] / took["ours"][0]
        if "official" in kinds:
            took["official"] = theirs + ask("official", "evaluate")
            row["eval_speedup"] = spread([t / took["ours"][0] for t in took["official"]])
    for process in processes.values():
        process.shutdown()
    if args.run_updates:
        row |= {"run_updates": args.run_updates, **whole_runs(algo, num_seeds, args)}
        rest = (1_000_000 - args.run_updates) * num_seeds / row["updates_per_second"]["ours"]
        row["million_seconds"] = row["run_seconds"] + rest  # of which the evaluations' are in the first
    return row


def spread(values: list[float]) -> dict:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def whole_runs(algo: str, num_seeds: int, args: Args) -> dict:
    """Seconds of runs from the command line, on 10 generated episodes, repeated up to the published number: of two from
    their start to their first update, the first of which has to compile; and of one from start to end, with its
    evaluations."""
    common = import_common()
    generated = common.load_dataset(common.load_task(args.env_name), generate_episodes=10)[1]
    with tempfile.TemporaryDirectory() as folder, np.load(generated["path"]) as raw:
        repeat = max(1, args.num_transitions // generated["transitions"])
        data = {name: np.concatenate([raw[name]] * repeat) for name in raw}
        np.savez_compressed(f"{folder}/data.npz", **data)
        command = [sys.executable, str(ROOT / "algos" / f"{algo}.py"), "--env-name", args.env_name]
        command += ["--dataset-path", "data.npz", "--seeds", *map(str, range(num_seeds))]
        command += ["--eval-episodes", str(args.eval_episodes)] if args.eval_episodes else []
        where = {"cwd": folder, "env": os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}}
        starts, records = [], lambda: len([*pathlib.Path(folder).glob("runs/*/*/*/train.csv")])
        for number in range(2):
            begun = time.perf_counter()
            process = subprocess.Popen([*command, "--num-updates", "10"], **where)
            while records() == number and process.poll() is None:
                time.sleep(0.01)
            starts.append(time.perf_counter() - begun)
            if process.poll():
                raise subprocess.CalledProcessError(process.returncode, process.args)
            process.kill()
            process.wait()
        begun = time.perf_counter()
        subprocess.run([*command, "--num-updates", str(args.run_updates)], check=True, **where)
        took = time.perf_counter() - begun
    return {"first_start_seconds": starts[0], "second_start_seconds": starts[1], "run_seconds": took}


def machine() -> str:
    """The processor's name and number of cores."""
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores"


def draw(rows: list[dict], path: pathlib.Path):
    """Bars of updates per second: ours, the official code's, the floor's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(2 + len(rows), 3.4), layout="constrained")
    kinds = [("official", "official FQL code", "#999999"), ("ours", "ours", "#1f6fb4"), ("floor", "floor", "#d9e6f2")]
    for offset, (kind, label, color) in enumerate(kinds):
        heights = [row["updates_per_second"].get(kind, 0) for row in rows]
        bars = axes.bar([i + 0.27 * (offset - 1) for i in range(len(rows))], heights, 0.25, label=label, color=color)
        axes.bar_label(bars, [f"{height:.3g}" if height else "" for height in heights], fontsize=7)
    axes.set_xticks(
        range(len(rows)),
        [f"{row['algo']}\n{row['num_seeds']} seed{'s' * (row['num_seeds'] > 1)}" for row in rows],
        fontsize=8,
    )
    axes.set_ylabel("updates of one seed per second")
    axes.set_title(f"{rows[0]['env_name']} sizes, {rows[0]['device']}, {machine()}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def check(args: Args):
    """Raises Error if the arguments ask for what cannot be had."""
    common = import_common()
    common.check_ranges(args)
    common.load_task(args.env_name)
    if missing := [algo for algo in args.algos if not (ROOT / "algos" / f"{algo}.py").exists()]:
        raise common.Error(f"there is no algos/{missing[0]}.py: give names of files there")
    if not args.algos or not args.num_seeds:
        raise common.Error("nothing is to be timed: give --algos and --num-seeds one or more values each")
    if args.run_updates and args.run_updates % 10:
        raise common.Error(f"--run-updates {args.run_updates} is impossible: give a multiple of 10")
    if args.fql_dir and not pathlib.Path(args.fql_dir, "agents").is_dir():
        raise common.Error(f"{args.fql_dir} is no clone of the official FQL code: git clone it there")
    try:
        pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=pathlib.Path(args.out).parent).close()
    except OSError as error:
        raise common.Error(f"cannot write {args.out}.json ({error.strerror}): give another --out")


def main(args: Args):
    """Times every algorithm at every number of seeds, prints a line each, and writes all that there are after each."""
    check(args)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # contestants share the GPU
    command = shlex.join(["python", "benchmark.py", *sys.argv[1:]])
    about, rows = {"date": f"{datetime.datetime.now():%Y-%m-%d}", "machine": machine(), "command": command}, []
    for algo in args.algos:
        for num_seeds in args.num_seeds:
            row = compare(algo, num_seeds, args)
            rows.append(row)
            text = f"{algo:10} {num_seeds} seed(s): {row['updates_per_second']['ours']:8.1f} updates/s of one seed"
            text += ", {median:.0%} of the floor ({min:.0%} to {max:.0%})".format(**row["fraction_of_floor"])
            if "speedup" in row:
                text += "; {median:.2f} x FQL's code ({min:.2f} to {max:.2f})".format(**row["speedup"])
            if "eval_seconds" in row:
                text += f"; {row['eval_seconds']['ours'][0]:.2f} s per evaluation episode"
                text += f", {row['eval_fraction_of_floor']:.0%} of its floor"
            if "eval_speedup" in row:
                text += ", {median:.2f} x FQL's loop ({min:.2f} to {max:.2f})".format(**row["eval_speedup"])
            if "run_seconds" in row:
                text += f"; first update {row['first_start_seconds']:.1f} s after the command"
                text += f", {row['second_start_seconds']:.1f} s the second time"
                text += f"; run of {args.run_updates:,} updates {row['run_seconds']:.0f} s"
                text += f", so of 1,000,000 {row['million_seconds'] / 60:.0f} min"
            memory = row["peak_device_gigabytes"] or row["peak_gigabytes"]
            print(f"{text}; first call {row['first_call_seconds']:.1f} s, peak memory {memory:.1f} GB", flush=True)
            pathlib.Path(f"{args.out}.json").write_text(json.dumps(about | {"rows": rows}, indent=1))
            draw(rows, pathlib.Path(f"{args.out}.png"))
    print(f"written: {args.out}.json, {args.out}.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
