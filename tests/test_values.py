"""What each flag is on each of the paper's tasks, against tables that are written out here."""

import numpy as np
import pytest
from conftest import ALGOS, load_algo

import common
import run

# fmt: off
COLUMNS = {  # by task, in the order of Table 5
    # Table 5
    "iql_delta": (0.1, 0.1, 0.03, 0.1, 0.03, 0.1, 0.1, 0.03, 0.03, 0.001, 0.001, 0.001, 0.003, 0.003, 0.003),
    "iql_num_samples": (4, 32, 8, 16, 32, 16, 32, 4, 64, 8, 16, 64, 2, 2, 2),
    "ql_delta": (0.03, 0.1, 0.03, 0.1, 0.03, 0.03, 0.1, 0.03, 0.03, 0.0003, 0.0003, 0.0003, 0.003, 0.003, 0.0003),
    "ql_num_samples": (4, 32, 16, 16, 2, 4, 4, 2, 4, 4, 32, 32, 16, 4, 4),
    "alpha_critic": (0.01, 0.01, 0.001, 0.1, 0.01, 0.1, 0.01, 0.01, 0.01, 0.5, 0.5, 0.01, 0.01, 0.01, 0.01),
    # FQL's own, of its appendix and its README's commands
    "alpha": (10, 30, 30, 10, 300, 300, 300, 1000, 1000, 10000, 10000, 3000, 30000, 30000, 30000),
    "q_agg": ("min", *["mean"] * 8, *["min"] * 6),
    "discount": (0.99, 0.995, 0.995, 0.995, *[0.99] * 11),
    # the authors' code: FQL's alpha over their IQL delta (0.03 on antmaze-large); AWR's inverse temperature
    "alpha_over_delta": (333, 300, 1000, 100, 10000, 3000, 3000, 33333, 33333, 10**7, 10**7, 3 * 10**6, *[10**7] * 3),
    "awr_alpha": (10, 10, 10, 1, 1, 0.3, 10, 10, 3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5),
    # ReBRAC's, of FQL's appendix on OGBench and of CORL on Adroit
    "rebrac_alpha_actor": (0.003, 0.01, 0.01, 0.01, 1, 0.1, 0.1, 0.3, 0.3, 0.1, 0.05, 0.01, 0.05, 0.01, 0.05),
    "rebrac_alpha_critic": (0.01, 0.01, 0.01, 0.01, 0, 0, 0.01, 0.01, 0.01, 0.5, 0.5, 0.01, 0.01, 0.01, 0.01),
}
# fmt: on
TAKES = {
    "iql": {"alpha": "awr_alpha"},
    "ifql": {"alpha": "alpha", "num_samples": "iql_num_samples"},
    "trigflow": {"alpha": "alpha", "num_samples": "iql_num_samples"},
    "etrigflow": {"alpha": "alpha_over_delta", "num_samples": "iql_num_samples"},
    "mfql": {"alpha": "alpha", "num_samples": "ql_num_samples"},
    "mfql_bptt": {"alpha": "alpha_over_delta", "num_samples": "ql_num_samples"},
    "mfrebrac": {"alpha": "alpha", "num_samples": "ql_num_samples", "alpha_critic": "alpha_critic"},
    "fql": {"alpha": "alpha", "q_agg": "q_agg", "discount": "discount"},
    "rebrac": {"alpha_actor": "rebrac_alpha_actor", "alpha_critic": "rebrac_alpha_critic", "discount": "discount"},
}
TAKES |= {f"d{base}": TAKES[base] | {"delta": "iql_delta"} for base in ("iql", "ifql", "trigflow")}
TAKES |= {f"d{base}": TAKES[base] | {"delta": "ql_delta"} for base in ("mfql", "mfrebrac")}
# Table 6, and what the authors' and FQL's code have on every task
FIXED = {"batch_size": 256, "hidden_dims": (512, 512, 512, 512), "learning_rate": 3e-4, "discount": 0.99, "tau": 0.005}
FIXED |= {"expectile": 0.9, "flow_steps": 10, "num_target_samples": 4}
FIXED |= {"policy_noise": 0.2, "noise_clip": 0.5, "policy_frequency": 2}
FIXED |= {"seeds": (111,), "eval_episodes": 50, "eval_seed": 0}
TANH = {"iql": False, "diql": False, "rebrac": True}


@pytest.mark.parametrize("name", ALGOS)
def test_every_flag_is_the_papers(name):
    algo, others = load_algo(name), run.BOOKKEEPING | {"dataset_path", "generate_episodes"}
    takes = TAKES.get(name, algo.PAPER_COLUMNS)  # of a file that is new, what it says
    for i, task in enumerate(common.PAPER):
        flags = vars(common.resolve(algo.Args(env_name=task), common.load_task(task), algo.PAPER_COLUMNS))
        expected = {flag: value for flag, value in FIXED.items() if flag in flags}
        expected |= {flag: COLUMNS[column][i] for flag, column in takes.items()}
        expected |= {"env_name": task, "num_updates": 500_000 if task.endswith("-v1") else 1_000_000}
        expected |= {"tanh": TANH[name]} if name in TANH else {}
        assert {flag: flags[flag] for flag in expected} == expected
        assert name not in TAKES or flags.keys() - expected.keys() == others  # no flag escapes


def test_lists_and_numpys_numbers_are_what_they_look_like():
    """As a search's code gives them."""
    algo, task = load_algo("dmfql"), common.load_task("scene-play")
    plain = {"seeds": (1, 2), "hidden_dims": (16, 8), "delta": 0.5, "num_updates": 20}
    assert common.resolve(algo.Args(seeds=range(1, 3)), task, algo.PAPER_COLUMNS).seeds == (1, 2)
    given = {"seeds": [np.uint32(1), 2], "hidden_dims": np.array([16, 8]), "delta": np.float32(0.5)}
    expected = common.resolve(algo.Args(**plain), task, algo.PAPER_COLUMNS)
    found = common.resolve(algo.Args(**given, num_updates=np.int64(20)), task, algo.PAPER_COLUMNS)
    assert hash(found) == hash(expected) and repr(found) == repr(expected)
