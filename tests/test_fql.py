"""Our losses, gradients, actions and updates against those of FQL's official agents: fql, iql, ifql and rebrac.

fql_official.npz holds what the agents of github.com/seohongpark/fql (commit 719d044) computed on small networks: for
each case below losses, gradients and actions, and all parameters before and (in four) after 20 updates on one batch.
The noise of every draw was a function of its shape, and so it is here; else their code was as it is. Where its
conventions differ from ours:

- their flow's time is 1 - t: so our network gets 1 - t here
- their iql and ifql sum the two critics' losses: so ours, the mean, is doubled here
- their ifql has no alpha: it is 1 here
- their rebrac is told by main.py when to learn its actor: it was in updates 2, 4, ...
- their iql and rebrac act by their mode at temperature 0, as main.py evaluates them
"""

import jax
import pytest
from conftest import load_algo, slow_except
from reference import Recorded

DEFAULTS = {"discount": 0.99, "tau": 0.005, "learning_rate": 3e-4}  # theirs, as are expectile, steps and noise_clip
REBRAC = {"alpha_actor": 0.3, "alpha_critic": 0.2, "policy_noise": 0.4, "noise_clip": 0.5, "policy_frequency": 2}
CASES = {
    "fql_min": {"q_agg": "min", "alpha": 3.0, "flow_steps": 10},
    "fql_mean": {"q_agg": "mean", "alpha": 3.0, "flow_steps": 10},
    "iql": {"expectile": 0.9, "alpha": 10.0, "tanh": False},
    "ifql": {"expectile": 0.9, "alpha": 1.0, "flow_steps": 10, "num_samples": 8},
    "rebrac_tanh": {"tanh": True} | REBRAC,
    "rebrac_linear": {"tanh": False} | REBRAC,
}


def start(case, monkeypatch):
    """What they computed, the algorithm, with their convention from here on, and its arguments."""
    algo = load_algo(case.split("_")[0])
    if case in ("iql", "ifql"):
        loss = algo.critic_loss
        monkeypatch.setattr(algo, "critic_loss", lambda *args: jax.tree.map(lambda x: 2 * x, loss(*args)))
    args = algo.Args(hidden_dims=(16, 12, 10), **DEFAULTS, **CASES[case])
    return Recorded("fql_official", case), algo, args


@pytest.mark.parametrize("case", slow_except(CASES, "rebrac_tanh"))
def test_losses_gradients_and_actions_are_those_of_fql(case, monkeypatch):
    recorded, algo, args = start(case, monkeypatch)
    recorded.check_losses_gradients_and_actions(algo, args, monkeypatch, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fql_mean", "iql", "ifql", "rebrac_tanh"])
def test_twenty_updates_are_those_of_fql(case, monkeypatch):
    recorded, algo, args = start(case, monkeypatch)
    recorded.check_twenty_updates(algo, args, monkeypatch)
