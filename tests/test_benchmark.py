"""What benchmark.py measures: ratios of the same turn, and the other codes, driven as their own main.py does."""

import concurrent.futures
import itertools
import types

import benchmark
import numpy as np
import pytest
from conftest import small_args

import common

benchmark.TRANSITIONS = 100


def test_ratios_are_of_one_turn_and_per_seed(monkeypatch):
    """Contestants run here, in place of in processes of their own."""
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda *_: concurrent.futures.ThreadPoolExecutor(1))
    took = {1: [9, 2, 4, 1], 4: [9, 0.5, 2, 0.5], "FQL": [9, 6, 8, 5], "DOAL": [9, 1, 2, 2]}  # the first turn compiles
    number = lambda kind, bench, algo, last: last if kind is benchmark.Ours else "DOAL" if last else "FQL"
    monkeypatch.setattr(benchmark, "call", lambda contestant, method: took[number(*contestant)].pop(0))
    bench = benchmark.Args(num_seeds=(1, 4), turns=3, fql_dir="fql", doal_dir="doal")
    one, four = benchmark.compare(bench, "ifql")
    assert one == ["ifql", "1", "2000.000", "2000.000", "3.00 (2.00 to 5.00)", "0.50 (0.50 to 2.00)", "", ""]
    assert four == ["ifql", "4", "2000.000", "500.000", "10.00 (4.00 to 12.00)", "2.00 (1.00 to 4.00)", "", ""]


@pytest.mark.slow
def test_ours_is_timed_per_update_and_seed(monkeypatch):
    small, sizes = small_args("iql", seeds=(0, 1)), []
    monkeypatch.setattr(common, "resolve", lambda *args: small)
    ours = benchmark.Ours(benchmark.Args(num_updates=40), "iql", 2)
    monkeypatch.setattr(ours.module, "train", lambda args, size, *_: sizes.append(size) or (None, 0.0))
    monkeypatch.setattr(benchmark, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__))
    assert ours.train() == 1 / 40 and sizes == [20]


def test_other_codes_take_a_batch_per_update(monkeypatch):
    """One after another, FQL's ReBRAC with its actor in every second; and the authors' 20 in a call."""
    taken, config = [], {"batch_size": 32, "actor_freq": 2}
    agent = types.SimpleNamespace(network=types.SimpleNamespace(params=0.0))
    agent.update = lambda batch, full_update: taken.append((*batch.shape, full_update)) or (agent, None)
    theirs = types.SimpleNamespace(bench=benchmark.Args(num_updates=40), config=config, agent=agent)
    theirs.data = types.SimpleNamespace(sample=lambda size: np.zeros((size, 3)))
    theirs.updates = lambda agent, batches: taken.append(batches.shape) or (agent, None)
    monkeypatch.setattr(benchmark, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__))
    for scan in (False, True):
        theirs.scan = scan
        assert benchmark.Theirs.train(theirs) == 1 / 40
    assert taken == 20 * [(32, 3, True), (32, 3, False)] + 2 * [(20, 32, 3)]
