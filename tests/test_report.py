"""Statistics against scipy and naive loops, and what the report says of runs that are not the paper's."""

import itertools
import json
import re

import numpy as np
import pytest
import scipy.stats

import common
import report
import reproduce
from run import append_rows


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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of mfql and dmfql in runs/: [seeds, evaluations] of scores, and the selection that they answer."""
    tmp_path = tmp_path_factory.mktemp("report")
    selection = reproduce.Selection(("table2",), ("cube-single-play", "pen-human-v1"), ("mfql", "dmfql"))
    curve = np.array([[0, 0, 0, 5, 10, 20, 30, 40, 50, 60], [0, 0, 0, 0, 0, 0, 10, 20, 30, 40.0]])
    data = {"source": "generated", "transitions": 4000, "sha256": "0" * 64}
    flags = ["--num-updates", "20", "--seeds", "1", "2"]
    for number, cell in enumerate(reproduce.expand(selection, flags)):
        args = json.loads(cell.run.args)
        folder = tmp_path / "runs" / cell.task / cell.run.algo / "1"
        folder.mkdir(parents=True)
        record = {"args": args, "data": data, "device": "1 x cpu", "versions": {"jax": "0"}, "commit": "c"}
        (folder / "args.json").write_text(json.dumps(record))
        for i, j in itertools.product(range(10), range(2)):
            score = np.nan if (cell.column, cell.task, j) == ("dmfql", "pen-human-v1", 1) else curve[j, i] + number
            append_rows(folder / "eval.csv", [{"step": 2 * i + 2, "seed": j + 1, "score": score}])
            if cell.column == "dmfql":
                rows = [{"step": 2 * i + k, "seed": j + 1, "q_grad_norm": 10 * i + k} for k in (1, 2)]
                append_rows(folder / "train.csv", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        report.main(report.Args(selection.targets, selection.tasks, selection.algos, "small"), flags)
    return curve, tmp_path / "results" / "small"


def test_a_tidy_row_says_where_it_is_from(runs):
    rows = report.read_rows(runs[1] / "runs.csv")
    assert len(rows) == 2 * 2 * 10 * 2
    row = next(row for row in rows if (row["column"], row["seed"], row["step"]) == ("dmfql", "2", "8"))
    told = ("task", "algorithm", "score", "q_grad_norm", "reduced", "data", "transitions", "delta", "commit")
    expected = ["cube-single-play", "dmfql", "2.0", "31.5", "num_updates=20 seeds=[1,2]"]
    expected += ["generated", "4000", "0.03", "c"]
    assert [row[name] for name in told] == expected


def test_scores_follow_the_papers_protocol(runs):
    curve, folder = runs
    cells = report.load_cells(report.read_rows(folder / "runs.csv"))
    ogbench, hand = (cells["table2"][task, "mfql"] for task in ("cube-single-play", "pen-human-v1"))
    np.testing.assert_array_equal(ogbench.scores, curve[:, 7:].mean(axis=1))  # the evaluations at 80, 90 and 100 %
    np.testing.assert_array_equal(hand.scores, curve[:, -1] + 1)  # the last one
    text = (folder / "README.md").read_text()
    mean, std = ogbench.scores.mean(), ogbench.scores.std(ddof=0)
    assert f"{mean:.1f} ± {std:.1f}**<br>paper 95 ± 1 |" in text


def test_reduced_generated_and_diverged_are_never_hidden(runs):
    text, page = ((runs[1] / name).read_text() for name in ("README.md", "page.html"))
    label = "REDUCED: num_updates=20, seeds=[1,2]; generated data (4,000 transitions); 2 seeds"
    parts = text.split("\n### ")[1:]
    assert len(parts) == 3 and all(label in part for part in parts)
    assert "nan (1 of 2 seeds diverged, the others 63.0 ± 0.0)" in text and "nan (1 of 2 seeds diverged" in page
    assert "| IQM of dmfql | 1 Adroit | nan | [nan, nan] |" in text
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert all(entry["difference"] is None and label in entry["label"] for entry in data["entries"])
    assert data["tables"][0]["label"] == label
    for path in runs[1].glob("*.svg"):
        assert path.with_suffix(".png").stat().st_size > 10_000
    loads = r"""(src|href)=["'](?!#)|@import|url\((?!#)|fetch\("""
    assert not re.search(loads, page.replace('\\"', '"'))  # the page needs nothing from elsewhere


def test_a_page_has_no_picture_of_an_earlier_report(runs, monkeypatch):
    monkeypatch.chdir(runs[1].parents[1])
    before = (runs[1] / "page.html").read_text()
    (runs[1] / "table1-ogbench.svg").write_text("<svg>earlier</svg>")
    report.main(report.Args(name="small"), [])
    (runs[1] / "table1-ogbench.svg").unlink()
    assert (runs[1] / "page.html").read_text() == before


def test_full_size_runs_are_compared_with_the_paper():
    about = {"reduced": "", "data": "published", "transitions": "10", "num_updates": "20", "run": "r"}
    cell = report.Result(np.arange(2, 21, 2), np.zeros((8, 10)), np.zeros((8, 10)), np.full(8, 90.0), about)
    key = ("scene-play", "dmfql")
    (entry,) = report.summarize("table2", {key: cell}).values()
    assert (entry["paper"], entry["difference"], entry["text"]) == ("90 ± 10", 0, "90.0 ± 0.0")
    assert entry["label"] == "full size; published data (10 transitions); 8 seeds"
    (entry,) = report.summarize("table2", {key: cell._replace(about=about | {"data": "generated"})}).values()
    assert np.isnan(entry["difference"])


def test_nothing_to_report_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args in (report.Args(), report.Args(("table2",), ("scene-play",))):
        with pytest.raises(common.Error, match="name the tables to collect|none of these cells has been run"):
            report.main(args, [])
    assert not list(tmp_path.iterdir())
