"""DTrigFlow: trigflow.py with a policy that clones the optimal action of DOAL (Eq. 17), not the data action.

    critic   mean (Q(s, a) - (r + discount mask V(s')))^2
    value    mean |expectile - 1(min Q'(s, a) < V(s))| (min Q'(s, a) - V(s))^2
    actor    alpha mean (f(s, a_t, t) - a*)^2,  a_t = cos(t) a* + sin(t) z,  z ~ N(0, I),  t ~ U[0, pi / 2],
             a* = clip(a + delta / mean||g|| g),  g = grad_a mean Q(s, a),
             f(s, a_t, t) = cos(t) a_t - sin(t) F(s, a_t, t)
    acts by  the best of num_samples policy actions by min Q

Q are two critics, Q' their targets; min Q and mean Q are over the two; t runs from noise (pi / 2) to data (0).
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
PAPER_COLUMNS = {"num_samples": "iql_num_samples", "alpha": "alpha", "delta": "iql_delta"}


@dataclasses.dataclass(frozen=True)
class Args:
    env_name: str = "scene-play"  # one of the paper's 15 tasks, or another (docs/data.md)
    seeds: tuple[int, ...] = (111,)  # training seeds, all in one program
    num_updates: int | None = None  # gradient steps (None: the paper's value for the task, as in all hyperparameters)
    batch_size: int = 256  # transitions per update
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # widths of every network's hidden layers
    learning_rate: float = 3e-4  # Adam's, for every network
    discount: float = 0.99  # discount factor gamma
    tau: float = 0.005  # step of the target critic towards the critic
    expectile: float = 0.9  # IQL expectile
    num_samples: int | None = None  # actions that MaxQ chooses from when acting (n)
    flow_steps: int = 10  # DDIM steps from noise to action
    alpha: float | None = None  # weight of the behaviour loss
    delta: float | None = None  # mean length of the step from the data action up the gradient of Q
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


class Value(nn.Module):
    """V(s): obs [..., obs_dim] -> [...]."""

    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        return MLP(self.hidden_dims, 1, layer_norm=True)(obs).squeeze(-1)


class TrigFlowPolicy(nn.Module):
    """The network F(s, a_t, t) between noise (t = pi / 2) and actions (t = 0): [..., action_dim], with t [..., 1]."""

    hidden_dims: tuple[int, ...]
    action_dim: int
    flow_steps: int

    @nn.compact
    def __call__(self, obs, action, t):
        return MLP(self.hidden_dims, self.action_dim)(jnp.concatenate([obs, action, t], axis=-1))

    def denoise(self, obs, action, t):
        """f(s, a_t, t), the estimate of the action in a_t (Eq. 7): [..., action_dim]."""
        return jnp.cos(t) * action - jnp.sin(t) * self(obs, action, t)

    def sample(self, obs, key):
        """One action per row of obs [..., obs_dim], by first-order DDIM (Eq. 8): [..., action_dim] in [-1, 1]."""
        action = jax.random.normal(key, (*obs.shape[:-1], self.action_dim))
        dt = jnp.pi / 2 / self.flow_steps
        for step in range(self.flow_steps):
            t = jnp.full((*obs.shape[:-1], 1), jnp.pi / 2 - step * dt)
            action = jnp.cos(dt) * action - jnp.sin(dt) * self(obs, action, t)
        return jnp.clip(action, -1, 1)


class AgentState(NamedTuple):
    """All that training carries from one update to the next."""

    actor: TrainState
    critic: TrainState
    value: TrainState
    target_critic: dict
    key: jax.Array


def init(args, obs_dim, action_dim, seed):
    """The state before the first update, a function of the seed."""
    key, actor_key, critic_key, value_key = jax.random.split(jax.random.PRNGKey(seed), 4)
    obs, action, t = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim)), jnp.zeros((1, 1))
    adam = optax.adam(args.learning_rate)
    create = lambda net, key, *inputs: TrainState.create(apply_fn=net.apply, params=net.init(key, *inputs), tx=adam)
    actor = create(TrigFlowPolicy(args.hidden_dims, action_dim, args.flow_steps), actor_key, obs, action, t)
    critic = create(Critic(args.hidden_dims), critic_key, obs, action)
    value = create(Value(args.hidden_dims), value_key, obs)
    return AgentState(actor, critic, value, critic.params, key)


def max_q(state, obs, num_samples, key):
    """The best of num_samples policy actions by the smaller of two Q (Eq. 9): [..., action_dim]."""
    obs = jnp.broadcast_to(obs, (num_samples, *obs.shape))
    action = state.actor.apply_fn(state.actor.params, obs, key, method="sample")
    q = state.critic.apply_fn(state.critic.params, obs, action).min(axis=0)
    best = q.argmax(axis=0)[None, ..., None]
    return jnp.take_along_axis(action, best, axis=0)[0]


def critic_loss(params, args, state, batch):
    """Q-learning with V(s') in the target (Eq. 1)."""
    next_v = state.value.apply_fn(state.value.params, batch.next_obs)
    target = batch.reward + args.discount * batch.mask * next_v
    q = state.critic.apply_fn(params, batch.obs, batch.action)
    loss = jnp.mean((q - target) ** 2)
    return loss, {"critic_loss": loss, "q": q.mean()}


def value_loss(params, args, state, batch):
    """Expectile regression of V(s) towards the smaller of the target critics' Q(s, a) (Eq. 1)."""
    q = state.critic.apply_fn(state.target_critic, batch.obs, batch.action).min(axis=0)
    v = state.value.apply_fn(params, batch.obs)
    weight = jnp.where(q < v, 1 - args.expectile, args.expectile)
    loss = jnp.mean(weight * (q - v) ** 2)
    return loss, {"value_loss": loss, "v": v.mean()}


def optimal_action(args, state, batch):
    """The data action moved up Q by a step of mean length delta (Eq. 17), [batch, action_dim]; and mean||grad_a Q||."""
    q_sum = lambda action: state.critic.apply_fn(state.critic.params, batch.obs, action).mean(axis=0).sum()
    gradient = jax.grad(q_sum)(batch.action)
    norm = jnp.linalg.norm(gradient, axis=-1, keepdims=True) + 1e-5  # so a flat Q moves nothing
    shorten = jnp.minimum(1, (norm.mean() + 2 * norm.std()) / norm)  # the authors' safeguards: this, and the clip
    return jnp.clip(batch.action + args.delta / norm.mean() * shorten * gradient, -1, 1), norm.mean()


def actor_loss(params, args, state, batch, key):
    """TrigFlow (Eq. 6) on the optimal action (Eq. 21)."""
    action, q_grad_norm = optimal_action(args, state, batch)
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, action.shape)
    t = jax.random.uniform(time_key, (*action.shape[:-1], 1), maxval=jnp.pi / 2)
    noisy = jnp.cos(t) * action + jnp.sin(t) * noise
    denoised = state.actor.apply_fn(params, batch.obs, noisy, t, method="denoise")
    loss = jnp.mean((denoised - action) ** 2)
    return args.alpha * loss, {"diffusion_loss": loss, "q_grad_norm": q_grad_norm}


def update(args, dataset, state, _):
    """One update of every network and target, all from the old parameters: the body of a scan."""
    key, batch_key, actor_key = jax.random.split(state.key, 3)
    batch = common.sample_batch(dataset, batch_key, args.batch_size)
    gradient = functools.partial(jax.grad, has_aux=True)
    critic_grads, critic_metrics = gradient(critic_loss)(state.critic.params, args, state, batch)
    value_grads, value_metrics = gradient(value_loss)(state.value.params, args, state, batch)
    actor_grads, actor_metrics = gradient(actor_loss)(state.actor.params, args, state, batch, actor_key)
    critic = state.critic.apply_gradients(grads=critic_grads)
    value = state.value.apply_gradients(grads=value_grads)
    actor = state.actor.apply_gradients(grads=actor_grads)
    target_critic = optax.incremental_update(state.critic.params, state.target_critic, args.tau)
    return AgentState(actor, critic, value, target_critic, key), critic_metrics | value_metrics | actor_metrics


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3, compiler_options=common.XLA_OPTIONS)
def train(args, num_updates, dataset, states):
    """num_updates updates of every seed, in one program: the new states, and each metric's mean, [seeds]."""
    updates = lambda dataset, state: jax.lax.scan(functools.partial(update, args, dataset), state, length=num_updates)
    states, metrics = common.for_each_seed(updates, dataset, states)
    return states, jax.tree.map(lambda metric: metric.mean(axis=1), metrics)


@functools.partial(jax.jit, static_argnums=0)
def act(args, states, obs, keys):
    """MaxQ actions for obs [seeds, slots, obs_dim], a key each: [seeds, slots, action_dim]."""
    one = lambda state, obs, key: max_q(state, obs, args.num_samples, key)
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
