"""report.py: statistics against scipy and naive loops, what is gathered, and what is said of runs that are not the
paper's."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest
import report
import scipy.stats
from reproduce import Selection, expand

import common
from run import append_rows

FLAGS = ["--num-updates", "20", "--seeds", "1", "2"]
SELECTION = Selection(("table2", "figure3", "figure6"), ("cube-single-play", "pen-human-v1"), name="small")
CURVE = np.array([[0, 0, 0, 5, 10, 20, 30, 40, 50, 60], [0, 0, 0, 0, 0, 0, 10, 20, 30, 40.0]])  # [seeds, evaluations]


@pytest.fixture
def tasks():
    """Scores of three tasks with 4, 8 and 5 seeds, with ties."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 10, seeds).astype(float) for seeds in (4, 8, 5)]


def test_iqm_is_the_mean_of_the_middle_half():
    scores = np.array([9.0, 1, 2, 100]), np.array([3, 4, 5, 6])
    assert report.iqm(*scores) == np.mean([3, 4, 5, 6])  # of 1 2 | 3 4 5 6 | 9 100


def test_probability_of_improvement_is_mann_whitneys(tasks):
    x, y, z = tasks
    naive = np.mean([float(a > b) + 0.5 * (a == b) for a, b in itertools.product(x, y)])
    assert report.improvement(x, y) == naive == scipy.stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
    assert report.improvement(x, y, y, z) == np.mean([report.improvement(x, y), report.improvement(y, z)])
    assert np.isnan(report.improvement(np.array([1, np.nan]), y))  # a seed that diverged is not hidden


def test_intervals_are_of_a_stratified_bootstrap(tasks):
    rng, draws = np.random.default_rng(0), []
    indices = [rng.integers(0, len(scores), (10_000, len(scores))) for scores in tasks]
    for i in range(10_000):
        drawn = sorted(scores[k] for scores, index in zip(tasks, indices) for k in index[i])
        draws.append(np.mean(drawn[len(drawn) // 4 : len(drawn) - len(drawn) // 4]))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert report.estimate(report.iqm, tasks, 3) == f"{report.iqm(*tasks):.3f} [{low:.3f}, {high:.3f}]"
    constant = [np.full(4, 3.0), np.full(4, 7.0)]  # a draw never mixes tasks: nothing varies within them
    assert report.estimate(report.iqm, constant, 0) == "5 [5, 5]"
    assert report.estimate(report.improvement, constant[::-1], 0) == "1 [1, 1]"
    assert report.estimate(report.iqm, [*tasks, np.array([1.0])], 0) == "–"  # a single seed
    assert report.estimate(report.iqm, [*tasks, np.array([1.0, np.nan])], 0) == "nan"


def record_run(folder, cell, seeds, tenths=10, diverged=99, **changes):
    """Writes what a run of a cell leaves in its folder, with CURVE's scores. Seed 2 diverges at step `diverged`."""
    folder.mkdir(parents=True)
    args = dataclasses.asdict(dataclasses.replace(cell.args, seeds=seeds, **changes))
    data = {"source": "generated", "transitions": 4000, "sha256": "0" * 64}
    record = {"algo": cell.algo, "args": args, "data": data, "device": "1 x cpu", "versions": {"jax": "0"}}
    (folder / "args.json").write_text(json.dumps(record | {"commit": "c", "resumed": [{"commit": "d"}]}))
    for i, seed in itertools.product(range(tenths), seeds):
        for step in (2 * i + 1, 2 * i + 2):
            row = {"step": step, "seed": seed, "diverged": int(seed == 2 and step >= diverged)}
            append_rows(folder / "train.csv", [row | {"q_grad_norm": 10 * i + step - 2 * i}])
        if not row["diverged"] or len(seeds) > 1:  # a run that has no seed left ends
            append_rows(folder / "eval.csv", [row | {"score": "nan" if row["diverged"] else CURVE[(seed - 1) % 2, i]}])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A report of runs in many pieces: the rows of its runs.csv, its text, and its folder."""
    tmp_path = tmp_path_factory.mktemp("report")
    cells = {cell[:3]: cell for cell in expand(SELECTION, FLAGS)}
    mfql, dmfql = (cells["table2", "cube-single-play", column] for column in ("mfql", "dmfql"))
    runs = tmp_path / "runs"
    record_run(runs / "job-1", mfql, (1,))
    record_run(runs / "a" / "b" / "job-2", mfql, (2, 3), num_workers=7)  # more seeds than asked for
    record_run(runs / "job-2-begun", mfql, (2,), tenths=3)
    record_run(runs / "other", mfql, (1, 2), batch_size=1)
    record_run(runs / "on-published-data", mfql, (1, 2), dataset_path="x")
    record_run(runs / "dmfql", dmfql, (1, 2))
    record_run(runs / "hand", cells["table2", "pen-human-v1", "dmfql"], (1, 2), diverged=13)
    record_run(runs / "ends", cells["table2", "pen-human-v1", "mfql"], (2,), tenths=2, diverged=3)  # no seed was left
    record_run(runs / "begun", cells["table2", "pen-human-v1", "fql"], (1, 2), tenths=0)
    record_run(runs / "delta", cells["figure6", "cube-single-play", "delta=0.3"], (1,), tenths=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        report.main(SELECTION, FLAGS)
        folder = tmp_path / "results" / "small"
        before = (folder / "README.md").read_text()
        report.main(Selection(name="small"), [])
        assert (folder / "README.md").read_text() == before  # of runs.csv alone
    return pd.read_csv(folder / "runs.csv"), before, folder


def test_seeds_are_gathered_wherever_they_were_run(small):
    rows = small[0][(small[0].column == "mfql") & (small[0].task == "cube-single-play")]
    assert dict(zip(rows.seed, rows.run)) == {1: "runs/job-1", 2: "runs/a/b/job-2"}
    assert len(rows) == 20 and set(rows.changed) == {"num_updates 20"}
    (row,) = rows[(rows.seed == 2) & (rows.step == 18)].itertuples()
    assert (row.score, row.counts, row.data, row.commit) == (30, True, "generated data (4,000 transitions)", "c d")


def test_scores_follow_the_papers_protocol(small):
    rows, text, _ = small
    table = report.final_scores(rows[rows.table == "table2"])
    mean, std = CURVE[:, 7:].mean(axis=1).mean(), CURVE[:, 7:].mean(axis=1).std()  # evaluations at 80, 90 and 100 %
    np.testing.assert_array_equal(table["cube-single-play", "mfql"], [50, 30])
    np.testing.assert_array_equal(table["pen-human-v1", "dmfql"], [60, np.nan])  # the last one
    assert f"| cube-single-play | mfql | 2 | {mean:.1f} ± {std:.1f} | 40.0 [30.0, 50.0] |  | 95 ± 1 |" in text
    assert "| **dmfql** | 2 | 40.0 ± 10.0 | 40.0 [30.0, 50.0] | 0.50 [0.00, 1.00] | 98 ± 1 |" in text
    assert "| dmfql | 2 | 46.50 ± 0.00 | 46.50 [46.50, 46.50] |  |  |" in text  # norms: all evaluations
    assert "| delta=0.03 | 2 | 40.0 ± 10.0 |" in text and "| delta=0.3 |  | 70% done |  |  |  |" in text


def test_reduced_generated_and_diverged_are_never_hidden(small):
    _, text, folder = small
    parts = text.split("\n## ")[1:]
    assert len(parts) == 4 and all("\nREDUCED: num_updates 20; on generated data (4,000 tr" in part for part in parts)
    assert "| mfql | 1 | nan (1 of 1 diverged) |" in text and "| 2 | nan (1 of 2 diverged) | nan | – | 72 ± 8 |" in text
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == set(re.findall(r"\((.*png)\)", text)) and "figure6-success.png" in pictures


def test_several_tasks_have_rows_of_their_own_and_one_of_all():
    rows = pd.DataFrame({"seed": range(8), "step": 20, "score": 90.0, "num_updates": 20, "unit": "%", "counts": True})
    rows = rows.assign(changed="", data="published data (10 transitions)", column="dmfql")
    rows = pd.concat([rows.assign(task="scene-play"), rows.assign(task="cube-single-play", score=50.0)])
    assert report.label(rows) == "Full size; on published data (10 transitions)"
    lines = report.score_table("table2", rows).splitlines()[2:]
    assert lines[0] == "| all 2 tasks | dmfql | 8 | 70.0 | 70.0 [70.0, 70.0] |  | 94.0 |"
    assert lines[1] == "| scene-play | dmfql | 8 | 90.0 ± 0.0 | 90.0 [90.0, 90.0] |  | 90 ± 10 |" and len(lines) == 3


def test_nothing_to_report_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for selection in (Selection(), Selection(("table2",), ("scene-play",))):
        with pytest.raises(common.Error, match="name the tables to collect|none of these cells has been run"):
            report.main(selection, [])
    assert not list(tmp_path.iterdir())
