"""Our losses, gradients, actions and updates against those of the authors' own code.

authors.npz holds what the agents of github.com/Xyu-Chern/DOAL (commit 155f517) computed on small networks. The noise of
every draw was a function of its shape, and so it is here. Their flow's time is 1 - t: so our network gets 1 - t here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import load_algo, slow_except
from reference import assert_close

AUTHORS, BATCH = reference.recorded("authors")
VALUES = {"num_samples": 4, "num_target_samples": 4, "alpha": 30.0, "delta": 0.1, "alpha_critic": 0.1}
FLOWS = ["ifql", "difql", "mfql", "dmfql", "mfql_bptt", "mfrebrac", "dmfrebrac"]
DIFFUSIONS = ["trigflow", "dtrigflow", "etrigflow"]


def tree(prefix):
    """The arrays below `prefix` as nested dicts."""
    nested = {}
    for path, array in AUTHORS.items():
        if path.startswith(f"{prefix}/"):
            *folders, leaf = path.removeprefix(f"{prefix}/").split("/")
            inner = nested
            for folder in folders:
                inner = inner.setdefault(folder, {})
            inner[leaf] = jnp.asarray(array)
    return nested


def networks(name, prefix):
    """Their parameters or gradients below `name/prefix`, in our structure: {network: params}."""
    theirs = tree(f"{name}/{prefix}")
    actor = next(
        theirs[key] for key in ("modules_actor_bc_flow", "modules_actor_flow", "modules_actor") if key in theirs
    )
    found = {"critic": {"params": {"VmapMLP_0": theirs["modules_critic"]["value_net"]}}}
    if "modules_target_critic" in theirs:
        found["target_critic"] = {"params": {"VmapMLP_0": theirs["modules_target_critic"]["value_net"]}}
    if "modules_value" in theirs:
        found["value"] = {"params": {"MLP_0": theirs["modules_value"]["value_net"]}}
    if "mlp" in actor:
        found["actor"] = {"params": {"MLP_0": actor["mlp"]}}
    return found


def start(name, monkeypatch):
    """Arguments and the state that has their parameters, with their noise in every draw from here on."""
    algo = load_algo(name)
    reference.do_as_recorded(algo, BATCH, monkeypatch)
    fields = {field.name for field in dataclasses.fields(algo.Args)}
    values = VALUES | ({"alpha": 3.0} if name == "iql" else {})
    args = algo.Args(hidden_dims=(24, 24, 24), **{key: value for key, value in values.items() if key in fields})
    state = algo.init(args, BATCH.obs.shape[-1], BATCH.action.shape[-1], 0)
    return algo, args, reference.with_parameters(state, networks(name, "params"))


@pytest.mark.parametrize("name", slow_except([*FLOWS, *DIFFUSIONS], "difql", "dtrigflow", "dmfql", "dmfrebrac"))
def test_losses_gradients_and_actions_are_the_authors(name, monkeypatch):
    algo, args, state = start(name, monkeypatch)
    losses, gradients = reference.losses_and_gradients(algo, args, state, BATCH)
    total = AUTHORS[f"{name}/loss"]
    if name == "dtrigflow":
        total = total - AUTHORS["dtrigflow/info/actor/actor_loss"]  # theirs holds -mean Q(s, a) more, a constant
    for network in losses.keys() - {"actor"}:
        np.testing.assert_allclose(losses[network], AUTHORS[f"{name}/info/{network}/{network}_loss"], rtol=1e-5)
    np.testing.assert_allclose(sum(losses.values()), total, rtol=1e-5)
    expected = networks(name, "grads")
    assert_close(gradients, {network: expected[network] for network in gradients}, 1e-5)
    action = jax.vmap(lambda obs: algo.max_q(state, obs, 4, jax.random.PRNGKey(0)))(BATCH.obs)
    assert_close(action, AUTHORS[f"{name}/act"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iql", *FLOWS, *DIFFUSIONS])
def test_twenty_updates_are_the_authors(name, monkeypatch):
    algo, args, state = start(name, monkeypatch)
    after, before = reference.twenty_updates(algo, args, state), networks(name, "params")
    for network, expected in networks(name, "after20").items():
        assert_close(after[network], expected, 1e-6 if network == "target_critic" else 1e-5)
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before[network], expected)
        assert max(jax.tree.leaves(moved)) > 1e-4
