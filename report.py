"""Tables, figures and a page of what `reproduce.py` has run, beside the paper's numbers.

    python report.py table2 --tasks cube-single-play -- --num-updates 20000 --generate-episodes 100   # as it was run
    python report.py --name reduced                               # once more, from results/reduced/runs.csv alone

The first collects the runs of these cells into results/<name>/runs.csv: one row per table, task, column, seed and
evaluation, with the data, versions and commit that they come from. All else is made of that file: README.md with the
tables, pictures, and page.html, which opens without a network. Rows that are not the paper's setting say so in
`reduced`, those on other data in `data`, and so does everything that shows them.
"""

import collections.abc
import dataclasses
import json
import pathlib
import sys
import textwrap
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tyro

import adroit
import common
from reproduce import ROOT, Selection, Target, expand, find_folder
from run import read_rows, to_csv

matplotlib.use("agg")  # draws files, not windows
matplotlib.rcParams["svg.hashsalt"] = "doal"  # the same picture is the same file
matplotlib.rcParams["legend.framealpha"] = 0
PAIRS = [("iql", "diql"), ("ifql", "difql"), ("trigflow", "dtrigflow"), ("mfql", "dmfql"), ("mfrebrac", "dmfrebrac")]
TITLES = {
    "table1": "Table 1: IQL-based",
    "table2": "Table 2: Q-learning based",
    "table3": "Table 3: mean gradient norm of DIFQL",
    "table4": "Table 4: MFQL by number of samples",
    "figure3": "Figure 3: mean gradient norm of DMFQL",
    "figure6": "Figure 6: DMFQL by delta",
    "figure7": "Figure 7: DMFQL by alpha",
    "figure8": "Figure 8: DMFQL by number of target samples",
}


@dataclasses.dataclass(frozen=True)
class Args(Selection):
    targets: tyro.conf.Positional[tuple[Target, ...]] = ()
    """what to collect from runs/ (none: nothing, results/<name>/runs.csv stays)"""
    name: str = "paper"
    """folder below results/"""


# ------------------------------------------------------------------------------------------------------- collection
def collect(args: Args, flags: list[str]) -> list[dict]:
    """A row per table, task, column, seed and evaluation of the selected cells, as far as they have been run."""
    paper = {cell[:3]: json.loads(cell.run.args) for cell in expand(args, [])}
    rows = []
    for cell in expand(args, flags):
        folder, _ = find_folder(cell.run)
        if not folder:
            continue
        record = json.loads((folder / "args.json").read_text())
        taken, data, known = record["args"], record["data"], paper[cell[:3]]
        about = ("env_name", "dataset_path", "generate_episodes")  # shown by columns of their own
        reduced = {name: taken[name] for name in known if name not in about and taken[name] != known[name]}
        shared = {
            "algorithm": cell.run.algo,
            "num_updates": taken["num_updates"],
            "episodes": taken["eval_episodes"],
            "alpha": taken.get("alpha"),
            "delta": taken.get("delta"),
            "reduced": " ".join(f"{name}={json.dumps(value).replace(' ', '')}" for name, value in reduced.items()),
            "data": data["source"],
            "transitions": data["transitions"],
            "sha256": data["sha256"][:16],
            "device": record["device"],
            "versions": " ".join(f"{name}={version}" for name, version in record["versions"].items()),
            "commit": record["commit"],
            "run": folder,
        }
        evals = [row | {"column": cell.column} for row in read_rows(folder / "eval.csv")]
        if cell.table == "table4":
            evals = read_rows(folder / "num_samples.csv")
            evals = [row | {"column": f"num_samples={row['num_samples']}"} for row in evals]
        norms = q_grad_norms(folder, taken["num_updates"] // 10)
        for row in evals:
            key = {name: row[name] for name in ("column", "seed", "step", "score")}
            norm = norms.get((int(row["seed"]), int(row["step"])), "")
            rows.append({"table": cell.table, "task": cell.task} | key | {"q_grad_norm": norm} | shared)
    return rows


def q_grad_norms(folder: pathlib.Path, interval: int) -> dict[tuple[int, int], str]:
    """{(seed, step): mean gradient norm over the `interval` updates before step} of a run that logged it."""
    norms = {}
    for row in read_rows(folder / "train.csv"):
        if "q_grad_norm" in row:
            step = -(-int(row["step"]) // interval) * interval
            norms.setdefault((int(row["seed"]), step), []).append(float(row["q_grad_norm"]))
    return {key: f"{np.mean(values):.6g}" for key, values in norms.items()}


class Result(NamedTuple):
    """The results of one cell of a table."""

    steps: np.ndarray  # [evaluations]
    curve: np.ndarray  # score, [seeds, evaluations]
    norms: np.ndarray  # mean gradient norm before each evaluation, [seeds, evaluations]; NaN where it is not logged
    scores: np.ndarray  # by the paper's protocol, [seeds]; [0] if the run is not finished
    about: dict  # what all its rows share


def load_cells(rows: list[dict]) -> dict[str, dict[tuple[str, str], Result]]:
    """The rows of runs.csv as {table: {(task, column): Result}}."""
    groups, cells = {}, {}
    for row in rows:
        groups.setdefault((row["table"], row["task"], row["column"]), []).append(row)
    for (table, task, column), group in groups.items():
        seeds, steps = (sorted({int(row[name]) for row in group}) for name in ("seed", "step"))
        curve, norms = np.full((2, len(seeds), len(steps)), np.nan)
        for row in group:
            at = seeds.index(int(row["seed"])), steps.index(int(row["step"]))
            curve[at], norms[at] = float(row["score"]), float(row["q_grad_norm"] or "nan")
        last = int(group[0]["num_updates"])
        first = common.first_scored(task, last)
        if table in ("table3", "figure3"):  # these are not of scores but of gradients, over all of the run
            curve, first = norms, 0
        scored = curve[:, np.array(steps) >= first] if steps[-1] == last else np.zeros((0, 1))
        result = Result(np.array(steps), curve, norms, scored.mean(axis=1), group[0])
        cells.setdefault(table, {})[task, column] = result
    return cells


# ------------------------------------------------------------------------------------------------------- statistics
def iqm(*scores: np.ndarray, axis: int = -1):
    """Interquartile mean over all tasks' scores [..., seeds], the mean of their middle half: [...]."""
    return scipy.stats.trim_mean(np.concatenate(scores, axis=axis), 0.25, axis=axis)


def improvement(*scores: np.ndarray, axis: int = -1):
    """The mean over tasks of P(X > Y) + P(X = Y) / 2, of each task's x [..., seeds] and then each one's y: [...]."""
    xs, ys = scores[: len(scores) // 2], scores[len(scores) // 2 :]
    pairs = [np.sign(x[..., :, None] - y[..., None, :]) for x, y in zip(xs, ys)]  # a NaN stays one
    return np.mean([(0.5 + 0.5 * pair).mean(axis=(-2, -1)) for pair in pairs], axis=0)


def interval(statistic, scores: list[np.ndarray], repetitions: int = 10_000) -> tuple[float, float, float]:
    """`statistic(*scores)` and its 95 % confidence interval by a bootstrap of each task's scores [seeds]: stratified.

    The interval's ends are NaN where a task has a single seed, which says nothing of the others.
    """
    value, ends = float(statistic(*scores)), (np.nan, np.nan)
    if min(map(len, scores)) > 1 and np.isfinite(value):
        settings = {"n_resamples": repetitions, "method": "percentile", "rng": 0}
        ends = scipy.stats.bootstrap(scores, statistic, **settings).confidence_interval
    return value, *map(float, ends)


def profile(tasks: list[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """Performance profile: the fraction of runs that score more than each threshold, the mean over tasks."""
    return np.mean([(scores[:, None] > thresholds).mean(axis=0) for scores in tasks], axis=0)


# ----------------------------------------------------------------------------------------------------------- tables
def unit_of(table: str, task: str) -> str:
    """What the numbers of a table are on a task."""
    if table in ("table3", "figure3"):
        return "mean gradient norm"
    return "normalized return" if task in adroit.TASKS else "success (%)"


def summarize(table: str, cells: dict[tuple[str, str], Result]) -> dict[tuple[str, str], dict]:
    """What the table and the page show of each of its cells, and of the paper's where it has that cell."""
    paper = {(row["task"], row["column"]): row for row in read_paper(table)}
    entries = {}
    for (task, column), cell in cells.items():
        theirs = paper.get((task, column)) or paper.get((task, f"{column}*"))  # * copied by the paper
        done, diverged = len(cell.scores) > 0, int(np.isnan(cell.scores).sum())
        mean, std = (cell.scores.mean(), cell.scores.std()) if done else (np.nan, np.nan)  # a NaN stays one
        digits = 2 if unit_of(table, task) == "mean gradient norm" else 1
        written = lambda scores, digits=digits: f"{scores.mean():.{digits}f} ± {scores.std():.{digits}f}"
        if diverged:
            rest = cell.scores[~np.isnan(cell.scores)]
            others = f", the others {written(rest)}" if len(rest) else ""
            text = f"nan ({diverged} of {len(cell.scores)} seeds diverged{others})"
        elif done:
            text = written(cell.scores)
        else:
            text = f"cut off at {100 * cell.steps[-1] / int(cell.about['num_updates']):.0f} %"
        entry = {"table": table, "task": task, "column": column, "text": text, "mean": mean, "std": std}
        entry["paper"] = " ± ".join(filter(None, (theirs["mean"], theirs["std"]))) if theirs else ""
        comparable = theirs and done and not cell.about["reduced"] and cell.about["data"] == "published"
        entry["difference"] = mean - float(theirs["mean"]) if comparable else np.nan
        entries[task, column] = entry | {"label": label([cell]), "run": cell.about["run"]}
    for (task, _), entry in entries.items():
        rivals = [rival for (name, _), rival in entries.items() if name == task]
        best = max(rivals, key=lambda e: np.nan_to_num(e["mean"], nan=-np.inf))
        entry["bold"] = len(rivals) > 1 and bool(entry["mean"] >= max(best["mean"] - best["std"], 1e-9))
    return entries


def read_paper(table: str) -> list[dict]:
    """The paper's rows of a table."""
    return [row for row in read_rows(ROOT / "results" / "paper.csv") if row["table"] == table]


def label(cells: collections.abc.Collection[Result]) -> str:
    """What sets these results apart from the paper's: reduced settings, other data, fewer seeds."""
    settings = [dict.fromkeys(cell.about["reduced"].split()) for cell in cells]
    shared = [text for text in settings[0] if all(text in others for others in settings)]
    rest = [text for text in dict.fromkeys(text for others in settings for text in others) if text not in shared]
    reduced = ", ".join([*shared, *(f"in some cells {text}" for text in rest)])
    data = dict.fromkeys(
        f"{cell.about['data']} data ({int(cell.about['transitions']):,} transitions)" for cell in cells
    )
    seeds = " or ".join(map(str, sorted({len(cell.curve) for cell in cells})))
    return f"{f'REDUCED: {reduced}' if reduced else 'full size'}; {' or '.join(data)}; {seeds} seeds"


def markdown(table: str, cells: dict, entries: dict) -> str:
    """A table of the paper as Markdown: tasks, columns, and in each cell ours and the paper's."""
    tasks, columns = in_order(entries)
    lines = [["task", *columns], ["---"] * (1 + len(columns))]
    for task in tasks:
        lines.append([task])
        for entry in (entries.get((task, column)) for column in columns):
            text = "" if not entry else f"**{entry['text']}**" if entry["bold"] else entry["text"]
            if entry and entry["paper"]:
                difference = "" if np.isnan(entry["difference"]) else f", {entry['difference']:+.1f}"
                text += f"<br>paper {entry['paper']}{difference}"
            lines[-1].append(text)
    for name, family in families(tasks):
        if len(family) == 1:
            continue
        lines.append([f"sum of {len(family)} {name} tasks"])
        for column in columns:
            parts = [entries[task, column] for task in family if (task, column) in entries]
            total = sum(part["mean"] for part in parts) if len(parts) == len(family) else np.nan
            paper = all(part["paper"] for part in parts) and sum(float(part["paper"].split()[0]) for part in parts)
            lines[-1].append("" if np.isnan(total) else f"{total:.0f}{f'<br>paper {paper:.0f}' if paper else ''}")
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {TITLES[table]}\n\n{label(cells.values())}\n\n{text}\n"


def in_order(keys: collections.abc.Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The tasks of (task, column) keys in the paper's order, and the columns in order of first appearance."""
    tasks, columns = (list(dict.fromkeys(key[i] for key in keys)) for i in (0, 1))
    return sorted(tasks, key=list(common.PAPER).index), columns


def families(tasks: list[str]) -> list[tuple[str, list[str]]]:
    """The tasks whose scores are commensurable: OGBench's, in % success, and Adroit's, in normalized return."""
    split = [
        ("OGBench", [t for t in tasks if t not in adroit.TASKS]),
        ("Adroit", [t for t in tasks if t in adroit.TASKS]),
    ]
    return [(name, family) for name, family in split if family]


def logs_norms(cell: Result) -> bool:
    """Whether a run logged mean||grad_a Q||."""
    return not np.isnan(cell.norms).all()


def norm_markdown(cells: dict[str, dict]) -> str:
    """Table 3: the mean over a run of mean||grad_a Q||, and the step that delta makes of it."""
    paper = {row["task"]: row["mean"] for row in read_paper("table3")}
    lines = [["task", "column", "mean gradient norm", "alpha", "delta", "delta / norm", "paper's norm"], ["---"] * 7]
    shown = {}  # Table 3's are Table 1's runs, too
    for table, results in cells.items():
        shown |= {cell.about["run"]: (table, key, cell) for key, cell in results.items() if logs_norms(cell)}
    for table, (task, column), cell in shown.values():
        norm, delta = cell.norms.mean(), float(cell.about["delta"])
        numbers = [f"{norm:.3g}", f"{float(cell.about['alpha']):g}", f"{delta:g}", f"{delta / norm:.2g}"]
        lines.append([task, column, *numbers, paper.get(task, "") if table == "table3" else ""])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    about = label([cell for *_, cell in shown.values()])
    return f"### Mean gradient norm of the critics (Table 3)\n\n{about}\n\n{text}\n"


def aggregate(cells: dict) -> list[dict]:
    """IQM of each column and probability of improvement of each D- column, over the tasks that all finished columns
    of a table have: a dict per family of tasks."""
    found = {key: cell.scores for key, cell in cells.items() if len(cell.scores)}
    (tasks, columns), aggregates = in_order(found), []
    for name, family in families(tasks):
        scores = {column: [found[task, column] for task in family if (task, column) in found] for column in columns}
        scores = {column: tasks for column, tasks in scores.items() if len(tasks) == len(family)}
        pairs = {f"{d} > {base}": scores[d] + scores[base] for base, d in PAIRS if {base, d} <= scores.keys()}
        aggregates.append(
            {
                "family": name,
                "tasks": family,
                "scores": scores,
                "iqm": {column: interval(iqm, tasks) for column, tasks in scores.items()},
                "improvement": {pair: interval(improvement, both) for pair, both in pairs.items()},
            }
        )
    return aggregates


def aggregate_markdown(table: str, cells: dict) -> str:
    """The numbers of `aggregate` as Markdown."""
    lines = [f"### {TITLES[table]}: over all tasks\n", label(cells.values()), ""]
    lines += ["| | tasks | value | 95 % confidence interval |", "| --- | --- | --- | --- |"]
    for part in aggregate(cells):
        tasks = f"{len(part['tasks'])} {part['family']}"
        lines += [f"| IQM of {c} | {tasks} | {v:.1f} | [{a:.1f}, {b:.1f}] |" for c, (v, a, b) in part["iqm"].items()]
        lines += [
            f"| P({p}) | {tasks} | {v:.2f} | [{a:.2f}, {b:.2f}] |" for p, (v, a, b) in part["improvement"].items()
        ]
    return "\n".join([*lines, "", "Stratified bootstrap over seeds, 10,000 draws.", ""])


# ---------------------------------------------------------------------------------------------------------- figures
def style(column: str) -> dict:
    """A colour for each baseline, dashed, and the same for its D- column, solid."""
    base = next((base for base, d in PAIRS if column == d), column)
    order = [*dict(PAIRS), "iql_tanh", "etrigflow", "rebrac_tanh", "rebrac_gauss", "fql", "mfql_bptt"]
    color = matplotlib.colors.to_hex(f"C{order.index(base) % 10}") if base in order else None
    return {"color": color, "linestyle": "--" if column in dict(PAIRS) else "-"}


def save(figure: plt.Figure, path: pathlib.Path, title: str, about: str) -> pathlib.Path:
    """Writes a figure as PNG, whose path it returns, and as SVG, under its title and label."""
    figure.suptitle(f"{title}\n{textwrap.fill(about, 14 * int(figure.get_figwidth()))}", fontsize=9)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, transparent=True)
    figure.savefig(path.with_suffix(".png"), dpi=130)
    plt.close(figure)
    return path.with_suffix(".png")


def draw_curves(table: str, cells: dict, path: pathlib.Path) -> pathlib.Path:
    """Curves over training, a panel per task: the mean over seeds, and a band of one std."""
    tasks, names = in_order(cells)
    rows, columns = -(-len(tasks) // 3), min(3, len(tasks))
    size = (max(6, 4.2 * columns), 3 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for axis, task in zip(axes.flat, tasks):
        for column, cell in ((column, cell) for (name, column), cell in cells.items() if name == task):
            mean, std = cell.curve.mean(axis=0), cell.curve.std(axis=0)
            (line,) = axis.plot(cell.steps, mean, **style(column))
            axis.fill_between(cell.steps, mean - std, mean + std, alpha=0.15, color=line.get_color(), linewidth=0)
        axis.set(title=task, xlabel="updates", ylabel=unit_of(table, task), ylim=(0, None))
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    lines = [plt.Line2D([], [], label=name, **style(name)) for name in names]
    figure.legend(handles=lines, loc="outside lower center", ncols=8, fontsize=8)
    return save(figure, path, f"{TITLES[table]}: curves over training", label(cells.values()))


def draw_bars(table: str, cells: dict, path: pathlib.Path) -> pathlib.Path:
    """Bars like the paper's Figures 6-8: a group per task, a bar per column, one std over seeds."""
    shown = {key: cell for key, cell in cells.items() if len(cell.scores)}
    tasks, columns = in_order(shown)
    figure, axis = plt.subplots(figsize=(max(6, 1.6 * len(tasks)), 4), layout="constrained")
    for i, column in enumerate(columns):
        scores = [shown[task, column].scores if (task, column) in shown else np.full(1, np.nan) for task in tasks]
        at = np.arange(len(tasks)) + (i - (len(columns) - 1) / 2) * 0.8 / len(columns)
        axis.bar(
            at, [s.mean() for s in scores], 0.8 / len(columns), yerr=[s.std() for s in scores], label=column, capsize=3
        )
    axis.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axis.set(ylabel="success (%)", ylim=(0, None))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, path, TITLES[table], label(shown.values()))


def draw_aggregate(table: str, cells: dict, part: dict, path: pathlib.Path) -> pathlib.Path:
    """IQM and probability of improvement with their intervals, and performance profiles, over a family of tasks."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, name in ((left, "iqm"), (middle, "improvement")):
        for i, (what, (value, low, high)) in enumerate(part[name].items()):
            column = what.split(" > ")[0]
            axis.barh(i, high - low, left=low, alpha=0.4, height=0.6, color=style(column)["color"])
            axis.plot([value, value], [i - 0.3, i + 0.3], color="black")
        ticks = [f"{what}: nan" if np.isnan(value) else what for what, (value, _, _) in part[name].items()]
        axis.set_yticks(range(len(ticks)), ticks)
        axis.invert_yaxis()
    unit = unit_of(table, part["tasks"][0])
    left.set(title="IQM", xlabel=unit, xlim=(min(0, left.get_xlim()[0]), None))
    middle.set(title="probability of improvement", xlim=(0, 1))
    middle.axvline(0.5, color="gray", linestyle=":")
    thresholds = np.linspace(0, max(100, *(scores.max() for tasks in part["scores"].values() for scores in tasks)), 201)
    for column, tasks in part["scores"].items():
        right.step(thresholds, profile(tasks, thresholds), label=column, where="post", **style(column))
    right.set(title="performance profile", xlabel=f"threshold, {unit}", ylabel="runs that score more", ylim=(0, 1))
    right.legend(fontsize=7)
    about = label([cells[task, column] for task in part["tasks"] for column in part["scores"]])
    over = f"over {len(part['tasks'])} {part['family']} task{'s' * (len(part['tasks']) > 1)}"
    return save(figure, path, f"{TITLES[table]}: {over} (95 % intervals)", about)


# ------------------------------------------------------------------------------------------------------------- page
def write_page(folder: pathlib.Path, name: str, cells: dict[str, dict], entries: dict[str, dict], drawn: list):
    """Writes page.html: page_template.html with the data and the pictures in it, so that it needs nothing else."""
    listed = lambda values: np.where(np.isnan(values), None, values).tolist()  # JSON has no NaN
    read = lambda path: path.with_suffix(".svg").read_text().replace("#000000", "currentColor")
    svg = lambda path: "<svg" + read(path).partition("<svg")[2]
    tables, shown = [], []
    for table, results in cells.items():
        units = {task: unit_of(table, task) for task in in_order(results)[0]}
        tables.append({"id": table, "title": TITLES[table], "label": label(results.values()), "units": units})
        for key, entry in entries[table].items():
            cell = results[key]
            entry |= {"scores": cell.scores, "seeds": cell.curve, "steps": cell.steps, **style(entry["column"])}
            numbers = ("mean", "std", "difference", "scores", "seeds", "steps")
            shown.append(entry | {number: listed(entry[number]) for number in numbers})
    pictures = {path.stem: svg(path) for path in sorted(drawn) if "curves" not in path.stem}
    data = {"name": name, "tables": tables, "entries": shown, "pictures": pictures}
    page = (ROOT / "page_template.html").read_text().replace("DATA", json.dumps(data).replace("</", "<\\/"))
    (folder / "page.html").write_text(page)


def main(args: Args, flags: list[str]):
    """Collects, if anything is named, and writes everything that is made of results/<name>/runs.csv."""
    folder = pathlib.Path("results", args.name)
    if args.targets:
        rows = collect(args, flags)
        if not rows:
            raise common.Error("none of these cells has been run: python reproduce.py with the same words runs them")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "runs.csv").write_text(to_csv(rows, header=True))
    cells = load_cells(read_rows(folder / "runs.csv", "seed", "step", "num_updates"))
    if not cells:
        raise common.Error(f"{folder}/runs.csv has no rows: name the tables to collect, like table1, or another --name")
    entries = {table: summarize(table, results) for table, results in cells.items()}
    texts, pictures = [], []
    if any(logs_norms(cell) for results in cells.values() for cell in results.values()):
        texts.append(norm_markdown(cells))
    for table, results in cells.items():
        if table in ("table1", "table2", "table4"):
            texts.append(markdown(table, results, entries[table]))
        if table in ("table1", "table2"):
            texts.append(aggregate_markdown(table, results))
            pictures.append(draw_curves(table, results, folder / f"{table}-curves"))
            for part in aggregate(results):
                path = folder / f"{table}-{part['family'].lower()}"
                pictures.append(draw_aggregate(table, results, part, path))
        elif table in ("figure6", "figure7", "figure8"):
            pictures.append(draw_bars(table, results, folder / table))
        elif table == "figure3":
            pictures.append(draw_curves(table, results, folder / table))
    heading = f"# Results: {args.name}\n\nMade by `python report.py --name {args.name}` of [runs.csv](runs.csv).\n"
    shown = [f"![{path.stem}]({path.name})\n" for path in pictures]
    (folder / "README.md").write_text("\n".join([heading, *texts, *shown]))
    write_page(folder, args.name, cells, entries, pictures)
    print(f"{sum(map(len, cells.values()))} cells: {folder}/README.md, {folder}/page.html")


if __name__ == "__main__":
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, args=sys.argv[1:end]), sys.argv[end + 1 :])
