"""Tables and curves of what has been run, beside the paper's numbers.

    python scripts/report.py table2 --tasks cube-single-play --name small -- --num-updates 20000 --seeds 1 2
    python scripts/report.py --name small   # once more, from results/small/runs.csv alone

The first takes the arguments of reproduce.py. It finds the seeds of each cell anywhere in runs/, trained together or
each as a run of its own, and writes results/<name>/runs.csv: a row per table, task, column, seed and evaluation, with
the data and the code behind it. README.md and the pictures beside it are made of that file alone.
"""

import pathlib
import sys
import textwrap
import types

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
NORMS = ("table3", "figure3")  # these are of the gradients' mean norm, not of scores
TEXT = """# Results: {name}

Made of [runs.csv](runs.csv) by `python scripts/report.py --name {name}`.

- A seed's score is the mean of its evaluations at 80, 90 and 100 % of the run; on Adroit, the last one. The tables show
  mean ± standard deviation over seeds.
- IQM is the mean of the middle half of all seeds' scores. P(better) is the probability that a seed of a **D-** file
  scores more than one of its baseline. [Brackets] hold 95 % confidence intervals by a stratified bootstrap over seeds.
- "paper" is the paper's number, of its full size: published data, 8 seeds (4 in Table 4)."""


# ------------------------------------------------------------------------------------------------------- collection
def collect(selection: Selection, flags: list[str]) -> pd.DataFrame:
    """A row per table, task, column, seed and evaluation of the selected cells, as far as they have been run."""
    runs, parts = [], [pd.DataFrame()]
    for path in sorted(pathlib.Path("runs").rglob("args.json")):
        record = read_record(path.parent)
        runs.append((path.parent, record, question(record["algo"], types.SimpleNamespace(**record["args"]))))
    paper = {cell[:3]: identity(cell.algo, cell.args) for cell in expand(selection, [])}
    for cell in expand(selection, flags):
        asked = question(cell.algo, cell.args)
        found = [read_run(cell, folder, record) for folder, record, answer in runs if answer == asked]
        if not found:
            continue
        rows = pd.concat(found, ignore_index=True)
        rows = rows[rows.seed.isin(cell.args.seeds)]
        # of a seed that was run more than once, the run that got furthest counts
        furthest = rows.groupby(["seed", "run"]).size().sort_values(kind="stable").groupby("seed").tail(1).index
        rows = rows[pd.MultiIndex.from_frame(rows[["seed", "run"]]).isin(furthest)]
        values, usual = identity(cell.algo, cell.args), paper[cell[:3]]
        changed = [f"{name} {value}" for name, value in values.items() if value != usual[name]]
        plain = str.maketrans("", "", "[,]")  # hidden_dims 256 256
        parts.append(rows.assign(changed=", ".join(text.translate(plain) for text in changed)))
    return pd.concat(parts)


def read_run(cell: Cell, folder: pathlib.Path, record: dict) -> pd.DataFrame:
    """The evaluations of a run that fills a cell, a row per seed and step."""
    read = lambda name, *more: pd.DataFrame(read_rows(folder / name), columns=["seed", "step", *more]).astype(float)
    task, end, column = common.load_task(cell.task), cell.args.num_updates, cell.column
    rows, train = read("eval.csv", "score"), read("train.csv", "diverged", "q_grad_norm")
    diverged = train[train.diverged == 1].groupby("seed").step.min()
    if cell.table == "table4":
        rows = read("num_samples.csv", "num_samples", "score")
        column = [f"num_samples={number:.0f}" for number in rows.num_samples]
    else:  # a run whose seeds have all diverged has ended: their score is nan
        lost = pd.DataFrame({"seed": diverged.index, "step": float(end), "score": np.nan})
        rows = pd.concat([rows, lost], ignore_index=True).drop_duplicates(["seed", "step"], ignore_index=True)
    if cell.table in NORMS:  # the mean over the tenth of the run before each evaluation
        train["step"] = np.ceil(train.step / (end // 10)) * (end // 10)
        rows["score"] = rows.merge(train.groupby(["seed", "step"]).q_grad_norm.mean().reset_index(), "left").q_grad_norm
    row = {
        "table": cell.table,
        "task": cell.task,
        "column": column,
        "algorithm": cell.algo,
        "seed": rows.seed.astype(int),
        "step": rows.step.astype(int),
        "score": rows.score.mask(rows.step >= rows.seed.map(diverged)),
        "unit": "mean gradient norm" if cell.table in NORMS else task.unit,
        "counts": rows.step >= (0 if cell.table in NORMS else task.scored_from * end),  # towards the seed's score
        "num_updates": end,
        "data": f"{record['data']['source']} data ({record['data']['transitions']:,} transitions)",
        "sha256": record["data"]["sha256"][:16],
        "device": record["device"],
        "versions": " ".join(f"{name}={version}" for name, version in record["versions"].items()),
        "commit": " ".join(dict.fromkeys(str(code["commit"]) for code in (record, *record.get("resumed", ())))),
        "run": str(folder),
    }
    return pd.DataFrame(row, index=rows.index)


# ------------------------------------------------------------------------------------------------------- statistics
def final_scores(rows: pd.DataFrame) -> dict[tuple[str, str], np.ndarray]:
    """{(task, column): scores of its finished seeds}, by the paper's protocol; NaN where one diverged."""
    last = rows.groupby(["task", "column", "seed"]).step.transform("max")
    seeds = rows[rows.counts & (last == rows.num_updates)].groupby(["task", "column", "seed"]).score
    cells = seeds.agg(lambda values: values.mean(skipna=False)).groupby(["task", "column"])
    return {key: scores.to_numpy() for key, scores in cells}


def iqm(*scores: np.ndarray, axis: int = -1):
    """Interquartile mean over all tasks' scores [..., seeds], the mean of their middle half: [...]."""
    return scipy.stats.trim_mean(np.concatenate(scores, axis=axis), 0.25, axis=axis)


def improvement(*scores: np.ndarray, axis: int = -1):
    """The mean over tasks of P(X > Y) + P(X = Y) / 2, of each task's x [..., seeds] and then each one's y: [...]."""
    xs, ys = scores[: len(scores) // 2], scores[len(scores) // 2 :]
    pairs = [np.sign(x[..., :, None] - y[..., None, :]) for x, y in zip(xs, ys)]  # a NaN stays one
    return np.mean([(0.5 + 0.5 * pair).mean(axis=(-2, -1)) for pair in pairs], axis=0)


def estimate(statistic, scores: list[np.ndarray], digits: int) -> str:
    """`statistic(*scores)` with its 95 % interval by a bootstrap of each task's scores [seeds]: stratified. A dash if
    a task has a single seed, which says nothing of the others."""
    if min(map(len, scores)) < 2:
        return "–"
    value = float(statistic(*scores))
    if np.isnan(value):
        return "nan"
    drawn = scipy.stats.bootstrap(scores, statistic, n_resamples=10_000, method="percentile", rng=0)
    low, high = drawn.confidence_interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


# ----------------------------------------------------------------------------------------------------- tables, text
def label(rows: pd.DataFrame) -> str:
    """What sets results apart from the paper's: other settings and other data."""
    changed = ", ".join(dict.fromkeys(part for text in rows.changed.unique() for part in text.split(", ") if part))
    return f"{f'REDUCED: {changed}' if changed else 'Full size'}; on {' or '.join(rows.data.unique())}"


def show(scores: list[np.ndarray], digits: int) -> str:
    """Of a task, mean and standard deviation (ddof 0) over seeds; of several, the mean. One that diverged is told."""
    lost, (first, *others) = sum(np.isnan(x).sum() for x in scores), scores
    if lost:
        return f"nan ({lost} of {sum(map(len, scores))} diverged)"
    mean = f"{np.mean([x.mean() for x in scores]):.{digits}f}"
    return mean if others or len(first) == 1 else f"{mean} ± {first.std():.{digits}f}"


def score_table(table: str, rows: pd.DataFrame) -> str:
    """A row per task and column of the paper's table; above these, if there are several tasks, a row of all tasks."""
    printed = pd.read_csv(common.ROOT / "results" / "paper.csv").iloc[::-1]  # its own come after those it copied (*)
    paper = {(row.table, row.task, row.column.rstrip("*")): (row.mean, row.std) for row in printed.itertuples()}
    scores, columns, tasks = final_scores(rows), list(rows.column.unique()), list(rows.task.unique())
    digits, lines = 2 if table in NORMS else 1, []
    for group in ([tasks] if len(tasks) > 1 else []) + [[task] for task in tasks]:
        for c in columns:
            ours, base = ([scores[t, name] for t in group if (t, name) in scores] for name in (c, c[1:]))
            theirs = [paper[table, t, c] for t in group if (table, t, c) in paper]
            paired = c[0] == "d" and c[1:] in columns
            line = [f"all {len(group)} tasks" if len(group) > 1 else group[0], f"**{c}**" if paired else c, *[""] * 5]
            if len(ours) == len(group):
                line[2] = " or ".join(str(n) for n in sorted(set(map(len, ours))))
                line[3] = show(ours, digits)
                line[4] = estimate(iqm, ours, digits)
                line[5] = estimate(improvement, ours + base, 2) if paired and len(base) == len(group) else ""
            else:
                begun = rows[rows.task.isin(group) & (rows.column == c)].groupby("task")[["step", "num_updates"]].max()
                line[3] = f"{(begun.step / begun.num_updates).sum() / len(group):.0%} done"
            if len(theirs) == len(group):
                mean, std = np.mean(theirs, axis=0)
                line[6] = f"{mean:.{digits}f}" if len(group) > 1 or np.isnan(std) else f"{mean:g} ± {std:g}"
            lines.append(line)
    head = ["task", "algorithm", "seeds", rows.unit.iloc[0], "IQM [95 %]", "P(better) [95 %]", "paper"]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


# ---------------------------------------------------------------------------------------------------------- picture
def draw(title: str, rows: pd.DataFrame, path: pathlib.Path):
    """Curves over training. A task has a panel for each D- file with its baseline, and one for all others."""
    tasks, columns = rows.task.unique(), list(rows.column.unique())
    pairs = [[c, f"d{c}"] for c in columns if f"d{c}" in columns]
    groups = [group for group in (*pairs, [c for c in columns if c not in sum(pairs, [])]) if group]
    panels = [(task, group) for task in tasks for group in groups]
    width = len(groups) if len(groups) > 1 else min(3, len(tasks))
    height = -(-len(panels) // width)
    size = (max(7, 4 * width), 3 * height + 1)
    figure, axes = plt.subplots(height, width, figsize=size, squeeze=False, layout="constrained", sharey="row")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (task, group) in zip(axes.flat, panels):
        for i, column in enumerate(group):
            seeds = rows[(rows.task == task) & (rows.column == column)].pivot(index="step", columns="seed")["score"]
            mean, std = seeds.mean(axis=1, skipna=False), seeds.std(axis=1, ddof=0, skipna=False)
            color = ("0.4", "C0")[i] if group in pairs else f"C{i + 1}"
            name, line = f"{column}, {len(seeds.columns)} seed", "--" if f"d{column}" in group else "-"
            axis.plot(mean.index, mean, line, color=color, label=name + "s" * (len(seeds.columns) > 1))
            axis.fill_between(mean.index, mean - std, mean + std, alpha=0.2, color=color, linewidth=0)
        axis.set(title=task, xlabel="updates", ylabel=rows.unit.iloc[0])
        if rows.unit.iloc[0] == "% success":
            axis.set_ylim(0, 100)
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axis.legend(fontsize=8)
    lines = f"{title}: mean over seeds, band ± 1 standard deviation", label(rows)
    figure.suptitle("\n".join(textwrap.fill(line, int(13 * size[0])) for line in lines), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Selection, flags: list[str]):
    """Collects, if tables are named, and writes all that is made of results/<name>/runs.csv."""
    folder = pathlib.Path("results", args.name)
    if args.targets:
        rows = collect(args, flags)
        if rows.empty:
            raise common.Error("none of these cells has been run: scripts/reproduce.py with the same arguments does")
        folder.mkdir(parents=True, exist_ok=True)
        rows.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    elif not (folder / "runs.csv").exists():
        raise common.Error(f"there is no {folder}/runs.csv: name the tables to collect, like table1, or another --name")
    texts, rows = [TEXT.format(name=args.name)], pd.read_csv(folder / "runs.csv", dtype={"changed": str})
    rows["changed"] = rows.changed.fillna("")
    for (table, unit), part in rows.groupby(["table", "unit"], sort=False):
        part = part.sort_values("task", key=lambda names: names.map(list(common.PAPER).index), kind="stable")
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
