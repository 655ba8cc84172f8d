"""Our losses, gradients, actions and updates against those of the authors' own code.

authors.npz holds what the agents of github.com/Xyu-Chern/DOAL (commit 155f517) computed on small networks. The noise of
every draw was a function of its shape, and so it is here. Their flow's time runs the other way: t there is 1 - t here.
"""

import dataclasses
import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_algo

import common

AUTHORS = dict(np.load(pathlib.Path(__file__).with_name("authors.npz")))
BATCH = common.Dataset(*(
    jnp.asarray(AUTHORS[f"batch/{name}"])
    for name in ("observations", "actions", "rewards", "masks", "next_observations", "next_actions")
))  # fmt: skip
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


def reverse_time(params):
    """A flow's parameters where its input t is 1 - t: the first layer's row of t, and so its bias, change."""
    first = params["params"]["MLP_0"]["Dense_0"]
    row = first["kernel"][-1]
    first = {"kernel": first["kernel"].at[-1].set(-row), "bias": first["bias"] + row}
    return {"params": {"MLP_0": params["params"]["MLP_0"] | {"Dense_0": first}}}


def reverse_time_of_gradient(gradient):
    """Our gradient by their parameters, by the chain rule through `reverse_time`."""
    first = gradient["params"]["MLP_0"]["Dense_0"]
    first = first | {"kernel": first["kernel"].at[-1].set(first["bias"] - first["kernel"][-1])}
    return {"params": {"MLP_0": gradient["params"]["MLP_0"] | {"Dense_0": first}}}


def start(name, monkeypatch):
    """Arguments and the state that has their parameters, with their noise in every draw from here on."""
    seed_of = lambda shape: int(np.prod([size + 3 for size in shape]))
    normal = lambda key, shape: jnp.asarray(np.random.default_rng(seed_of(shape)).normal(size=shape), jnp.float32)

    def uniform(key, shape, maxval=1.0):
        draw = jnp.asarray(np.random.default_rng(7 * seed_of(shape)).uniform(size=shape), jnp.float32)
        return maxval * draw if name in DIFFUSIONS else 1 - draw

    monkeypatch.setattr(jax.random, "normal", normal)
    monkeypatch.setattr(jax.random, "uniform", uniform)
    monkeypatch.setattr(common, "sample_batch", lambda dataset, key, batch_size: BATCH)
    algo = load_algo(name)
    fields = {field.name for field in dataclasses.fields(algo.Args)}
    values = VALUES | ({"alpha": 3.0} if name == "iql" else {})
    args = algo.Args(hidden_dims=(24, 24, 24), **{key: value for key, value in values.items() if key in fields})
    state = algo.init(args, BATCH.obs.shape[-1], BATCH.action.shape[-1], 0)
    for network, params in networks(name, "params").items():
        params = reverse_time(params) if network == "actor" and name in FLOWS else params
        params = params if network == "target_critic" else getattr(state, network).replace(params=params)
        state = state._replace(**{network: params})
    return algo, args, state


def assert_close(found, expected, rtol):
    """Every array differs by at most rtol times its largest number."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("name", [*FLOWS, *DIFFUSIONS])
def test_losses_gradients_and_actions_are_the_authors(name, monkeypatch):
    algo, args, state = start(name, monkeypatch)
    losses, gradients = {}, {}
    for network in set(state._fields) & {"critic", "value", "actor"}:
        loss, params = getattr(algo, f"{network}_loss"), getattr(state, network).params
        key = [jax.random.PRNGKey(0)] if "key" in inspect.signature(loss).parameters else []
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (losses[network], _), gradients[network] = value_and_grad(params, args, state, BATCH, *key)
    total = AUTHORS[f"{name}/loss"]
    if name == "dtrigflow":
        total = total - AUTHORS["dtrigflow/info/actor/actor_loss"]  # theirs holds -mean Q(s, a) more, a constant
    for network in losses.keys() - {"actor"}:
        np.testing.assert_allclose(losses[network], AUTHORS[f"{name}/info/{network}/{network}_loss"], rtol=1e-5)
    np.testing.assert_allclose(sum(losses.values()), total, rtol=1e-5)
    if name in FLOWS:
        gradients["actor"] = reverse_time_of_gradient(gradients["actor"])
    expected = networks(name, "grads")
    assert_close(gradients, {network: expected[network] for network in gradients}, 1e-5)
    action = jax.vmap(lambda obs: algo.max_q(state, obs, 4, jax.random.PRNGKey(0)))(BATCH.obs)
    assert_close(action, AUTHORS[f"{name}/act"], 1e-5)


@pytest.mark.parametrize("name", ["iql", "ifql", "difql", *DIFFUSIONS])
def test_twenty_updates_of_the_iql_family_are_the_authors(name, monkeypatch):
    """Critics, values and targets; and the diffusions' actors (Adam depends on the direction of a flow's time)."""
    algo, args, state = start(name, monkeypatch)
    updates = jax.jit(lambda state: jax.lax.scan(functools.partial(algo.update, args, None), state, length=20))
    after, expected = updates(state)[0], networks(name, "after20")
    for network in ("critic", "value", "target_critic", *(["actor"] if name in DIFFUSIONS else [])):
        params = after.target_critic if network == "target_critic" else getattr(after, network).params
        assert_close(params, expected[network], 1e-5)
        before = networks(name, "params")[network]
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, expected[network])
        assert max(jax.tree.leaves(moved)) > 1e-4
