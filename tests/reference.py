"""What tests compare with: the networks in float64 numpy, fixed inputs, and the texts of the files in algos/."""

import ast
import functools
import inspect

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from conftest import ALGOS, ROOT, load_algo, small_args

import common


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp(params, *inputs, layer_norm=False):
    """The MLP of every network, of its inputs side by side."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = np.concatenate([np.asarray(array, np.float64) for array in inputs], axis=-1)
    depth = sum(name.startswith("Dense") for name in params)
    for i in range(depth):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        if i < depth - 1:
            x = gelu(x)
            if layer_norm:
                x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
                x = x * params[f"LayerNorm_{i}"]["scale"] + params[f"LayerNorm_{i}"]["bias"]
    return x


def critics(params, obs, action):
    """Both Q(s, a): [2, ...]."""
    members = [jax.tree.map(lambda p, i=i: p[i], params["params"]["VmapMLP_0"]) for i in (0, 1)]
    return np.stack([mlp(member, obs, action, layer_norm=True)[..., 0] for member in members])


def value(params, obs):
    return mlp(params["params"]["MLP_0"], obs, layer_norm=True)[..., 0]


def velocity(params, obs, action, t):
    """The network of a flow, or F of TrigFlow."""
    return mlp(params["params"]["MLP_0"], obs, action, t)


def policy(params, obs):
    """The mean of a Gaussian policy, or a deterministic one's action, before tanh."""
    return mlp({"Dense_0": params["params"]["Dense_0"]}, gelu(mlp(params["params"]["MLP_0"], obs)))


def sample(params, obs, noise, steps, trigflow=False):
    """Eq. 4: a_{t - dt} = a_t + dt v(a_t, t), from t = 1 to t = 0; or Eq. 8, from t = pi / 2 to t = 0."""
    action, times = np.asarray(noise, np.float64), np.linspace(np.pi / 2 if trigflow else 1, 0, steps + 1)
    for k, t in zip(times, times[1:]):
        output = velocity(params, obs, action, np.full((*obs.shape[:-1], 1), k))
        action = np.cos(k - t) * action - np.sin(k - t) * output if trigflow else action + (k - t) * output
    return np.clip(action, -1, 1)


def inputs(name, **changes):
    """Small arguments, a state with a random number for every parameter, 32 transitions, and a key."""
    rng, algo, args = np.random.default_rng(4), load_algo(name), small_args(name, **changes)
    draw = lambda leaf: 1.4 * rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 4)
    shapes = jax.eval_shape(functools.partial(algo.init, args, 5, 3), 0)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = with_parameters(state, jax.tree.map(lambda leaf: draw(leaf).astype(np.float32), parameters(state)))
    action = lambda: np.clip(np.float32(1.2 * rng.uniform(-1, 1, (32, 3))), -1 + 1e-5, 1 - 1e-5)
    obs, next_obs = rng.normal(size=(2, 32, 5))
    batch = common.Dataset(obs, action(), -rng.uniform(size=32), rng.uniform(size=32) < 0.8, next_obs, action())
    return args, state, jax.tree.map(np.float32, batch), jax.random.PRNGKey(6)


def stacked(state):
    """The states of one seed, [1, ...]."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], state)


def parameters(state):
    """{network: its parameters} of all networks of a state."""
    networks = {name: network for name, network in state._asdict().items() if name != "key"}
    return {name: getattr(network, "params", network) for name, network in networks.items()}


def with_parameters(state, new):
    """The state with the parameters of `new`, {network: parameters}."""
    for name, params in new.items():
        network = getattr(state, name)
        state = state._replace(**{name: network.replace(params=params) if hasattr(network, "params") else params})
    return state


def assert_close(found, expected, rtol):
    """Every array differs by at most rtol times its largest number."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


class Recorded:
    """A case of tests/<file>.npz: what another code computed on small networks, its `arrays`, and the `batch` that it
    computed on. A network's parameters and gradients are flat, in the order of ours."""

    def __init__(self, file, case):
        arrays = np.load(ROOT / "tests" / f"{file}.npz")
        keys = ("observations", "actions", "rewards", "masks", "next_observations", "next_actions")
        self.batch = common.Dataset(*(jnp.asarray(arrays[f"batch/{key}"]) for key in keys))
        self.arrays = {key.removeprefix(f"{case}/"): arrays[key] for key in arrays if key.startswith(f"{case}/")}

    def networks(self, kind, ours):
        """{network: its parameters or gradients}, in the structure of `ours`, of all networks that were recorded."""
        return {
            network: jax.flatten_util.ravel_pytree(params)[1](self.arrays[f"{kind}/{network}"])
            for network, params in ours.items()
            if f"{kind}/{network}" in self.arrays
        }

    def start(self, algo, args, monkeypatch):
        """The state with their parameters. From here on every batch is theirs, and every draw of jax.random is, as
        theirs was, numpy's from a seed made of its shape. Their flow's time is 0 at the noise and 1 at the data: the
        uniform draw is 1 - t, and so is what the network gets (Adam's steps depend on that)."""
        draws = lambda shape, times: np.random.default_rng(times * int(np.prod([size + 3 for size in shape])))
        normal = lambda key, shape: jnp.asarray(draws(shape, 1).normal(size=shape), jnp.float32)
        uniform = lambda key, shape, maxval=1.0: maxval * jnp.asarray(draws(shape, 7).uniform(size=shape), jnp.float32)
        if hasattr(algo, "FlowPolicy"):
            velocity = algo.FlowPolicy.__call__
            reversed_time = lambda self, obs, action, t: velocity(self, obs, action, 1 - t)
            monkeypatch.setattr(algo.FlowPolicy, "__call__", reversed_time)
            monkeypatch.setattr(jax.random, "uniform", lambda key, shape: 1 - uniform(key, shape))
        else:
            monkeypatch.setattr(jax.random, "uniform", uniform)
        monkeypatch.setattr(jax.random, "normal", normal)
        monkeypatch.setattr(common, "sample_batch", lambda dataset, key, batch_size: self.batch)
        state = algo.init(args, self.batch.obs.shape[-1], self.batch.action.shape[-1], 0)
        return with_parameters(state, self.networks("params", parameters(state)))

    def check_losses_gradients_and_actions(self, algo, args, monkeypatch, rtol):
        """`rtol` is that of the gradients."""
        state, gradients = self.start(algo, args, monkeypatch), {}
        for name, params in parameters(state).items():
            if not name.startswith("target"):
                loss = getattr(algo, f"{name}_loss")
                key = [jax.random.PRNGKey(0)] if "key" in inspect.signature(loss).parameters else []
                value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
                (value, metrics), gradients[name] = value_and_grad(params, args, state, self.batch, *key)
                np.testing.assert_allclose(value, self.arrays[f"loss/{name}"], rtol=1e-5)
                if "q_grad_norm" in self.arrays and "q_grad_norm" in metrics:  # before two are shortened
                    np.testing.assert_allclose(metrics["q_grad_norm"], self.arrays["q_grad_norm"], rtol=1e-5)
        assert_close(gradients, self.networks("grads", gradients), rtol)
        keys = jnp.zeros((1, len(self.batch.obs), 2), jnp.uint32)
        assert_close(algo.act(args, stacked(state), self.batch.obs[None], keys)[0], self.arrays["act"], 1e-5)

    def check_twenty_updates(self, algo, args, monkeypatch):
        """Of the targets, which move little, more is asked: they move towards the old network."""
        state = self.start(algo, args, monkeypatch)
        updates = jax.jit(lambda state: jax.lax.scan(functools.partial(algo.update, args, None), state, length=20))
        after = parameters(updates(state)[0])
        theirs = self.networks("after20", after)
        assert theirs.keys() >= {"critic", "target_critic"}  # or nothing would be compared, in silence
        for name, expected in theirs.items():
            assert_close(after[name], expected, 1e-6 if name.startswith("target") else 1e-5)


@functools.cache
def definitions(name):
    """{name: text} of what stands at the top of an algorithm's file: functions, classes, values; and its docstring."""
    text, found = (ROOT / "algos" / f"{name}.py").read_text(), {}
    for node in (body := ast.parse(text).body):
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        other = "docstring" if node is body[0] else ast.unparse(getattr(node, "targets", [node])[0])
        found[getattr(node, "name", other)] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return found


def each_text(key, words=""):
    """The first file of each text of the definition called `key` that holds `words`, the equation it says it is."""
    texts = {definitions(name)[key]: name for name in reversed(ALGOS) if key in definitions(name)}
    names = sorted(name for text, name in texts.items() if words in text)
    assert names, f"no file has a {key} of {words}"  # or a test would be skipped in silence
    return names
