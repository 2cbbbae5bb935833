"""Dense convolutions: equal to JAX's in every derivative, and in the form that XLA computes fast on CPUs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_close
from flax import linen as nn

from fcvit_jax.networks.dense_conv import Conv

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "height, width, window, stride, padding",
    [
        (8, 8, (3, 3), 1, 1),
        (9, 7, (3, 3), 2, 1),  # the last row of padding is not used
        (10, 9, (3, 3), 2, 1),
        (13, 15, (7, 7), 4, 2),  # nor is the last row of the images
        (12, 8, (4, 4), 4, "VALID"),
        (11, 9, (4, 4), 4, "VALID"),
        (6, 5, (1, 1), 1, "SAME"),
        (6, 7, (2, 3), (2, 1), "SAME"),
        (9, 9, (3, 3), 3, ((2, 0), (0, 1))),
    ],
)
def test_results_and_derivatives_are_those_of_jax(height, width, window, stride, padding):
    x, bias = normal(2, height, width, 3), normal(4)
    kernel = normal(*window, 3, 4)
    tangents = normal(*x.shape), normal(*kernel.shape)

    def derivatives(layer):
        def apply(x, kernel):
            return layer(4, window, stride, padding).apply({"params": {"kernel": kernel, "bias": bias}}, x)

        def total(x, kernel):
            return jnp.sin(apply(x, kernel)).sum()

        def both(x, kernel):
            grads = jax.grad(total, (0, 1))
            return apply(x, kernel), grads(x, kernel), jax.jvp(grads, (x, kernel), tangents)[1]

        return jax.jit(both)(x, kernel)

    for ours, expected in zip(*(jax.tree.leaves(derivatives(layer)) for layer in (Conv, nn.Conv)), strict=True):
        assert_close(ours, expected, "result or derivative")


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 1)])
def test_many_at_once(axes):
    x, kernel = normal(2, 2, 6, 6, 3), normal(3, 2, 3, 3, 4)
    args = x if axes[0] is not None else x[0], np.moveaxis(kernel, 1, 0) if axes[1] == 0 else kernel
    if axes == (0, None):
        args = args[0], kernel[:, 0]

    def apply(layer):
        def one(x, kernel):
            return layer(4, (3, 3), padding=1, use_bias=False).apply({"params": {"kernel": kernel}}, x)

        return jax.vmap(one, axes)(*args)

    assert_close(apply(Conv), apply(nn.Conv), "many")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA for other devices brings convolutions into form itself")
def test_gradients_in_a_loop_are_convolutions_in_the_form_that_is_fast_on_cpus():
    x, kernel = normal(3, 2, 8, 8, 3), normal(3, 3, 3, 4)

    def forms(layer):
        def total(x, kernel):
            return jnp.sin(layer(4, (3, 3), 2, 1, use_bias=False).apply({"params": {"kernel": kernel}}, x)).sum()

        program = jax.jit(lambda x, kernel: jax.lax.map(lambda x: jax.grad(total, (0, 1))(x, kernel), x))
        text = program.lower(x, kernel).compile().as_text()
        return set(re.findall(r" convolution\(.*dim_labels=(\S+)[,\n]", text))

    fast = {"b01f_01io->b01f"}
    assert forms(Conv) == fast
    assert forms(nn.Conv) > fast  # when this fails, XLA has learnt it: let `nn.Conv` be used again
