"""Compares modules of ours with those of torch_reference.py, at random sizes and options, in float64 on its side."""

import functools
import zlib
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import numpy as np
import torch
from flax import traverse_util
from hypothesis import Phase, given, settings

from fcvit_jax.convert.fcvit import layout, original_names
from fcvit_jax.convert.layouts import to_ours, to_theirs


def nhwc(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def assert_close(actual, expected, what, tolerance=1e-5):
    """Within `tolerance` of the largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, should be {expected.shape}"
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error <= tolerance, f"{what}: {error:.2e} of the largest value apart"


def assert_same(actual, expected):
    """The same names, and for each of them the same numbers."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(actual[name], x, err_msg=name)


def tensors(state_dict):
    return {name: torch.from_numpy(x) for name, x in state_dict.items()}


class Step(NamedTuple):
    loss: jax.Array
    logits: jax.Array
    batch_stats: dict
    grads: dict
    image_grad: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(model, loss, variables, images, labels):
    """What a training step computes, for a model without dropout; loss(logits, labels) gives a scalar."""

    def loss_fn(params, images):
        logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return loss(logits, labels), (logits, updates["batch_stats"])

    (value, (logits, stats)), grads = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(variables["params"], images)
    return Step(value, logits, stats, *grads)


def formula_weights(shapes, seed):
    """Weights that take no room in the repository: drawn from the seed, the name and the shape of each tensor.

    Layer scales are near 1: at their initial 1e-5 a block is almost the identity, and a wrong one goes unseen.
    """
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name.endswith("num_batches_tracked"):
            weights[name] = np.zeros(shape, np.int64)
            continue
        if name.endswith("running_var") or "rescale_weight" in name:
            x = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            x = rng.normal(0, 0.1, shape)
        elif "layer_scale" in name:
            x = rng.uniform(0.3, 1, shape)
        elif "rescale_bias" in name:
            x = rng.normal(0, 0.3, shape)
        elif name.endswith("bias"):
            x = rng.normal(0, 0.1, shape)
        elif len(shape) == 1:
            x = rng.uniform(0.5, 1.5, shape)
        else:
            x = rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
        weights[name] = x.astype(np.float16).astype(np.float32)
    return weights


def at_random(**options):
    """Runs a test with random options, a random (N, H, W, C) and a random seed; the same ones every time.

    Every example is compiled, so there are few of them, and a failing one is not made smaller.
    """
    shapes = st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.sampled_from([8, 24, 40]))
    drawn = given(shape=shapes, seed=st.integers(0, 999), options=st.fixed_dictionaries(options))
    few = settings(max_examples=3, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    return lambda test: few(drawn(test))


def assert_module_equals(ours, theirs, place, shape, seed, *args):
    """Compares a module's output, the gradients of its parameters and of its input, and the similarities it sows.

    Args:
      ours: a linen module.
      theirs: the same in PyTorch.
      place: our path and the original's name of such a module in the whole network.
      shape: of the input, (N, H, W, C).
      seed: of the weights, the input and the gradient that comes from above.
      *args: further arguments of our module.
    """
    weights = formula_weights({name: tuple(x.shape) for name, x in theirs.state_dict().items()}, seed)
    theirs.load_state_dict(tensors(weights))
    theirs.double()
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 1, shape).astype(np.float32)

    path, name = place
    flat = traverse_util.flatten_dict(jax.eval_shape(lambda: ours.init(jax.random.key(0), images, *args)), sep="/")
    whole = {key: key.replace("/", f"/{path}/" if path else "/", 1) for key in flat}
    names = original_names({whole[key]: x.shape for key, x in flat.items()})
    names = {key: names[whole[key]].removeprefix(name and f"{name}.") for key in flat}
    variables = {key: to_ours(weights[names[key]], layout(whole[key])) for key in flat}
    assert {names[key] for key in flat} == {key for key in weights if "num_batches_tracked" not in key}

    @jax.jit
    def run(variables, images, cotangent):
        def outputs(params, images):
            tree = {"params": params, **{k: x for k, x in variables.items() if k != "params"}}
            return ours.apply(tree, images, *args, mutable=["batch_stats", "intermediates"])

        y, vjp, state = jax.vjp(outputs, variables["params"], images, has_aux=True)
        return y, vjp(cotangent), state.get("intermediates", {})

    theirs_x = torch.from_numpy(np.moveaxis(images, -1, 1)).double().requires_grad_()
    theirs_y = theirs(theirs_x)
    cotangent = rng.normal(0, 1, theirs_y.shape).astype(np.float32)
    theirs_y.backward(torch.from_numpy(cotangent).double())
    cotangent = nhwc(cotangent) if cotangent.ndim == 4 else cotangent
    y, (grads, image_grad), sown = run(traverse_util.unflatten_dict(variables, sep="/"), images, cotangent)

    theirs_y = theirs_y.detach().numpy()
    assert_close(y, nhwc(theirs_y) if theirs_y.ndim == 4 else theirs_y, "output")
    assert_close(image_grad, nhwc(theirs_x.grad), "gradient of the input", 2e-5)
    expected = {name: x.grad.numpy() for name, x in theirs.named_parameters()}
    largest = max(np.abs(x).max() for x in expected.values())
    for key, grad in traverse_util.flatten_dict({"params": grads}, sep="/").items():
        grad, right = to_theirs(np.asarray(grad), layout(whole[key])), expected[names[key]]
        # Some sums cancel: they are as exact as their terms are large.
        np.testing.assert_allclose(grad, right, rtol=0, atol=1e-5 * np.abs(right).max() + 2e-6 * largest, err_msg=key)
    return sown, theirs_x
