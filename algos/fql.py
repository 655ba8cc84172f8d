"""FQL: flow Q-learning (Park et al., 2025c). A one-step policy, the student of a flow policy, maximizes Q.

    critic   mean (Q(s, a) - (r + discount mask Q'(s', pi(s', z))))^2,  z ~ N(0, I)
    flow     mean (v(s, a_t, t) - (a - z))^2,  a_t = (1 - t) a + t z,  z ~ N(0, I),  t ~ U[0, 1]
    actor    alpha mean (pi(s, z) - flow(s, z))^2 - mean Q(s, pi(s, z)),  flow(s, z) flow_steps Euler steps from z
    acts by  pi(s, z) with one z

Q' is the min or mean (q_agg) of the two target critics; the actor's Q is always the mean of the two critics.
Time runs from noise (t = 1) to data (t = 0); in FQL's paper it is the other way round.
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Literal, NamedTuple

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
PAPER_COLUMNS = {"discount": "discount", "q_agg": "q_agg", "alpha": "alpha"}


@dataclasses.dataclass(frozen=True)
class Args:
    env_name: str = "scene-play"  # one of the paper's 15 tasks, or another (docs/data.md)
    seeds: tuple[int, ...] = (111,)  # training seeds, all in one program
    num_updates: int | None = None  # gradient steps (None: the paper's value for the task, as in all hyperparameters)
    batch_size: int = 256  # transitions per update
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # widths of every network's hidden layers
    learning_rate: float = 3e-4  # Adam's, for every network
    discount: float | None = None  # discount factor gamma
    tau: float = 0.005  # step of the target critic towards the critic
    q_agg: Literal["min", "mean"] | None = None  # how the two critics make one Q in the Bellman target
    flow_steps: int = 10  # Euler steps from noise to action
    alpha: float | None = None  # weight of the distillation
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


class FlowPolicy(nn.Module):
    """Velocity v(s, a_t, t) from noise (t = 1) to actions (t = 0): [..., action_dim], with t [..., 1]."""

    hidden_dims: tuple[int, ...]
    action_dim: int
    flow_steps: int

    @nn.compact
    def __call__(self, obs, action, t):
        return MLP(self.hidden_dims, self.action_dim)(jnp.concatenate([obs, action, t], axis=-1))

    def sample(self, obs, key):
        """One action per row of obs [..., obs_dim], by Euler's method (Eq. 4): [..., action_dim] in [-1, 1]."""
        action = jax.random.normal(key, (*obs.shape[:-1], self.action_dim))
        for step in range(self.flow_steps):
            t = jnp.full((*obs.shape[:-1], 1), 1 - step / self.flow_steps)
            action += self(obs, action, t) / self.flow_steps
        return jnp.clip(action, -1, 1)


class OneStepPolicy(nn.Module):
    """Action pi(s, z) of noise z in one step: [..., action_dim], with obs [..., obs_dim], noise [..., action_dim]."""

    hidden_dims: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, obs, noise):
        return MLP(self.hidden_dims, self.action_dim)(jnp.concatenate([obs, noise], axis=-1))

    def sample(self, obs, key):
        """One action per row of obs [..., obs_dim]: [..., action_dim] in [-1, 1]."""
        noise = jax.random.normal(key, (*obs.shape[:-1], self.action_dim))
        return jnp.clip(self(obs, noise), -1, 1)


class AgentState(NamedTuple):
    """All that training carries from one update to the next."""

    actor: TrainState
    flow: TrainState
    critic: TrainState
    target_critic: dict
    key: jax.Array


def init(args, obs_dim, action_dim, seed):
    """The state before the first update, a function of the seed."""
    key, actor_key, flow_key, critic_key = jax.random.split(jax.random.PRNGKey(seed), 4)
    obs, action, t = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim)), jnp.zeros((1, 1))
    adam = optax.adam(args.learning_rate)
    create = lambda net, key, *inputs: TrainState.create(apply_fn=net.apply, params=net.init(key, *inputs), tx=adam)
    actor = create(OneStepPolicy(args.hidden_dims, action_dim), actor_key, obs, action)
    flow = create(FlowPolicy(args.hidden_dims, action_dim, args.flow_steps), flow_key, obs, action, t)
    critic = create(Critic(args.hidden_dims), critic_key, obs, action)
    return AgentState(actor, flow, critic, critic.params, key)


def critic_loss(params, args, state, batch, key):
    """Q-learning at the student's next action."""
    next_action = state.actor.apply_fn(state.actor.params, batch.next_obs, key, method="sample")
    next_q = state.critic.apply_fn(state.target_critic, batch.next_obs, next_action)
    next_q = next_q.min(axis=0) if args.q_agg == "min" else next_q.mean(axis=0)
    target = batch.reward + args.discount * batch.mask * next_q
    q = state.critic.apply_fn(params, batch.obs, batch.action)
    loss = jnp.mean((q - target) ** 2)
    return loss, {"critic_loss": loss, "q": q.mean()}


def flow_loss(params, args, state, batch, key):
    """Flow matching (Eq. 3) on the data action."""
    action = batch.action
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, action.shape)
    t = jax.random.uniform(time_key, (*action.shape[:-1], 1))
    velocity = state.flow.apply_fn(params, batch.obs, (1 - t) * action + t * noise, t)
    loss = jnp.mean((velocity - (action - noise)) ** 2)
    return loss, {"flow_loss": loss}


def actor_loss(params, args, state, batch, key):
    """Distillation of the flow into the student, both from the same noise, and Q of the student's action."""
    noise = jax.random.normal(key, batch.action.shape)  # the noise that the flow's sample draws from this key
    flow_action = state.flow.apply_fn(state.flow.params, batch.obs, key, method="sample")
    action = state.actor.apply_fn(params, batch.obs, noise)
    loss = jnp.mean((action - flow_action) ** 2)
    q = state.critic.apply_fn(state.critic.params, batch.obs, jnp.clip(action, -1, 1)).mean()
    return args.alpha * loss - q, {"distill_loss": loss, "actor_q": q}


def update(args, dataset, state, _):
    """One update of every network and target, all from the old parameters: the body of a scan."""
    key, batch_key, critic_key, flow_key, actor_key = jax.random.split(state.key, 5)
    batch = common.sample_batch(dataset, batch_key, args.batch_size)
    gradient = functools.partial(jax.grad, has_aux=True)
    critic_grads, critic_metrics = gradient(critic_loss)(state.critic.params, args, state, batch, critic_key)
    flow_grads, flow_metrics = gradient(flow_loss)(state.flow.params, args, state, batch, flow_key)
    actor_grads, actor_metrics = gradient(actor_loss)(state.actor.params, args, state, batch, actor_key)
    critic = state.critic.apply_gradients(grads=critic_grads)
    flow = state.flow.apply_gradients(grads=flow_grads)
    actor = state.actor.apply_gradients(grads=actor_grads)
    target_critic = optax.incremental_update(state.critic.params, state.target_critic, args.tau)
    return AgentState(actor, flow, critic, target_critic, key), critic_metrics | flow_metrics | actor_metrics


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3, compiler_options=common.XLA_OPTIONS)
def train(args, num_updates, dataset, states):
    """num_updates updates of every seed, in one program: the new states, and each metric's mean, [seeds]."""
    updates = lambda dataset, state: jax.lax.scan(functools.partial(update, args, dataset), state, length=num_updates)
    states, metrics = common.for_each_seed(updates, dataset, states)
    return states, jax.tree.map(lambda metric: metric.mean(axis=1), metrics)


@functools.partial(jax.jit, static_argnums=0)
def act(args, states, obs, keys):
    """One-step actions for obs [seeds, slots, obs_dim], a key each: [seeds, slots, action_dim]."""
    one = lambda state, obs, key: state.actor.apply_fn(state.actor.params, obs, key, method="sample")
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
