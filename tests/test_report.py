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
    assert report.iqm(np.arange(5.0)) == np.mean([1, 2, 3])  # a quarter of 5 is cut to 1


def test_the_interval_of_the_iqm_is_a_stratified_bootstrap(tasks):
    value, low, high = report.interval(report.iqm, tasks, repetitions=500)
    rng, draws = np.random.default_rng(0), []
    indices = [rng.integers(0, len(scores), (500, len(scores))) for scores in tasks]
    for i in range(500):
        drawn = sorted(scores[k] for scores, index in zip(tasks, indices) for k in index[i])
        draws.append(np.mean(drawn[len(drawn) // 4 : len(drawn) - len(drawn) // 4]))
    assert value == scipy.stats.trim_mean(np.concatenate(tasks), 0.25)
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.025, 0.975]), rtol=1e-12)
    assert low < value < high
    constant = [np.full(4, 3.0), np.full(4, 7.0)]  # a draw never mixes tasks: nothing varies within them
    assert report.interval(report.iqm, constant, repetitions=50) == (5, 5, 5)


def test_probability_of_improvement_is_mann_whitneys(tasks):
    x, y = tasks[0], tasks[1]
    naive = np.mean([float(a > b) + 0.5 * (a == b) for a, b in itertools.product(x, y)])
    assert report.improvement(x, y) == naive == scipy.stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
    value, low, high = report.interval(report.improvement, [*tasks, y, x, x], repetitions=200)
    assert value == np.mean([report.improvement(a, b) for a, b in zip(tasks, [y, x, x])])
    assert 0 <= low < value < high <= 1
    assert report.interval(report.improvement, [np.array([2.0, 3]), np.array([0.0, 1])], 50) == (1, 1, 1)
    assert np.isnan(report.interval(report.improvement, [np.array([2.0]), np.array([0.0])])[1:]).all()  # single seeds
    assert np.isnan(report.improvement(np.array([1, np.nan]), y))  # a seed that diverged is not hidden


def test_profiles_count_runs_above_a_threshold(tasks):
    thresholds = np.array([-1.0, 0, 4.5, 9, 10])
    naive = [np.mean([np.mean([score > t for score in scores]) for scores in tasks]) for t in thresholds]
    np.testing.assert_array_equal(report.profile(tasks, thresholds), naive)


def record_run(folder, cell, seeds, tenths=10, diverged=None, **changes):
    """Writes what a run of a cell leaves in its folder, with CURVE's scores. Seed 2 diverges at step `diverged`."""
    folder.mkdir(parents=True)
    args = dataclasses.asdict(dataclasses.replace(cell.args, seeds=seeds, **changes))
    data = {"source": "generated", "transitions": 4000, "sha256": "0" * 64}
    record = {"algo": cell.algo, "args": args, "data": data, "device": "1 x cpu", "versions": {"jax": "0"}}
    (folder / "args.json").write_text(json.dumps(record | {"commit": "c", "resumed": [{"commit": "d"}]}))
    for i, seed in itertools.product(range(tenths), seeds):
        for step in (2 * i + 1, 2 * i + 2):
            row = {"step": step, "seed": seed, "diverged": int(seed == 2 and step >= (diverged or 99))}
            append_rows(folder / "train.csv", [row | {"q_grad_norm": 10 * i + step - 2 * i}])
        if not row["diverged"] or len(seeds) > 1:  # a run that has no seed left ends
            append_rows(folder / "eval.csv", [row | {"score": "nan" if row["diverged"] else CURVE[(seed - 1) % 2, i]}])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A report of runs in many pieces: the rows of its runs.csv, and its folder."""
    tmp_path = tmp_path_factory.mktemp("report")
    cells = {cell[:3]: cell for cell in expand(SELECTION, FLAGS)}
    mfql, dmfql, hand = (cells["table2", *key] for key in (
        ("cube-single-play", "mfql"), ("cube-single-play", "dmfql"), ("pen-human-v1", "dmfql")))  # fmt: skip
    runs = tmp_path / "runs"
    record_run(runs / "job-1", mfql, (1,))
    record_run(runs / "a" / "b" / "job-2", mfql, (2, 3), num_workers=7)  # more seeds than asked for
    record_run(runs / "job-2-begun", mfql, (2,), tenths=3)
    record_run(runs / "other", mfql, (1, 2), batch_size=1)
    record_run(runs / "on-published-data", mfql, (1, 2), dataset_path="x")
    record_run(runs / "dmfql", dmfql, (1, 2))
    record_run(runs / "hand", hand, (1, 2), diverged=13)
    record_run(runs / "ends", cells["table2", "pen-human-v1", "mfql"], (2,), tenths=2, diverged=3)  # no seed was left
    record_run(runs / "delta", cells["figure6", "cube-single-play", "delta=0.3"], (1, 2), tenths=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        report.main(SELECTION, FLAGS)
        folder = tmp_path / "results" / "small"
        before = (folder / "README.md").read_text()
        report.main(Selection(name="small"), [])
        assert (folder / "README.md").read_text() == before  # of runs.csv alone
    return pd.read_csv(folder / "runs.csv"), folder


def test_seeds_are_gathered_wherever_they_were_run(small):
    rows, _ = small
    mfql = rows[(rows.column == "mfql") & (rows.task == "cube-single-play")]
    assert dict(zip(mfql.seed, mfql.run)) == {1: "runs/job-1", 2: "runs/a/b/job-2"}
    assert len(mfql) == 20 and set(mfql.reduced) == {"num_updates=20 seeds=[1,2]"}


def test_a_row_says_where_it_is_from(small):
    rows, _ = small
    (row,) = rows[
        (rows.table == "table2") & (rows.run == "runs/dmfql") & (rows.seed == 2) & (rows.step == 8)
    ].itertuples()
    assert (row.task, row.algorithm, row.score, row.q_grad_norm) == ("cube-single-play", "dmfql", 0, 31.5)
    assert (row.data, row.transitions, row.delta, row.commit) == ("generated", 4000, 0.03, "c d")
    assert row.reduced == "num_updates=20 seeds=[1,2]"


def test_scores_follow_the_papers_protocol(small):
    folder = small[1]
    cells = report.load_cells(folder / "runs.csv")
    ogbench = cells["table2"]["cube-single-play", "mfql"].scores
    np.testing.assert_array_equal(ogbench, CURVE[:, 7:].mean(axis=1))  # the evaluations at 80, 90 and 100 %
    np.testing.assert_array_equal(cells["table2"]["pen-human-v1", "dmfql"].scores, [60, np.nan])  # the last one
    np.testing.assert_allclose(cells["figure3"]["cube-single-play", "dmfql"].scores, np.full(2, 46.5))  # all of them
    text = (folder / "README.md").read_text()
    assert f"| **{ogbench.mean():.1f} ± {ogbench.std(ddof=0):.1f}**<br>paper 95 ± 1 |" in text
    assert "| 46.50 ± 0.00; delta 0.03, alpha 300 |" in text and "| 70 % done |" in text


def test_reduced_generated_and_diverged_are_never_hidden(small):
    text = (small[1] / "README.md").read_text()
    parts = text.split("\n## ")[1:]
    assert len(parts) == 3 and all("REDUCED: num_updates=20, seeds=" in part for part in parts)
    assert all("; generated data (4,000 transitions); " in part for part in parts)
    assert "nan (1 of 2 seeds diverged, the others 60.0 ± 0.0)" in text and "nan (1 of 1 seeds diverged)" in text
    assert "2 diverged (nan)" in parts[0] and "| IQM of dmfql | nan | nan to nan |" in text
    pictures = {path.name for path in small[1].glob("*.png")}
    assert pictures == set(re.findall(r"\((.*png)\)", text))
    assert "table2-normalized-return.png" in pictures and "figure6.png" in pictures and "figure3-curves.png" in pictures


def test_full_size_runs_say_so(tmp_path):
    rows = pd.DataFrame({"seed": range(8), "step": 20, "score": 90.0, "q_grad_norm": np.nan, "num_updates": 20})
    rows = rows.assign(table="table2", task="scene-play", reduced="", data="published", transitions=10)
    pd.concat([rows.assign(column=c) for c in ("mfql", "dmfql")]).to_csv(tmp_path / "runs.csv")
    cells = report.load_cells(tmp_path / "runs.csv")["table2"]
    assert report.label(list(cells.values())) == "full size; published data (10 transitions); 8 seeds"
    table = report.score_table("table2", cells)
    assert "| **90.0 ± 0.0**<br>paper 57 ± 20 | **90.0 ± 0.0**<br>paper 90 ± 10 |" in table
    unfinished = cells["scene-play", "mfql"]._replace(scores=np.full(3, 9.0))
    assert report.show("table2", unfinished) == "9.0 ± 0.0 (3 of 8 seeds finished)"


def test_nothing_to_report_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for selection in (Selection(), Selection(("table2",), ("scene-play",))):
        with pytest.raises(common.Error, match="name the tables to collect|none of these cells has been run"):
            report.main(selection, [])
    assert not list(tmp_path.iterdir())
