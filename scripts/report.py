"""Tables and figures of what has been run, beside the paper's numbers.

    python scripts/report.py table2 --tasks cube-single-play --name small -- --num-updates 20000 --seeds 1 2
    python scripts/report.py --name small   # once more, from results/small/runs.csv alone

The first takes the arguments of reproduce.py, finds each seed of each cell in runs/, also where each was a run of its
own, and writes results/<name>/runs.csv: a row per table, task, column, seed and evaluation, with the data, versions and
commit behind it. README.md and the pictures beside it are made of that file alone. What is not the paper's setting, on
other data, or diverged says so wherever it is shown.
"""

import functools
import json
import pathlib
import re
import sys
import textwrap
import types
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # this checkout, whatever else is installed

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import tyro
from reproduce import Cell, Selection, expand, question

import common
from run import identity, read_record, read_rows

matplotlib.use("agg")  # draws files, not windows
NORMS = ("table3", "figure3")  # of the gradients' mean norm, not of scores
NOTHING = pd.DataFrame({"step": [], "seed": [], "diverged": [], "score": []})


# ------------------------------------------------------------------------------------------------------- collection
def collect(selection: Selection, flags: list[str]) -> pd.DataFrame:
    """A row per table, task, column, seed and evaluation of the selected cells, as far as they have been run.

    Where a seed was run more than once, the run that got furthest counts.
    """
    runs = [(path.parent, read_record(path.parent)) for path in sorted(pathlib.Path("runs").rglob("args.json"))]
    answers = [question(record["algo"], types.SimpleNamespace(**record["args"])) for _, record in runs]
    paper, parts = {cell[:3]: cell.args for cell in expand(selection, [])}, []
    for cell in expand(selection, flags):
        asked, found = question(cell.algo, cell.args), {}
        same = [run for run, answer in zip(runs, answers) if answer == asked]
        for seed in cell.args.seeds:
            rows = [seed_rows(cell, seed, *run) for run in same if seed in run[1]["args"]["seeds"]]
            if any(map(len, rows)):
                found[seed] = max(rows, key=len)
        values = identity(cell.algo, cell.args) | {"seeds": list(found)}
        usual = identity(cell.algo, paper[cell[:3]]) | {"seeds": list(paper[cell[:3]].seeds)}
        changed = [f"{name}={json.dumps(value)}" for name, value in values.items() if value != usual[name]]
        parts += [rows.assign(reduced=" ".join(text.replace(" ", "") for text in changed)) for rows in found.values()]
    return pd.concat(parts) if parts else pd.DataFrame()


def seed_rows(cell: Cell, seed: int, folder: pathlib.Path, record: dict) -> pd.DataFrame:
    """The evaluations of one seed of a cell that a run's folder has, a row each."""
    evals = read_seeds(folder / ("num_samples.csv" if cell.table == "table4" else "eval.csv")).get(seed, NOTHING)
    train, end = read_seeds(folder / "train.csv").get(seed, NOTHING), cell.args.num_updates
    where = {"table": cell.table, "task": cell.task, "column": cell.column, "seed": seed}
    rows = pd.DataFrame(where | {"step": evals.step.astype(int), "score": evals.score})
    diverged = train.step[train.diverged == 1].min()  # the first such step; NaN if there is none
    if cell.table == "table4":
        rows["column"] = [f"num_samples={number:.0f}" for number in evals.get("num_samples", ())]
    elif diverged > 0 and end not in set(rows.step):  # the run ended, as none of its seeds was left
        rows.loc[-1] = [*where.values(), end, np.nan]
    rows["score"] = rows.score.mask(rows.step >= diverged)
    tenth = -(-train.step // (end // 10)) * (end // 10)  # the evaluation that follows
    rows["q_grad_norm"] = rows.step.map(train.q_grad_norm.groupby(tenth).mean() if "q_grad_norm" in train else {})
    args, data = record["args"], record["data"]
    return rows.assign(
        algorithm=cell.algo,
        num_updates=end,
        episodes=args["eval_episodes"],
        alpha=args.get("alpha"),
        delta=args.get("delta"),
        data=data["source"],
        transitions=data["transitions"],
        sha256=data["sha256"][:16],
        device=record["device"],
        versions=" ".join(f"{name}={version}" for name, version in record["versions"].items()),
        commit=" ".join(dict.fromkeys(str(code["commit"]) for code in (record, *record.get("resumed", ())))),
        run=str(folder),
    )


@functools.cache
def read_seeds(path: pathlib.Path) -> dict[int, pd.DataFrame]:
    """The rows of each seed in a run's CSV."""
    rows = read_rows(path)
    return dict(list(pd.DataFrame(rows).astype(float).groupby("seed"))) if rows else {}


class Result(NamedTuple):
    """What a cell of a table shows."""

    curve: pd.DataFrame  # what the table is of, [seeds, steps]; NaN where a seed diverged, or has not come to yet
    scores: np.ndarray  # of the seeds that are finished, by the paper's protocol, [seeds]; NaN if one diverged
    rows: pd.DataFrame  # its rows of runs.csv


def load_cells(path: pathlib.Path) -> dict[str, dict[tuple[str, str], Result]]:
    """The rows of a runs.csv as {table: {(task, column): Result}}."""
    cells, frame = {}, pd.read_csv(path, dtype={"reduced": str}).fillna({"reduced": ""})
    for (table, task, column), rows in frame.groupby(["table", "task", "column"], sort=False):
        curve = rows.pivot(index="seed", columns="step", values="q_grad_norm" if table in NORMS else "score")
        last = rows.num_updates.iloc[0]
        first = 0 if table in NORMS else common.load_task(task).scored_from * last
        finished = curve.loc[curve.index.isin(rows.seed[rows.step == last]), curve.columns >= first]
        cells.setdefault(table, {})[task, column] = Result(curve, finished.mean(axis=1, skipna=False).to_numpy(), rows)
    return cells


def unit_of(table: str, task: str) -> str:
    """What the numbers of a table are on a task."""
    return "mean gradient norm" if table in NORMS else common.load_task(task).unit


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
def label(cells: list[Result]) -> str:
    """What sets these results apart from the paper's: reduced settings, other data, fewer seeds, divergence."""
    rows = pd.concat([cell.rows for cell in cells])
    reduced = ", ".join(dict.fromkeys(" ".join(rows.reduced).split()))
    data = [
        f"{source} data ({number:,} transitions)" for source, number in rows.groupby(["data", "transitions"]).groups
    ]
    seeds = " or ".join(map(str, sorted({len(cell.curve) for cell in cells})))
    diverged = sum(int(np.isnan(cell.scores).sum()) for cell in cells)
    text = f"{f'REDUCED: {reduced}' if reduced else 'full size'}; {' or '.join(data)}; {seeds} seeds"
    return text + f"; {diverged} diverged (nan)" * (diverged > 0)


def show(table: str, cell: Result) -> str:
    """Mean and standard deviation (ddof 0) over the seeds of a cell, or what keeps it from having them."""
    scores, first, diverged, digits = cell.scores, cell.rows.iloc[0], np.isnan(cell.scores), 1 + (table in NORMS)
    written = lambda scores: f"{scores.mean():.{digits}f} ± {scores.std():.{digits}f}"
    if not len(scores):
        return f"{100 * cell.curve.columns[-1] / first.num_updates:.0f} % done"
    text = written(scores)
    if diverged.any():
        others = "" if diverged.all() else f", the others {written(scores[~diverged])}"
        text = f"nan ({diverged.sum()} of {len(scores)} seeds diverged{others})"
    text += f" ({len(scores)} of {len(cell.curve)} seeds finished)" * (len(scores) < len(cell.curve))
    return text + (f"; delta {first.delta:g}, alpha {first.alpha:g}" if table in NORMS else "")


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def in_order(cells: dict[tuple[str, str], Result]) -> tuple[list[str], list[str]]:
    """Tasks, in the paper's order, and columns."""
    tasks, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    return sorted(tasks, key=list(common.PAPER).index), columns


def score_table(table: str, cells: dict[tuple[str, str], Result]) -> str:
    """A table of the paper: tasks, columns, and in each cell ours and the paper's; bold within one std of the best."""
    paper = pd.read_csv(common.ROOT / "results" / "paper.csv", dtype=str, keep_default_na=False)
    paper = {tuple(row[:3]): " ± ".join(filter(None, row[3:])) for row in paper.itertuples(index=False)}
    tasks, columns = in_order(cells)
    rows = [["task", *columns]]
    for task in tasks:
        scores = {c: cells[task, c].scores for c in columns if (task, c) in cells and len(cells[task, c].scores)}
        best = max(scores.values(), key=lambda x: np.nan_to_num(x.mean(), nan=-np.inf), default=None)
        bold = [c for c in scores if len(scores) > 1 and scores[c].mean() >= max(best.mean() - best.std(), 1e-9)]
        rows.append([task])
        for c in columns:
            text = show(table, cells[task, c]) if (task, c) in cells else ""
            theirs = paper.get((table, task, c)) or paper.get((table, task, f"{c}*"))  # * copied by the paper
            rows[-1].append((f"**{text}**" if c in bold else text) + (f"<br>paper {theirs}" if theirs else ""))
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------------- figures
def style(column: str, columns: list[str]) -> dict:
    """A colour for each baseline, dashed, and the same for its D- column, solid."""
    base = column[1:] if column[0] == "d" and column[1:] in columns else column
    return {"color": f"C{columns.index(base) % 10}", "linestyle": "--" if f"d{column}" in columns else "-"}


def save(figure: plt.Figure, path: pathlib.Path, cells: list[Result]) -> str:
    """Writes a figure, with what sets its results apart above it: the Markdown that shows it."""
    figure.suptitle(textwrap.fill(label(cells), 14 * int(figure.get_figwidth())), fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return f"![{path.stem}]({path.name})"


def draw_curves(table: str, cells: dict[tuple[str, str], Result], path: pathlib.Path) -> str:
    """Curves over training, a panel per task: the mean over seeds, and a band of one std."""
    tasks, columns = in_order(cells)
    width = min(3, len(tasks))
    height = -(-len(tasks) // width)
    size = (max(6, 4.2 * width), 3 * height + 0.8)
    figure, axes = plt.subplots(height, width, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for axis, task in zip(axes.flat, tasks):
        low = high = 0
        for column in (column for column in columns if (task, column) in cells):
            curve, look = cells[task, column].curve, style(column, columns)
            mean, std = curve.mean(skipna=False), curve.std(ddof=0, skipna=False)
            low, high = np.nanmin([low, *mean]), np.nanmax([high, *(mean + std)])
            axis.plot(curve.columns, mean, **look)
            axis.fill_between(curve.columns, mean - std, mean + std, alpha=0.15, color=look["color"], linewidth=0)
        axis.set(title=task, xlabel="updates", ylabel=unit_of(table, task), ylim=(low, 1.05 * high or 1))
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    lines = [plt.Line2D([], [], label=column, **style(column, columns)) for column in columns]
    figure.legend(handles=lines, loc="outside lower center", ncols=8, fontsize=8)
    return save(figure, path, list(cells.values()))


def draw_bars(table: str, cells: dict[tuple[str, str], Result], path: pathlib.Path) -> str:
    """Bars like the paper's Figures 6 to 8: a group per task, a bar per column, one std over seeds."""
    tasks, columns = in_order(cells)
    figure, axis = plt.subplots(figsize=(max(6, 1.6 * len(tasks)), 4), layout="constrained")
    finished = {key: cell.scores for key, cell in cells.items() if len(cell.scores)}
    mean, std = (
        pd.DataFrame({c: {t: of(finished.get((t, c), np.nan)) for t in tasks} for c in columns})
        for of in (np.mean, np.std)
    )
    mean.plot.bar(ax=axis, yerr=std, width=0.8, capsize=3, ylabel=unit_of(table, tasks[0]))
    axis.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, path, list(cells.values()))


def aggregate(cells: dict[tuple[str, str], Result], unit: str, path: pathlib.Path) -> list[str]:
    """What the cells, all of one unit, say together: the interquartile mean of each column that is finished on every
    task, each D- column's probability of improvement on its baseline, and performance profiles, as Markdown."""
    tasks, columns = in_order(cells)
    columns = [c for c in columns if all((task, c) in cells and len(cells[task, c].scores) for task in tasks)]
    if not columns:
        return []
    scores = {c: [cells[task, c].scores for task in tasks] for c in columns}
    pairs = [(f"d{c}", c) for c in columns if f"d{c}" in columns]
    iqms = {c: interval(iqm, scores[c]) for c in columns}
    improvements = {f"{d} > {c}": interval(improvement, scores[d] + scores[c]) for d, c in pairs}
    rows = [[f"over {len(tasks)} task(s)", "value", "95 % confidence interval"]]
    for name, values in (("IQM of", iqms), ("P of", improvements)):
        rows += [[f"{name} {what}", f"{v:.2f}", f"{low:.2f} to {high:.2f}"] for what, (v, low, high) in values.items()]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, values in ((left, iqms), (middle, improvements)):
        for i, (what, (value, low, high)) in enumerate(values.items()):
            axis.barh(i, high - low, left=low, alpha=0.4, height=0.6, color=style(what.split()[0], columns)["color"])
            axis.plot([value, value], [i - 0.3, i + 0.3], color="black")
        names = [f"{what}: nan" if np.isnan(value) else what for what, (value, _, _) in values.items()]
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
    ends = [0, *(end for triple in iqms.values() for end in triple)]
    left.set(title="IQM", xlabel=unit, xlim=(np.nanmin(ends), 1.05 * np.nanmax(ends) or 1))
    middle.set(title="probability of improvement", xlim=(0, 1))
    middle.axvline(0.5, color="gray", linestyle=":")
    middle.set_visible(len(pairs) > 0)
    thresholds = np.linspace(0, np.nanmax(np.concatenate([*sum(scores.values(), []), [100]])), 201)
    for c in columns:
        right.step(thresholds, profile(scores[c], thresholds), label=c, where="post", **style(c, columns))
    right.set(title="performance profile", xlabel=unit, ylabel="runs that score more", ylim=(0, 1))
    right.legend(fontsize=7)
    shown = save(figure, path, [cells[task, c] for task in tasks for c in columns])
    return [
        markdown(rows),
        "Stratified bootstrap over seeds, 10,000 draws; nan where a seed diverged or is alone.",
        shown,
    ]


def main(args: Selection, flags: list[str]):
    """Collects, if tables are named, and writes all that is made of results/<name>/runs.csv. Raises Error if there is
    nothing."""
    folder = pathlib.Path("results", args.name)
    if args.targets:
        rows = collect(args, flags)
        if not len(rows):
            raise common.Error(
                "none of these cells has been run: scripts/reproduce.py with the same arguments runs them"
            )
        folder.mkdir(parents=True, exist_ok=True)
        rows.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    elif not (folder / "runs.csv").exists():
        raise common.Error(f"there is no {folder}/runs.csv: name the tables to collect, like table1, or another --name")
    texts = [
        f"# Results: {args.name}",
        f"Made of [runs.csv](runs.csv) by `python scripts/report.py --name {args.name}`.",
    ]
    for table, cells in load_cells(folder / "runs.csv").items():
        title = re.sub(r"(\d)", r" \1", table.capitalize()) + ": mean gradient norm" * (table in NORMS)
        texts += [f"## {title}", label(list(cells.values())), score_table(table, cells)]
        if table in ("table1", "table2"):
            for unit in dict.fromkeys(unit_of(table, task) for task, _ in cells):
                part = {key: cell for key, cell in cells.items() if unit_of(table, key[0]) == unit}
                texts += aggregate(part, unit, folder / f"{table}-{unit.strip('% ').replace(' ', '-')}.png")
        if table in ("table1", "table2", *NORMS):
            texts.append(draw_curves(table, cells, folder / f"{table}-curves.png"))
        elif table != "table4":
            texts.append(draw_bars(table, cells, folder / f"{table}.png"))
    (folder / "README.md").write_text("\n\n".join(texts) + "\n")
    print(f"written: {folder}/README.md")


if __name__ == "__main__":
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Selection, args=sys.argv[1:end]), sys.argv[end + 1 :])
