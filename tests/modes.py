"""Clones of a 2-D action distribution of four modes, by each policy class; `python tests/modes.py` draws them."""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from conftest import ROOT, load_algo

import common

MODES = 0.8 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
SPREAD = 0.05  # standard deviation of each mode
NEAR = 0.25  # what is this near a mode belongs to it


def toy_dataset(num=4096):
    """One state, four modes of actions, equally good: [num, ...]."""
    rng = np.random.default_rng(0)
    action = MODES[rng.integers(4, size=num)] + SPREAD * rng.normal(size=(num, 2))
    obs, zeros = np.zeros((num, 1)), np.zeros(num)
    return common.Dataset(*(jnp.array(x, jnp.float32) for x in (obs, action, zeros, zeros, obs, action)))


def learned_actions(name, num=1024, num_updates=5000, batch_size=256):
    """What the policy of algos/<name>.py, trained by its own `train` on the toy, does: [num, 2]."""
    algo, dataset = load_algo(name), toy_dataset()
    args = algo.Args(hidden_dims=(32, 32, 32), learning_rate=5e-3, alpha=1.0, batch_size=batch_size)
    states = jax.jit(jax.vmap(functools.partial(algo.init, args, 1, 2)))(jnp.array([1]))
    states, _ = algo.train(args, num_updates, dataset, states)
    state, obs = jax.tree.map(lambda leaf: leaf[0], states), jnp.zeros((num, 1))
    if not hasattr(algo, "max_q"):  # the Gaussian, which acts by its mean
        return np.asarray(algo.act(args, states, obs[None], jnp.zeros((1, num, 2), jnp.uint32))[0])
    return np.asarray(state.actor.apply_fn(state.actor.params, obs, jax.random.PRNGKey(2), method="sample"))


def mode_shares(actions):
    """The share of actions near each mode: [4]."""
    return (np.linalg.norm(actions[:, None] - MODES, axis=-1) < NEAR).mean(axis=0)


def main():
    """Draws docs/modes.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"data": np.asarray(toy_dataset(1024).action)}
    titles = {"iql": "Gaussian, by its mean (iql)", "ifql": "flow (ifql)", "trigflow": "TrigFlow (trigflow)"}
    panels |= {title: learned_actions(name) for name, title in titles.items()}
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.3), sharex=True, sharey=True, layout="constrained")
    for axis, (title, actions) in zip(axes, panels.items()):
        axis.scatter(*actions.T, s=60 if np.ptp(actions, axis=0).max() < 0.01 else 3, alpha=0.5, linewidths=0)
        near = mode_shares(actions).sum()
        axis.set(title=f"{title}\n{near:.0%} near a mode", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    figure.savefig(ROOT / "docs" / "modes.png", dpi=110)


if __name__ == "__main__":
    main()
