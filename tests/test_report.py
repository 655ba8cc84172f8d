"""report.py: its statistics, the runs that it gathers, and what it says of those that are not the paper's."""

import dataclasses
import itertools
import json
import pathlib

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
SCORES = [np.random.default_rng(seeds).integers(0, 10, seeds).astype(float) for seeds in (4, 8, 5)]  # of three tasks


def test_probability_of_improvement_is_mann_whitneys():
    x, y, z = SCORES  # with ties
    assert report.improvement(x, y) == scipy.stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
    assert report.improvement(x, y, y, z) == np.mean([report.improvement(x, y), report.improvement(y, z)])
    assert np.isnan(report.improvement(np.array([1, np.nan]), y))  # a seed that diverged is not hidden


def test_iqm_is_of_the_middle_half_and_its_interval_of_a_stratified_bootstrap():
    assert report.iqm(np.array([9, 1, 2, 100]), np.array([3, 4, 5, 6])) == 4.5  # of 1 2 | 3 4 5 6 | 9 100
    rng, draws = np.random.default_rng(0), []
    indices = [rng.integers(0, len(scores), (10_000, len(scores))) for scores in SCORES]
    for i in range(10_000):
        drawn = sorted(scores[k] for scores, index in zip(SCORES, indices) for k in index[i])
        draws.append(np.mean(drawn[len(drawn) // 4 : len(drawn) - len(drawn) // 4]))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert report.estimate(report.iqm, SCORES, 3) == f"{report.iqm(*SCORES):.3f} [{low:.3f}, {high:.3f}]"
    for short in ([1.0], [1.0, np.nan]):
        assert report.estimate(report.iqm, [*SCORES, np.array(short)], 0) == "–"


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
            append_rows(folder / "eval.csv", [row | {"score": CURVE[seed - 1, i]}])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A report of runs in many pieces: the rows of its runs.csv, and its text."""
    cells = {cell[:3]: cell for cell in expand(SELECTION, FLAGS)}
    mfql, dmfql = (cells["table2", "cube-single-play", column] for column in ("mfql", "dmfql"))
    runs, results = pathlib.Path("runs"), pathlib.Path("results", "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("report"))
        with pytest.raises(common.Error, match="none of these cells has been run"):
            report.main(SELECTION, FLAGS)
        record_run(runs / "job-1", mfql, (1,))
        record_run(runs / "a" / "b" / "job-2", mfql, (2,), num_workers=7)
        record_run(runs / "job-2-begun", mfql, (2,), tenths=3)
        record_run(runs / "other", mfql, (1, 2), batch_size=1)
        record_run(runs / "on-published-data", mfql, (1, 2), dataset_path="x")
        record_run(runs / "dmfql", dmfql, (1, 2))
        record_run(runs / "late", cells["table2", "cube-single-play", "mfrebrac"], (1, 2), diverged=20)
        record_run(runs / "hand", cells["table2", "pen-human-v1", "dmfql"], (1, 2), diverged=13)
        record_run(runs / "ends", cells["table2", "pen-human-v1", "mfql"], (2,), tenths=2, diverged=3)
        record_run(runs / "delta", cells["figure6", "cube-single-play", "delta=0.3"], (1,), tenths=7)
        report.main(SELECTION, FLAGS)
        text = (results / "README.md").read_text()
        report.main(Selection(name="small"), [])
        assert (results / "README.md").read_text() == text  # of runs.csv alone
        assert len(list(results.glob("*.png"))) == text.count(".png)") == 4
        return pd.read_csv(results / "runs.csv"), text


def test_seeds_are_gathered_wherever_they_were_run(small):
    rows = small[0][(small[0].column == "mfql") & (small[0].task == "cube-single-play")]
    assert dict(zip(rows.seed, rows.run)) == {1: "runs/job-1", 2: "runs/a/b/job-2"} and len(rows) == 20
    (row,) = rows[(rows.seed == 2) & (rows.step == 18)].itertuples()
    assert (row.score, row.counts, row.data, row.commit) == (30, True, "generated data (4,000 transitions)", "c d")


def test_scores_follow_the_papers_protocol(small):
    final = report.final_scores(small[0][small[0].table == "table2"])
    np.testing.assert_array_equal(final["cube-single-play", "dmfql"], [50, 30])  # evaluations at 80, 90 and 100 %
    np.testing.assert_array_equal(final["pen-human-v1", "dmfql"], [60, np.nan])  # the last one
    assert "| **dmfql** | 2 | 40.0 ± 10.0 | 40.0 [30.0, 50.0] | 0.50 [0.00, 1.00] | 98 ± 1 |" in small[1]
    assert "| dmfql | 2 | 46.50 ± 0.00 | 46.50 [46.50, 46.50] |  |  |" in small[1]  # norms: of all evaluations


def test_reduced_generated_unfinished_and_diverged_are_never_hidden(small):
    parts = small[1].split("\n## ")[1:]
    assert len(parts) == 4 and all("\nREDUCED: num_updates 20; on generated data (4,000 tr" in part for part in parts)
    assert "| mfql | 1 | nan (1 of 1 diverged) |" in small[1] and "| mfrebrac | 2 | nan (1 of 2 div" in small[1]
    assert "| delta=0.3 |  | unfinished |" in small[1]


def test_several_tasks_have_rows_of_their_own_and_one_of_all():
    rows = pd.DataFrame({"seed": range(8), "step": 20, "score": 90.0, "num_updates": 20, "unit": "%", "counts": True})
    rows = pd.concat([rows.assign(task="scene-play"), rows.assign(task="cube-single-play", score=50.0)])
    assert report.label(rows.assign(changed=np.nan, data="published data")) == "Full size; on published data"
    lines = report.score_table("table2", rows.assign(column="dmfql")).splitlines()[2:]
    assert lines[0] == "| all 2 tasks | dmfql | 8 | 70.0 | 70.0 [70.0, 70.0] |  | 94.0 |"
    assert lines[1] == "| scene-play | dmfql | 8 | 90.0 ± 0.0 | 90.0 [90.0, 90.0] |  | 90 ± 10 |" and len(lines) == 3
    assert "| 88 ± 4 |" in report.score_table("table1", rows.assign(column="ifql"))  # of its own run; FQL's is 73 ± 3
