"""Makes tables and curves of finished and unfinished runs, beside the paper's numbers and the authors' curves.

    python scripts/report.py table2 --tasks cube-single-play --name small -- --num-updates 20000 --seeds 1 2
    python scripts/report.py --name small   # again, from results/small/runs.csv alone

The first takes the arguments of reproduce.py and collects the runs of these cells, wherever they are in runs/, into
results/<name>/runs.csv. README.md and the pictures beside it are made from that file alone.
"""

import contextlib
import glob
import itertools
import pathlib
import re
import sys
import textwrap

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # this checkout, whatever else is installed

import matplotlib

matplotlib.use("agg")  # it only writes files, even if a notebook has set another backend

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.ticker import EngFormatter
from reproduce import Cell, Selection, expand
from scipy.interpolate import interp1d
from scipy.stats import bootstrap, trim_mean

import common
from run import identity, read_rows

RESULTS = common.ROOT / "results"
PRINTED = {row[:3]: row[3:] for row in pd.read_csv(RESULTS / "paper.csv").itertuples(index=False)}  # (mean, std)
AUTHORS = pd.read_csv(RESULTS / "authors.csv")
DATA = ("dataset_path", "generate_episodes")  # flags that a table shows anyway
EVALUATION = ("eval_episodes", "eval_seed")  # flags that do not change a norm
CURVE = ["mean", "min", "max"]  # columns of AUTHORS
plt.rcParams.update({"axes.titlesize": "medium", "figure.titlesize": "medium"})  # 10 points, 800 pixels wide
NORMS = ("table3", "figure3")  # they show the mean gradient norm, not scores
TEXT = """# Results: {name}

Made from [runs.csv](runs.csv) by `python scripts/report.py --name {name}`.

- A seed's score is the mean of its evaluations at 80, 90 and 100 % of the run; on Adroit, the last one. The tables show
  mean ± standard deviation over seeds; over several tasks, mean (sum).
- IQM is the mean of the middle half of all seeds' scores. P(better) is the probability that a seed of a **D-** file
  scores more than one of its baseline. [Brackets] hold 95 % confidence intervals by a stratified bootstrap over seeds.
- "paper" is the paper's number, at full size: published data, 8 seeds (4 in Table 4).
- "authors" are the curves of their runs, also in the pictures: the mean [min, max] of 8 seeds (4 or 9 in Figure 6) at
  the same update. Beside them is our value at that update alone."""


def collect(selection: Selection, flags: list[str]) -> pd.DataFrame:
    """A row per table, task, column, seed and evaluation of the selected cells, as far as they have been run."""
    cells, runs, parts = expand(selection, flags), [], []
    paper = {cell[:3]: identity(cell.algo, cell.args) for cell in expand(selection, [])}
    kinds = {cell.algo: type(cell.args) for cell in cells}
    for path in sorted(map(pathlib.Path, glob.glob("runs/**/args.json", recursive=True))):  # also behind links
        with contextlib.suppress(common.Error, KeyError):  # another program's, or of an algorithm that is not asked for
            record = common.read_record(path.parent)
            own = identity(record["algo"], common.read_args(record, kinds[record["algo"]]))
            runs.append((own, path.parent, record))
    for cell in cells:
        asked, usual = identity(cell.algo, cell.args), paper[cell[:3]]
        free = {flag: asked[flag] for flag in EVALUATION if cell.table in NORMS}  # what may differ from the request
        matter = usual.keys() - {*DATA, *free}
        changed = {key: value for key, value in asked.items() if value != usual[key] and key in matter}
        if changed.keys() <= {"num_updates"} and asked["num_updates"] <= usual["num_updates"]:
            # Nothing depends on a run's length: one with fewer updates is the beginning of the paper's.
            changed, free = {}, free | {"num_updates": usual["num_updates"]}
        asked |= free
        told = ", ".join(re.sub(r"[\[,\]]", "", f"{key} {value}") for key, value in changed.items())
        end = asked["num_updates"]
        same = [run for own, *run in runs if own | free == asked and own["num_updates"] <= end]
        found = [read_run(cell, end, *run) for run in same]
        seeds = [(seed, rows.assign(changed=told)) for run in found for seed, rows in run.groupby("seed")]
        furthest = dict(sorted(seeds, key=lambda pair: (pair[1].step.max(), len(pair[1]))))  # the last one is kept
        parts += [furthest[seed] for seed in cell.args.seeds if seed in furthest]
    if not parts:
        raise common.Error("none of these cells has a result yet: scripts/reproduce.py with these arguments runs them")
    return pd.concat(parts)


def read_run(cell: Cell, end: int, folder: pathlib.Path, record: dict) -> pd.DataFrame:
    """The evaluations of a run that fills a cell of `end` updates, a row per seed and step."""
    read = lambda name, *more: pd.DataFrame(read_rows(folder / name), columns=["seed", "step", *more]).astype(float)
    task, column, tenths = common.load_task(cell.task), cell.column, np.arange(1, 11) * (end // 10)
    unit, rows, train = task.unit, read("eval.csv", "score"), read("train.csv", "diverged", "q_grad_norm")
    first = task.scored_from * end  # evaluation that counts for the seed's score
    if cell.table in NORMS:  # also at the updates of the authors' curve, by the two nearest chunks
        unit, first, parts = "mean gradient norm", 0, [rows[:0]]
        for seed, chunks in train.groupby("seed"):
            steps = np.union1d(tenths, AUTHORS.step[AUTHORS.table == cell.table])
            steps = steps[steps <= chunks.step.max()]
            centres = chunks.step - (chunks.step.min() - 1) / 2
            if len(chunks) > 1:  # a line needs two
                norms = interp1d(centres, chunks.q_grad_norm, fill_value="extrapolate")(steps)
                parts.append(pd.DataFrame({"seed": seed, "step": steps, "score": norms}))
        rows = pd.concat(parts, ignore_index=True)
    diverged = train[train.diverged == 1].groupby("seed").step.min()
    if cell.table == "table4":
        rows = read("num_samples.csv", "num_samples", "score")
        column = [f"num_samples={number:.0f}" for number in rows.num_samples]
    else:  # a run whose seeds have all diverged has ended: they score nan from there on
        lost = [(seed, step, np.nan) for seed, first in diverged.items() for step in tenths[tenths >= first]]
        rows = pd.concat([rows, pd.DataFrame(lost, columns=["seed", "step", "score"])], ignore_index=True)
        rows = rows.drop_duplicates(["seed", "step"], ignore_index=True)
    row = {"table": cell.table, "task": cell.task, "column": column, "algorithm": cell.algo}
    row |= {"seed": rows.seed.astype(int), "step": rows.step.astype(int)}
    row |= {"score": rows.score.mask(rows.step >= rows.seed.map(diverged)), "unit": unit}
    row |= {"counts": rows.step >= first, "num_updates": end}
    data, codes = record["data"], [record, *record.get("resumed", [])]
    row |= {"data": f"{data['source']} data ({data['transitions']:,} transitions)", "sha256": data["sha256"][:16]}
    row |= {"device": record["device"], "versions": " ".join(f"{k}={v}" for k, v in record["versions"].items())}
    row |= {"commit": " ".join(dict.fromkeys(str(code["commit"]) for code in codes)), "run": str(folder)}
    return pd.DataFrame(row, index=rows.index)


def final_scores(rows: pd.DataFrame) -> dict[tuple[str, str], np.ndarray]:
    """{(task, column): scores of its finished seeds}, by the paper's protocol; NaN for one that diverged."""
    last = rows.groupby(["task", "column", "seed"]).step.transform("max")
    seeds = rows[rows.counts & (last == rows.num_updates)].groupby(["task", "column", "seed"]).score
    cells = seeds.agg(lambda values: values.mean(skipna=False)).groupby(["task", "column"])
    return {key: scores.to_numpy() for key, scores in cells}


def iqm(*scores: np.ndarray, axis: int = -1):
    """Interquartile mean over all tasks' scores [..., seeds], the mean of their middle half: [...]."""
    return trim_mean(np.concatenate(scores, axis=axis), 0.25, axis=axis)


def improvement(*scores: np.ndarray, axis: int = -1):
    """The mean over tasks of P(X > Y) + P(X = Y) / 2; `scores` are each task's x [..., seeds], then each y: [...]."""
    xs, ys = scores[: len(scores) // 2], scores[len(scores) // 2 :]
    pairs = [np.sign(x[..., :, None] - y[..., None, :]) for x, y in zip(xs, ys)]  # a NaN stays one
    return np.mean([(0.5 + 0.5 * pair).mean(axis=(-2, -1)) for pair in pairs], axis=0)


def estimate(statistic, scores: list[np.ndarray], digits: int) -> str:
    """`statistic(*scores)` with its 95 % interval by a stratified bootstrap of each task's scores [seeds]. A dash where
    a task has a single seed, or one that diverged."""
    if min(map(len, scores)) < 2 or np.isnan(statistic(*scores)):
        return "–"
    low, high = bootstrap(scores, statistic, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    return f"{statistic(*scores):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def label(rows: pd.DataFrame) -> str:
    """How results differ from the paper's, and whether from each other: settings, updates, data."""
    if changed := ", ".join(dict.fromkeys(", ".join(rows.changed.dropna().unique()).split(", "))):
        size = f"REDUCED: {changed}"
    else:
        updates = rows.groupby(["task", "column"]).step.max().agg(["min", "max"]).unique()
        size = f"Full size: {' to '.join(f'{n:,}' for n in updates)} of {rows.num_updates.iloc[0]:,} updates"
    files = rows.groupby("task").sha256.nunique().max()
    return f"{size}; on {' or '.join(rows.data.unique())}" + (f" in {files} files" if files > 1 else "")


def show(scores: list[np.ndarray], digits: int) -> str:
    """For one task, mean ± standard deviation (ddof 0) over seeds; for several, mean (sum). Says if seeds diverged."""
    if lost := sum(np.isnan(x).sum() for x in scores):
        return f"nan ({lost} of {sum(map(len, scores))} diverged)"
    means = [x.mean() for x in scores]
    spread = f" ({sum(means):.{digits}f})" if len(scores) > 1 else f" ± {scores[0].std():.{digits}f}"
    return f"{np.mean(means):.{digits}f}" + spread * (len(scores) > 1 or len(scores[0]) > 1)


def markdown(lines: list[list[str]]) -> str:
    """A table: its header and its rows."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def score_table(table: str, rows: pd.DataFrame) -> str:
    """A row per task and column of the paper's table; first, if there are several tasks, a row per column for all."""
    scores, columns, tasks = final_scores(rows), list(rows.column.unique()), list(rows.task.unique())
    digits = 2 if table in NORMS else 1
    lines = [["task", "algorithm", "seeds", rows.unit.iloc[0], "IQM [95 %]", "P(better) [95 %]", "paper"]]
    for group, c in itertools.product(
        [tasks] * (len(tasks) > 1 and table not in NORMS) + [[task] for task in tasks], columns
    ):
        baseline = c[1:] if c[0] == "d" else None
        ours, base = ([scores[t, name] for t in group if (t, name) in scores] for name in (c, baseline))
        task = f"all {len(group)} tasks" if len(group) > 1 else group[0]
        line = [task, f"**{c}**" if base else c, "", "unfinished", "", "", ""]
        if len(ours) == len(group):
            line[2] = " or ".join(map(str, sorted(set(map(len, ours)))))
            line[3], line[4] = show(ours, digits), estimate(iqm, ours, digits)
            if len(base) == len(group):
                line[5] = estimate(improvement, ours + base, 2)
        theirs = [PRINTED.get((table, t, c), PRINTED.get((table, t, f"{c}*"))) for t in group]  # *: others' runs
        if all(theirs):
            mean, std = np.transpose(theirs)
            known = len(group) == 1 and std[0] >= 0
            line[6] = f"{mean[0]:g} ± {std[0]:g}" if known else show([*mean[:, None]], digits)
        lines.append(line)
    return markdown(lines)


def curve_table(table: str, rows: pd.DataFrame) -> str:
    """Ours beside the authors', a row per task, algorithm and number of updates."""
    digits = 2 if table in NORMS else 1
    lines = [["task", "algorithm", "updates", "seeds", rows.unit.iloc[0], "authors [min, max]"]]
    for (task, column, step), seeds in rows.groupby(["task", "column", "step"], sort=False):
        mean, low, high = seeds[CURVE].iloc[0]
        line = [task, column, f"{step:,}", str(len(seeds)), show([seeds.score.to_numpy()], digits)]
        theirs = f"{mean:.{digits}f} [{round(low, digits):g}, {round(high, digits):g}]"
        lines.append([*line, theirs if mean >= 0 else ""])
    return markdown(lines)


def draw(title: str, rows: pd.DataFrame, path: pathlib.Path):
    """Curves over training: for each task, a panel per D- file with its baseline and one for the others. Behind our
    mean over seeds are the authors' mean, min and max or, if they cannot be compared, our standard deviation."""
    columns = list(rows.column.unique())
    pairs = [[c, f"d{c}"] for c in columns if f"d{c}" in columns]
    groups = [*pairs, [c for c in columns if c not in sum(pairs, [])]]
    panels = [rows[(rows.task == task) & rows.column.isin(group)] for task in rows.task.unique() for group in groups]
    panels, lines = [panel for panel in panels if len(panel)], []
    seeds = [panel.groupby("column").seed.nunique().max() for panel in panels]
    wide = [panel.column.nunique() > 2 and panel.task.iloc[0] for panel in panels]  # for the legend of more than a pair
    kinds = list(zip(seeds, wide))
    for _, alike in itertools.groupby(range(len(panels)), kinds.__getitem__):  # side by side: equally many seeds
        alike = list(alike)
        lines += [(alike[i : i + 2] * 2)[:2] for i in range(0, len(alike), 2)]
    fig = plt.figure(figsize=(8, 3.3 * len(lines) + 0.6), layout="constrained")
    for i, axis in fig.subplot_mosaic(lines).items():
        for color, (column, part) in enumerate(panels[i].groupby("column", sort=False)):
            style, band = {"color": f"C{color}"}, part[part.changed.isna()].groupby("step")[CURVE].first().dropna()
            scores = part.pivot(index="step", columns="seed", values="score")
            mean, std = scores.mean(axis=1, skipna=False), scores.std(axis=1, ddof=0, skipna=False)
            spread = "" if len(band) else " ± std"
            name = f"{column}, {scores.shape[1]} seeds{spread}" if scores.shape[1] > 1 else f"{column}, 1 seed"
            axis.plot(mean, ".--" if f"d{column}" in columns else ".-", label=name, **style)
            if len(band):
                aside = band.index + 0.01 * color * panels[i].step.max()  # so that no bar hides another
                axis.plot(aside, band["mean"], "_:", label="authors [min, max]", **style)
                axis.vlines(aside, band["min"], band["max"], alpha=0.5, **style)
            else:
                band = pd.DataFrame({"min": mean - std, "max": mean + std})
            axis.fill_between(band.index, band["min"], band["max"], alpha=0.2, linewidth=0, **style)
        names = panels[i].column.unique()
        axis.set_title(f"{panels[i].task.iloc[0]}\n{' and '.join(names)}" if len(names) < 3 else panels[i].task.iloc[0])
        axis.set(xlabel="updates", ylabel=rows.unit.iloc[0])
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k
        axis.set_ylim((0, 100) if rows.unit.iloc[0] == "% success" else None)
        axis.legend(ncols=2 if len(names) > 2 else 1)
    fig.suptitle(textwrap.fill(f"{title}. {label(rows)}", 100))
    fig.savefig(path, dpi=200)
    plt.close(fig)


def main(args: Selection, flags: list[str]):
    """Collects, if tables are named, and writes all that is made from results/<name>/runs.csv."""
    folder = pathlib.Path("results", args.name)
    if args.targets:
        rows = collect(args, flags)
        folder.mkdir(parents=True, exist_ok=True)
        rows.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    elif not (folder / "runs.csv").exists():
        raise common.Error(f"there is no {folder}/runs.csv: name the tables to collect, like table1, or another --name")
    texts = [TEXT.format(name=args.name)]
    try:
        rows = pd.read_csv(folder / "runs.csv").merge(AUTHORS, "left", ["table", "task", "column", "step"])
    except (ValueError, KeyError) as error:
        raise common.Error(f"{folder}/runs.csv is damaged ({error}): name its tables to collect it anew")
    for (table, unit), part in rows.groupby(["table", "unit"], sort=False):
        title = f"{table[:-1].capitalize()} {table[-1]}, {unit}"
        title += f" of {part.algorithm.iloc[0]}" * (part.algorithm.nunique() == 1)
        texts += [f"## {title}", label(part)]
        if part.changed.notna().any() or final_scores(part):
            texts.append(score_table(table, part))
        if table == "table4":  # which has no curves
            continue
        early = (part.step <= 10_000) & part["mean"].notna()  # the authors' curves of the gradient norm begin there
        if len(compared := part[part.changed.isna() & ((part.step % 100_000 == 0) | early)]):
            texts.append(curve_table(table, compared))
        if part.step.nunique() > 1:  # a curve needs two
            picture = f"{table}-{unit.split()[-1]}.png"
            draw(title, part, folder / picture)
            texts.append(f"![{title}]({picture})")
    (folder / "README.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print(f"written: {folder}/README.md")


if __name__ == "__main__":
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Selection, args=sys.argv[1:end]), sys.argv[end + 1 :])
