"""What each flag is on each of the paper's tasks, against tables that are written out here."""

import pytest
from conftest import ALGOS, load_algo

import common
import run

TASKS = """
antmaze-large-navigate humanoidmaze-medium-navigate humanoidmaze-large-navigate antsoccer-arena-navigate
cube-single-play cube-double-play scene-play puzzle-3x3-play puzzle-4x4-play
pen-human-v1 pen-cloned-v1 pen-expert-v1 door-expert-v1 hammer-expert-v1 relocate-expert-v1
""".split()
# fmt: off
COLUMNS = {
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
    "diql": {"alpha": "awr_alpha", "delta": "iql_delta"},
    "ifql": {"alpha": "alpha", "num_samples": "iql_num_samples"},
    "difql": {"alpha": "alpha", "num_samples": "iql_num_samples", "delta": "iql_delta"},
    "trigflow": {"alpha": "alpha", "num_samples": "iql_num_samples"},
    "dtrigflow": {"alpha": "alpha", "num_samples": "iql_num_samples", "delta": "iql_delta"},
    "etrigflow": {"alpha": "alpha_over_delta", "num_samples": "iql_num_samples"},
    "mfql": {"alpha": "alpha", "num_samples": "ql_num_samples"},
    "dmfql": {"alpha": "alpha", "num_samples": "ql_num_samples", "delta": "ql_delta"},
    "mfql_bptt": {"alpha": "alpha_over_delta", "num_samples": "ql_num_samples"},
    "mfrebrac": {"alpha": "alpha", "num_samples": "ql_num_samples", "alpha_critic": "alpha_critic"},
    "dmfrebrac": {
        "alpha": "alpha",
        "num_samples": "ql_num_samples",
        "alpha_critic": "alpha_critic",
        "delta": "ql_delta",
    },
    "fql": {"alpha": "alpha", "q_agg": "q_agg", "discount": "discount"},
    "rebrac": {"alpha_actor": "rebrac_alpha_actor", "alpha_critic": "rebrac_alpha_critic", "discount": "discount"},
}
# Table 6, and what the authors' and FQL's code have on every task
FIXED = {"batch_size": 256, "hidden_dims": (512, 512, 512, 512), "learning_rate": 3e-4, "discount": 0.99, "tau": 0.005}
FIXED |= {"expectile": 0.9, "flow_steps": 10, "num_target_samples": 4}
FIXED |= {"policy_noise": 0.2, "noise_clip": 0.5, "policy_frequency": 2}
FIXED |= {"seeds": (111,), "eval_episodes": 50, "eval_seed": 0}
TANH = {"iql": False, "diql": False, "rebrac": True}


def resolved(name, task, **given):
    args = common.resolve(
        load_algo(name).Args(env_name=task, **given), common.load_task(task), load_algo(name).PAPER_COLUMNS
    )
    return vars(args)


@pytest.mark.parametrize("name", ALGOS)
def test_every_flag_is_the_papers(name):
    takes = TAKES.get(name, load_algo(name).PAPER_COLUMNS)  # of a file that is new, what it says
    for i, task in enumerate(TASKS):
        flags = resolved(name, task)
        expected = {flag: value for flag, value in FIXED.items() if flag in flags}
        expected |= {flag: COLUMNS[column][i] for flag, column in takes.items()}
        expected |= {"env_name": task, "num_updates": 500_000 if task.endswith("-v1") else 1_000_000}
        expected |= {"tanh": TANH[name]} if name in TANH else {}
        assert {flag: flags[flag] for flag in expected} == expected
        assert resolved(name, task, discount=0.5)["discount"] == 0.5  # what is given, is taken
        assert name not in TAKES or flags.keys() - expected.keys() == run.BOOKKEEPING | {
            "dataset_path",
            "generate_episodes",
        }  # no flag escapes


@pytest.mark.parametrize("name", ["etrigflow", "mfql_bptt"])
def test_where_the_authors_weigh_q_by_delta_alpha_is_fqls_over_delta(name):
    for task in TASKS[1:]:  # on antmaze-large, their delta was not the one that the paper prints
        alpha, delta = resolved("ifql", task)["alpha"], resolved("difql", task)["delta"]
        assert resolved(name, task)["alpha"] == pytest.approx(alpha / delta, rel=1e-4)


def test_the_tasks_are_the_papers():
    assert list(common.PAPER) == TASKS and TAKES.keys() <= set(ALGOS)
