"""Tables and curves of what has been run, beside the paper's numbers.

    python scripts/report.py table2 --tasks cube-single-play --name small -- --num-updates 20000 --seeds 1 2
    python scripts/report.py --name small   # once more, from results/small/runs.csv alone

The first takes the arguments of reproduce.py, and collects the runs of these cells, wherever they are in runs/, into
results/<name>/runs.csv. README.md and the pictures beside it are made of that file alone.
"""

import itertools
import pathlib
import re
import sys
import types

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # this checkout, whatever else is installed

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from reproduce import Cell, Selection, expand
from scipy.stats import bootstrap, trim_mean

import common
from run import identity, read_rows

DATA = ("dataset_path", "generate_episodes")  # flags whose effect a table says by itself
NORMS = ("table3", "figure3")  # these are of the gradients' mean norm, not of scores
TEXT = """# Results: {name}

Made of [runs.csv](runs.csv) by `python scripts/report.py --name {name}`.

- A seed's score is the mean of its evaluations at 80, 90 and 100 % of the run; on Adroit, the last one. The tables show
  mean ± standard deviation over seeds.
- IQM is the mean of the middle half of all seeds' scores. P(better) is the probability that a seed of a **D-** file
  scores more than one of its baseline. [Brackets] hold 95 % confidence intervals by a stratified bootstrap over seeds.
- "paper" is the paper's number, of its full size: published data, 8 seeds (4 in Table 4)."""


def collect(selection: Selection, flags: list[str]) -> pd.DataFrame:
    """A row per table, task, column, seed and evaluation of the selected cells, as far as they have been run."""
    runs = [(path.parent, common.read_record(path.parent)) for path in sorted(pathlib.Path("runs").rglob("args.json"))]
    answers = [identity(record["algo"], types.SimpleNamespace(**record["args"])) for _, record in runs]
    paper = {cell[:3]: identity(cell.algo, cell.args) for cell in expand(selection, [])}
    parts = []
    for cell in expand(selection, flags):
        asked, usual = identity(cell.algo, cell.args), paper[cell[:3]]
        changed = [re.sub(r"[\[,\]]", "", f"{k} {v}") for k, v in asked.items() if v != usual[k] and k not in DATA]
        found = [read_run(cell, *run) for run, answer in zip(runs, answers) if answer == asked]
        seeds = [(seed, rows.assign(changed=", ".join(changed))) for run in found for seed, rows in run.groupby("seed")]
        furthest = dict(sorted(seeds, key=lambda pair: len(pair[1])))  # keeps the longest of a seed's runs
        parts += [furthest[seed] for seed in cell.args.seeds if seed in furthest]
    if not parts:
        raise common.Error("none of these cells has been run: scripts/reproduce.py with the same arguments does")
    return pd.concat(parts)


def read_run(cell: Cell, folder: pathlib.Path, record: dict) -> pd.DataFrame:
    """The evaluations of a run that fills a cell, a row per seed and step."""
    read = lambda name, *more: pd.DataFrame(read_rows(folder / name), columns=["seed", "step", *more]).astype(float)
    task, end, column = common.load_task(cell.task), cell.args.num_updates, cell.column
    unit, first = task.unit, task.scored_from * end
    rows, train = read("eval.csv", "score"), read("train.csv", "diverged", "q_grad_norm")
    diverged = train[train.diverged == 1].groupby("seed").step.min()
    if cell.table == "table4":
        rows = read("num_samples.csv", "num_samples", "score")
        column = [f"num_samples={number:.0f}" for number in rows.num_samples]
    else:  # a run whose seeds have all diverged has ended: their score is nan
        lost = pd.DataFrame({"seed": diverged.index, "step": float(end), "score": np.nan})
        rows = pd.concat([rows, lost], ignore_index=True).drop_duplicates(["seed", "step"], ignore_index=True)
    if cell.table in NORMS:  # the mean over the tenth of the run before each evaluation
        tenths = np.ceil(train.step / (end // 10)) * (end // 10)
        rows["score"] = rows.join(train.groupby(["seed", tenths]).q_grad_norm.mean(), ["seed", "step"]).q_grad_norm
        unit, first = "mean gradient norm", 0
    row = {"table": cell.table, "task": cell.task, "column": column, "algorithm": cell.algo}
    row |= {"seed": rows.seed.astype(int), "step": rows.step.astype(int)}
    row |= {"score": rows.score.mask(rows.step >= rows.seed.map(diverged)), "unit": unit}
    row |= {"counts": rows.step >= first, "num_updates": end}  # counts: towards the seed's score
    data, codes = record["data"], [record, *record.get("resumed", [])]
    row |= {"data": f"{data['source']} data ({data['transitions']:,} transitions)", "sha256": data["sha256"][:16]}
    row |= {"device": record["device"], "versions": " ".join(f"{k}={v}" for k, v in record["versions"].items())}
    row |= {"commit": " ".join(dict.fromkeys(str(code["commit"]) for code in codes)), "run": str(folder)}
    return pd.DataFrame(row, index=rows.index)


def final_scores(rows: pd.DataFrame) -> dict[tuple[str, str], np.ndarray]:
    """{(task, column): scores of its finished seeds}, by the paper's protocol; NaN where one diverged."""
    last = rows.groupby(["task", "column", "seed"]).step.transform("max")
    seeds = rows[rows.counts & (last == rows.num_updates)].groupby(["task", "column", "seed"]).score
    cells = seeds.agg(lambda values: values.mean(skipna=False)).groupby(["task", "column"])
    return {key: scores.to_numpy() for key, scores in cells}


def iqm(*scores: np.ndarray, axis: int = -1):
    """Interquartile mean over all tasks' scores [..., seeds], the mean of their middle half: [...]."""
    return trim_mean(np.concatenate(scores, axis=axis), 0.25, axis=axis)


def improvement(*scores: np.ndarray, axis: int = -1):
    """The mean over tasks of P(X > Y) + P(X = Y) / 2, of each task's x [..., seeds] and then each one's y: [...]."""
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
    """What sets results apart from the paper's: other settings and other data."""
    changed = ", ".join(dict.fromkeys(", ".join(rows.changed.dropna().unique()).split(", ")))
    return f"{f'REDUCED: {changed}' if changed else 'Full size'}; on {' or '.join(rows.data.unique())}"


def show(scores: list[np.ndarray], digits: int) -> str:
    """Of a task, mean and standard deviation (ddof 0) over seeds; of several, the mean. One that diverged is told."""
    if lost := sum(np.isnan(x).sum() for x in scores):
        return f"nan ({lost} of {sum(map(len, scores))} diverged)"
    mean = f"{np.mean([x.mean() for x in scores]):.{digits}f}"
    return mean if len(scores) > 1 or len(scores[0]) == 1 else f"{mean} ± {scores[0].std():.{digits}f}"


def score_table(table: str, rows: pd.DataFrame) -> str:
    """A row per task and column of the paper's table; above these, if there are several tasks, a row of all tasks."""
    paper = {row[:3]: row[3:] for row in pd.read_csv(common.ROOT / "results" / "paper.csv").itertuples(index=False)}
    scores, columns, tasks = final_scores(rows), list(rows.column.unique()), list(rows.task.unique())
    digits = 2 if table in NORMS else 1
    lines = [["task", "algorithm", "seeds", rows.unit.iloc[0], "IQM [95 %]", "P(better) [95 %]", "paper"], ["---"] * 7]
    for group, c in itertools.product([tasks] * (len(tasks) > 1) + [[task] for task in tasks], columns):
        baseline = c[1:] if c[0] == "d" else None
        ours, base = ([scores[t, name] for t in group if (t, name) in scores] for name in (c, baseline))
        task = f"all {len(group)} tasks" if len(group) > 1 else group[0]
        line = [task, f"**{c}**" if base else c, "", "unfinished", "", "", ""]
        if len(ours) == len(group):
            line[2] = " or ".join(map(str, sorted(set(map(len, ours)))))
            line[3], line[4] = show(ours, digits), estimate(iqm, ours, digits)
            if len(base) == len(group):
                line[5] = estimate(improvement, ours + base, 2)
        theirs = [paper.get((table, t, c), paper.get((table, t, f"{c}*"))) for t in group]  # *: not of its own runs
        if all(theirs):
            mean, std = np.mean(theirs, axis=0)
            line[6] = f"{mean:.{digits}f}" if len(group) > 1 or np.isnan(std) else f"{mean:g} ± {std:g}"
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(title: str, rows: pd.DataFrame, path: pathlib.Path):
    """Curves over training: a row of panels per task, a panel for each D- file with its baseline and one for others."""
    tasks, columns = rows.task.unique(), list(rows.column.unique())
    pairs = [[c, f"d{c}"] for c in columns if f"d{c}" in columns]
    groups = [group for group in (*pairs, [c for c in columns if c not in sum(pairs, [])]) if group]
    size = 4 * len(groups) + 3, 3 * len(tasks) + 1
    fig, axes = plt.subplots(len(tasks), len(groups), figsize=size, squeeze=False, layout="constrained", sharey="row")
    for axis, (task, group) in zip(axes.flat, itertools.product(tasks, groups)):
        for column in group:
            seeds = rows[(rows.task == task) & (rows.column == column)].pivot(index="step", columns="seed")["score"]
            mean, std = seeds.mean(axis=1, skipna=False), seeds.std(axis=1, ddof=0, skipna=False)
            x = seeds.index / 1000
            axis.plot(x, mean, "--" if f"d{column}" in group else "-", label=f"{column}, {seeds.shape[1]} seed(s)")
            axis.fill_between(x, mean - std, mean + std, alpha=0.2)
        axis.set(title=task, xlabel="thousand updates", ylabel=rows.unit.iloc[0])
        axis.set_ylim((0, 100) if rows.unit.iloc[0] == "% success" else None)
        axis.legend(fontsize=8)
    fig.suptitle(f"{title}: mean over seeds, band ± 1 standard deviation. {label(rows)}", fontsize=9, wrap=True)
    fig.savefig(path, dpi=120)


def main(args: Selection, flags: list[str]):
    """Collects, if tables are named, and writes all that is made of results/<name>/runs.csv."""
    folder = pathlib.Path("results", args.name)
    if args.targets:
        rows = collect(args, flags)
        folder.mkdir(parents=True, exist_ok=True)
        rows.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    elif not (folder / "runs.csv").exists():
        raise common.Error(f"there is no {folder}/runs.csv: name the tables to collect, like table1, or another --name")
    rows, texts = pd.read_csv(folder / "runs.csv"), [TEXT.format(name=args.name)]
    for (table, unit), part in rows.groupby(["table", "unit"], sort=False):
        title = f"{table[:-1].capitalize()} {table[-1]}, {unit}"
        title += f" of {part.algorithm.iloc[0]}" * (part.algorithm.nunique() == 1)
        texts += [f"## {title}", label(part), score_table(table, part)]
        if table != "table4":  # which has no curves
            picture = f"{table}-{unit.split()[-1]}.png"
            draw(title, part, folder / picture)
            texts.append(f"![{title}]({picture})")
    (folder / "README.md").write_text("\n\n".join(texts) + "\n")
    print(f"written: {folder}/README.md")


if __name__ == "__main__":
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Selection, args=sys.argv[1:end]), sys.argv[end + 1 :])
