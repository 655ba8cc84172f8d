"""Our losses, gradients, actions and updates against those of FQL's official agents: fql, iql, ifql and rebrac.

fql_official.npz holds what the agents of github.com/seohongpark/fql (commit 719d044) computed on small networks: for
each case below losses, gradients and actions, and all parameters before and (in four) after 20 updates on one batch.
Parameters and gradients are flat, in the order of ours. The noise of every draw was a function of its shape, and so it
is here; else their code was as it is. Where its conventions differ from ours:

- their flow's time is 1 - t: so our network gets 1 - t here
- their iql and ifql sum the two critics' losses: so ours, the mean, is doubled here
- their ifql has no alpha: it is 1 here
- their rebrac is told by main.py when to learn its actor: it was in updates 2, 4, ...
- their iql and rebrac act by their mode at temperature 0, as main.py evaluates them
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import load_algo, slow_except
from reference import assert_close

FQL, BATCH = reference.recorded("fql_official")
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


def theirs(case, kind, ours):
    """Their parameters or gradients, in the structure of `ours`, {network: parameters}."""
    return {
        network: jax.flatten_util.ravel_pytree(params)[1](FQL[f"{case}/{kind}/{network}"])
        for network, params in ours.items()
    }


def start(case, monkeypatch):
    """The algorithm, with their noise, batch and conventions from here on, its arguments, and the state that has their
    parameters."""
    algo = load_algo(case.split("_")[0])
    reference.do_as_recorded(algo, BATCH, monkeypatch)
    if case in ("iql", "ifql"):
        critic_loss = algo.critic_loss
        monkeypatch.setattr(algo, "critic_loss", lambda *args: jax.tree.map(lambda x: 2 * x, critic_loss(*args)))
    args = algo.Args(hidden_dims=(16, 12, 10), **DEFAULTS, **CASES[case])
    state = algo.init(args, BATCH.obs.shape[-1], BATCH.action.shape[-1], 0)
    return algo, args, reference.with_parameters(state, theirs(case, "params", reference.parameters(state)))


@pytest.mark.parametrize("case", slow_except(CASES, "rebrac_tanh"))
def test_losses_gradients_and_actions_are_those_of_fql(case, monkeypatch):
    algo, args, state = start(case, monkeypatch)
    losses, gradients = reference.losses_and_gradients(algo, args, state, BATCH)
    for network, loss in losses.items():
        np.testing.assert_allclose(loss, FQL[f"{case}/loss/{network}"], rtol=1e-5)
    assert_close(gradients, theirs(case, "grads", gradients), 2e-5)
    states, keys = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state), jnp.zeros((1, 16, 2), jnp.uint32)
    assert_close(algo.act(args, states, BATCH.obs[None], keys)[0], FQL[f"{case}/act"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fql_mean", "iql", "ifql", "rebrac_tanh"])
def test_twenty_updates_are_those_of_fql(case, monkeypatch):
    """All networks. Of the targets, which move little, more is asked: they move towards the old network."""
    algo, args, state = start(case, monkeypatch)
    after = reference.twenty_updates(algo, args, state)
    for network, expected in theirs(case, "after20", after).items():
        assert_close(after[network], expected, 1e-6 if network.startswith("target") else 1e-5)


@pytest.mark.slow
def test_flow_and_student_start_from_the_same_noise():
    """What noise that depends on its shape alone cannot show."""
    algo = load_algo("fql")
    args = algo.Args(hidden_dims=(8,), **DEFAULTS, **CASES["fql_min"])
    state = algo.init(args, 7, 3, 0)
    flow = state.flow.replace(params=jax.tree.map(jnp.zeros_like, state.flow.params))  # so its sample is the noise
    actor = state.actor.replace(apply_fn=lambda params, obs, noise: jnp.clip(noise, -1, 1))
    state = state._replace(flow=flow, actor=actor)
    _, metrics = algo.actor_loss(actor.params, args, state, BATCH, jax.random.PRNGKey(0))
    assert metrics["distill_loss"] == 0
