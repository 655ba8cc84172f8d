"""ReBRAC (Tarasov et al., 2023): a deterministic policy, kept near the data in the actor and in the critic (Eq. 11).

    critic   mean (Q(s, a) - (r + discount mask (Q'(s', a') - alpha_critic ||a' - a'_data||^2)))^2,
             a' = pi'(s') + clip(N(0, policy_noise), +-noise_clip), clipped to [-1, 1],
             a'_data the action taken at s' in the data
    actor    alpha_actor mean ||pi(s) - a||^2 - mean Q(s, pi(s)) / mean |Q(s, pi(s))|,  every policy_frequency updates
    acts by  pi(s), clipped to [-1, 1]

Q' and the actor's Q are the smaller of two critics'. With `--no-tanh` pi's output is linear, as in ReBRAC(Gauss).
"""

import dataclasses
import functools
import pathlib
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from flax.training.train_state import TrainState

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # this checkout, whatever else is installed
import common
from run import Run

# flag: the column of the paper's values (common.PAPER) that it takes when it is None
PAPER_COLUMNS = {"discount": "discount", "alpha_actor": "rebrac_alpha_actor", "alpha_critic": "rebrac_alpha_critic"}


@dataclasses.dataclass(frozen=True)
class Args:
    env_name: str = "scene-play"  # one of the paper's 15 tasks, or another (docs/data.md)
    seeds: tuple[int, ...] = (111,)  # training seeds, all in one program
    num_updates: int | None = None  # gradient steps (None: the paper's value for the task, as in all hyperparameters)
    batch_size: int = 256  # transitions per update
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # widths of every network's hidden layers
    learning_rate: float = 3e-4  # Adam's, for every network
    discount: float | None = None  # discount factor gamma
    tau: float = 0.005  # step of the targets towards their networks
    alpha_actor: float | None = None  # weight of the squared distance to the data action in the actor's loss
    alpha_critic: float | None = None  # weight of the squared distance to the next data action in the Bellman target
    tanh: bool = True  # squash the policy's action by tanh
    policy_noise: float = 0.2  # standard deviation of the target policy noise
    noise_clip: float = 0.5  # bound of the target policy noise
    policy_frequency: int = 2  # updates of the critic per update of the actor and of both targets
    eval_episodes: int = 50  # episodes per evaluation (after every tenth of the run)
    eval_seed: int = 0  # seed of the evaluations' initial states and policy noise
    num_workers: int | None = None  # processes that step the environments (None: one per core)
    dataset_path: str | None = None  # file to train on, instead of the published one
    generate_episodes: int | None = None  # number of episodes to make with OGBench's oracles and to train on
    folder: str | None = None  # where the run is recorded (None: runs/<task>/<algorithm>/<time>)
    resume: str | None = None  # folder of a run to resume with its own flags (only --dataset-path may change)
    track: bool = False  # log to Weights & Biases
    wandb_project_name: str = "doal"  # W&B project
    capture_video: bool = False  # film four episodes at the end (mp4 files in the run's folder)


class MLP(nn.Module):
    """Hidden layers of Dense, GELU and, optionally, layer norm, then a Dense layer: [..., in_dim] -> [..., out_dim]."""

    hidden_dims: tuple[int, ...]
    out_dim: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        kernel_init = nn.initializers.variance_scaling(1, "fan_avg", "uniform")
        for dim in self.hidden_dims:
            x = nn.gelu(nn.Dense(dim, kernel_init=kernel_init)(x))
            if self.layer_norm:
                x = nn.LayerNorm()(x)
        return nn.Dense(self.out_dim, kernel_init=kernel_init)(x)


class Critic(nn.Module):
    """Two independent Q(s, a): obs [..., obs_dim], action [..., action_dim] -> [2, ...]."""

    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        two = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None, "axis_size": 2}
        q = nn.vmap(MLP, **two)(self.hidden_dims, 1, layer_norm=True)
        return q(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


class DeterministicPolicy(nn.Module):
    """Action pi(s): obs [..., obs_dim] -> [..., action_dim], in [-1, 1] if tanh."""

    hidden_dims: tuple[int, ...]
    action_dim: int
    tanh: bool

    @nn.compact
    def __call__(self, obs):
        hidden = nn.gelu(MLP(self.hidden_dims[:-1], self.hidden_dims[-1])(obs))
        small = nn.initializers.variance_scaling(0.01, "fan_avg", "uniform")
        action = nn.Dense(self.action_dim, kernel_init=small)(hidden)
        return jnp.tanh(action) if self.tanh else action


class AgentState(NamedTuple):
    """All that training carries from one update to the next."""

    actor: TrainState
    critic: TrainState
    target_actor: dict
    target_critic: dict
    key: jax.Array


def init(args, obs_dim, action_dim, seed):
    """The state before the first update, a function of the seed."""
    key, actor_key, critic_key = jax.random.split(jax.random.PRNGKey(seed), 3)
    obs, action = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim))
    adam = optax.adam(args.learning_rate)
    create = lambda net, key, *inputs: TrainState.create(apply_fn=net.apply, params=net.init(key, *inputs), tx=adam)
    actor = create(DeterministicPolicy(args.hidden_dims, action_dim, args.tanh), actor_key, obs)
    critic = create(Critic(args.hidden_dims), critic_key, obs, action)
    return AgentState(actor, critic, actor.params, critic.params, key)


def critic_loss(params, args, state, batch, key):
    """Q-learning at the target actor's noisy next action, penalized by its distance to the data's (Eq. 11)."""
    next_action = state.actor.apply_fn(state.target_actor, batch.next_obs)
    noise = args.policy_noise * jax.random.normal(key, next_action.shape)
    next_action = jnp.clip(next_action + jnp.clip(noise, -args.noise_clip, args.noise_clip), -1, 1)
    next_q = state.critic.apply_fn(state.target_critic, batch.next_obs, next_action).min(axis=0)
    next_q -= args.alpha_critic * jnp.sum((next_action - batch.next_action) ** 2, axis=-1)
    target = batch.reward + args.discount * batch.mask * next_q
    q = state.critic.apply_fn(params, batch.obs, batch.action)
    loss = jnp.mean((q - target) ** 2)
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(params, args, state, batch, key):
    """BRAC (Eq. 10): Q of the policy's action, divided by its scale, and its squared distance to the data action."""
    action = state.actor.apply_fn(params, batch.obs)
    loss = jnp.sum((action - batch.action) ** 2, axis=-1).mean()
    q = state.critic.apply_fn(state.critic.params, batch.obs, action).min(axis=0)
    scale = jax.lax.stop_gradient(jnp.abs(q).mean())
    return args.alpha_actor * loss - q.mean() / scale, {"bc_loss": loss, "actor_q": q.mean()}


def update(args, dataset, state, _):
    """One update of every network and target, all from the old parameters: the body of a scan."""
    key, batch_key, critic_key, actor_key = jax.random.split(state.key, 4)
    batch = common.sample_batch(dataset, batch_key, args.batch_size)
    gradient = functools.partial(jax.grad, has_aux=True)
    critic_grads, critic_metrics = gradient(critic_loss)(state.critic.params, args, state, batch, critic_key)
    due = (state.critic.step + 1) % args.policy_frequency == 0

    def learn():
        grads, metrics = gradient(actor_loss)(state.actor.params, args, state, batch, actor_key)
        # so that a chunk's mean is that of its actor updates, if policy_frequency divides its length
        return grads, {name: args.policy_frequency * value for name, value in metrics.items()}

    def rest():
        return jax.tree.map(jnp.zeros_like, state.actor.params), {"bc_loss": 0.0, "actor_q": 0.0}

    actor_grads, actor_metrics = jax.lax.cond(due, learn, rest)
    critic = state.critic.apply_gradients(grads=critic_grads)
    actor = state.actor.apply_gradients(grads=actor_grads)  # with a zero gradient in between, as in FQL's code
    step = jnp.where(due, args.tau, 0)
    target_actor = optax.incremental_update(state.actor.params, state.target_actor, step)
    target_critic = optax.incremental_update(state.critic.params, state.target_critic, step)
    return AgentState(actor, critic, target_actor, target_critic, key), critic_metrics | actor_metrics


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3, compiler_options=common.XLA_OPTIONS)
def train(args, num_updates, dataset, states):
    """num_updates updates of every seed, in one program: the new states, and each metric's mean, [seeds]."""
    updates = lambda dataset, state: jax.lax.scan(functools.partial(update, args, dataset), state, length=num_updates)
    states, metrics = common.for_each_seed(updates, dataset, states)
    return states, jax.tree.map(lambda metric: metric.mean(axis=1), metrics)


@functools.partial(jax.jit, static_argnums=0)
def act(args, states, obs, keys):
    """The policy's actions for obs [seeds, slots, obs_dim], a key each: [seeds, slots, action_dim]."""
    one = lambda state, obs, key: jnp.clip(state.actor.apply_fn(state.actor.params, obs), -1, 1)
    return jax.vmap(jax.vmap(one, (None, 0, 0)))(states, obs, keys)


def main(args):
    """Trains all seeds, evaluates each at every tenth of the run, and returns their scores [seeds] by the paper's
    protocol (see `Run.finish`)."""
    args, task = common.prepare(args, __file__, PAPER_COLUMNS)  # with the paper's values or, to resume, that run's
    dataset, source = common.load_dataset(task, args.dataset_path, args.generate_episodes)
    with (
        Run(args, __file__, task, source) as run,
        common.Environments(task, len(args.seeds), args.eval_episodes, args.num_workers) as environments,
    ):
        init_seed = functools.partial(init, args, dataset.obs.shape[-1], dataset.action.shape[-1])
        step, states = run.restore(jax.jit(jax.vmap(init_seed))(jnp.array(args.seeds, jnp.uint32)))
        dataset, states = common.place(dataset, states)  # each device has all data and a share of the seeds
        while step < args.num_updates:
            states, metrics = train(args, run.chunk, dataset, states)
            step += run.chunk
            run.log(step, metrics)
            if step % run.eval_interval == 0:
                policy = functools.partial(act, args, states)
                scores = common.evaluate(policy, environments, args.seeds, step, args.eval_episodes, args.eval_seed)
                run.log_scores(step, scores)
            run.save(step, states)
    return run.finish()


if __name__ == "__main__":
    main(tyro.cli(Args))
