"""Draws docs/doal.png and docs/modes.png: `python docs/pictures.py`, two minutes on two cores.

Actions have two dimensions and there is one state. All networks are trained by the `train` of the files in algos/.
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # this checkout, whatever else is installed

import jax
import jax.numpy as jnp
import numpy as np

import common

FOLDER = pathlib.Path(__file__).parent
MODES = 0.8 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])


def four_modes(num=4096):
    """Actions of four modes: [num, 2]."""
    rng = np.random.default_rng(0)
    return MODES[rng.integers(4, size=num)] + 0.05 * rng.normal(size=(num, 2))


def mode_shares(action):
    """The share of the actions [num, 2] near each mode: [4]."""
    return (np.linalg.norm(action[:, None] - MODES, axis=-1) < 0.25).mean(axis=0)


def ring(num=4096):
    """Actions of a ring, in its order: [num, 2]."""
    angle, radius = np.linspace(0, 2 * np.pi, num), 0.65 + 0.04 * np.random.default_rng(0).normal(size=num)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def reward_of(action):
    """A hill inside the ring, up and to the right: [...]."""
    return np.exp(-np.sum((action - np.array([0.3, 0.35])) ** 2, axis=-1))


def learn(name, action, reward, num_updates, **flags):
    """algos/<name>.py, its arguments, and its state after training on one-step episodes."""
    obs, zeros = np.ones((len(action), 1)), np.zeros(len(action))
    dataset = common.Dataset(*(jnp.array(x, jnp.float32) for x in (obs, action, reward + zeros, zeros, obs, action)))
    algo = common.load_algo(name)
    args = algo.Args(alpha=1.0, **flags)
    states = jax.jit(jax.vmap(functools.partial(algo.init, args, 1, 2)))(jnp.array([1]))
    states, _ = algo.train(args, num_updates, dataset, states)
    return algo, args, jax.tree.map(lambda leaf: leaf[0], states)


def policy_actions(algo, state, num=1024):
    """The policy's actions, without MaxQ: [num, 2]. A Gaussian acts by its mean."""
    obs, act = jnp.ones((num, 1)), functools.partial(state.actor.apply_fn, state.actor.params)
    return np.asarray(act(obs, jax.random.PRNGKey(2), method="sample") if hasattr(algo, "max_q") else act(obs))


def learn_modes(name, num_updates=5000, batch_size=256):
    """Actions of the policy of algos/<name>.py, trained on the four modes: [num, 2]."""
    flags = {"hidden_dims": (32, 32, 32), "learning_rate": 5e-3, "batch_size": batch_size}
    algo, _, state = learn(name, four_modes(), 0.0, num_updates, **flags)
    return policy_actions(algo, state)


def draw_modes(plt):
    """The four modes, and each policy's actions after training on them."""
    titles = {"iql": "Gaussian, its mean", "ifql": "flow", "trigflow": "TrigFlow"}
    panels = {"data": four_modes(1024)} | {title: learn_modes(name) for name, title in titles.items()}
    figure, axes = plt.subplots(1, 4, figsize=(8, 2.5), layout="constrained")
    for axis, (title, action) in zip(axes, panels.items()):
        axis.scatter(*action.T, s=60 if np.ptp(action, axis=0).max() < 0.01 else 3, alpha=0.5, linewidths=0)
        axis.set(aspect="equal", xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])
        axis.set_title(f"{title}\n{mode_shares(action).sum():.0%} near a mode", fontsize=11)
    figure.savefig(FOLDER / "modes.png", dpi=130, bbox_inches="tight")


def draw_doal(plt):
    """The step from data actions to optimal actions, and a flow trained without and with it."""
    flags = {"hidden_dims": (128, 128, 128), "learning_rate": 2e-3, "num_target_samples": 1}
    mfql, _, baseline = learn("mfql", ring(), reward_of(ring()), 3000, **flags)
    dmfql, args, state = learn("dmfql", ring(), reward_of(ring()), 3000, delta=0.2, **flags)
    data = ring()[::64].astype(np.float32)
    optimal, _ = dmfql.optimal_action(args, state, common.Dataset(np.ones((64, 1)), data, *[None] * 4))
    grid = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, 100)]), axis=-1)
    q = state.critic.apply_fn(state.critic.params, np.ones((100, 100, 1)), grid).mean(axis=0)

    figure, axes = plt.subplots(1, 3, figsize=(8, 3.3), layout="constrained")
    for axis in axes:
        axis.contourf(grid[..., 0], grid[..., 1], q, levels=10, cmap="Greens", alpha=0.6)
        axis.set(aspect="equal", xlim=(-1, 1), ylim=(-1, 1))
        axis.axis("off")
    head = {"width": 0.009, "headwidth": 3.5, "headlength": 4, "headaxislength": 4}
    axes[0].quiver(*data.T, *(optimal - data).T, angles="xy", scale_units="xy", scale=1, color="tab:red", **head)
    axes[0].scatter(*data.T, s=12, color="tab:blue", zorder=3)
    axes[0].set_title("DOAL: data actions $a$ take\na step up $Q$, to $a^*$", fontsize=11)
    axes[0].text(-0.97, -0.95, "darker: higher $Q$", fontsize=10)
    for axis, name, clones, color, policy in (
        (axes[1], "MFQL", "$a$", "tab:blue", (mfql, baseline)),
        (axes[2], "DMFQL", "$a^*$", "tab:red", (dmfql, state)),
    ):
        action = policy_actions(*policy)
        axis.scatter(*action.T, s=5, color=color, alpha=0.8, linewidths=0)
        title = f"{name}: its flow clones {clones}\nmean reward {reward_of(action).mean():.2f}"
        axis.set_title(title, fontsize=11)
    figure.savefig(FOLDER / "doal.png", dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    draw_doal(plt)
    draw_modes(plt)
