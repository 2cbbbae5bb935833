"""Convolutions over all channels, with gradients that XLA computes fast on CPUs wherever they stand in a program.

XLA for CPUs brings a convolution into the one form that it computes fast only outside of loops and conditions. Inside,
JAX's gradients are up to 300 times slower: of a batch in parts (`train.accumulate`), or of boxes chunk by chunk.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from fcvit_jax.depthwise import primitives

Pair = tuple[int, int]


def _by_lax(x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair], **dilations: Pair) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **dilations
    )


@functools.partial(jax.jit, static_argnames=("strides", "padding"))
def _compute(x, kernel, *, strides, padding):
    return _by_lax(x, kernel, strides, padding)


def _type(x, kernel, **window):
    return primitives.array_type(x, jax.eval_shape(functools.partial(_by_lax, **window), x, kernel).shape, x.dtype)


# Jitted, so that JAX traces the gradients of equal convolutions once.
@functools.partial(jax.jit, static_argnames=("x", "strides", "padding"))
def _to_input(g, kernel, *, x, strides, padding):
    """The gradient of x, of which the type is given."""

    def on_cpu(g, kernel):
        k, first = kernel.shape[:2], tuple(low for low, _ in padding)
        ends = (x.shape[i + 1] - (g.shape[i + 1] - 1) * strides[i] - 1 + first[i] for i in range(2))
        around = tuple((k[i] - 1 - first[i], end) for i, end in enumerate(ends))
        return _by_lax(g, kernel[::-1, ::-1].swapaxes(2, 3), (1, 1), around, lhs_dilation=strides)

    def elsewhere(g, kernel):
        return jax.linear_transpose(lambda x: _by_lax(x, kernel, strides, padding), x)(g)[0]

    return lax.platform_dependent(g, kernel, cpu=on_cpu, default=elsewhere)


@functools.partial(jax.jit, static_argnames=("kernel", "strides", "padding"))
def _to_kernel(g, x, *, kernel, strides, padding):
    """The gradient of the kernel, of which the type is given."""

    def on_cpu(g, x):  # channels are the images, and images the channels
        k, first = kernel.shape[:2], tuple(low for low, _ in padding)
        ends = (k[i] + (g.shape[i + 1] - 1) * strides[i] - x.shape[i + 1] - first[i] for i in range(2))
        around = tuple(zip(first, ends, strict=True))
        by_channel = _by_lax(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), around, rhs_dilation=strides)
        return by_channel.transpose(1, 2, 0, 3)

    def elsewhere(g, x):
        return jax.linear_transpose(lambda kernel: _by_lax(x, kernel, strides, padding), kernel)(g)[0]

    return lax.platform_dependent(g, x, cpu=on_cpu, default=elsewhere)


def _batch(x, kernel, x_axis, kernel_axis, **window):
    if kernel_axis is None:  # more images for the same kernel
        xs = jnp.moveaxis(x, x_axis, 0)
        y = _conv(xs.reshape(-1, *xs.shape[2:]), kernel, **window)
        return y.reshape(*xs.shape[:2], *y.shape[1:]), 0
    return jax.vmap(functools.partial(_by_lax, **window), (x_axis, kernel_axis))(x, kernel), 0


# x (N, H, W, C), kernel (h, w, C, D), both of one dtype, to (N, ..., D).
_conv = primitives.bilinear(
    "dense_conv",
    compute=_compute,
    result=_type,
    to_first=lambda g, x, kernel, **window: _to_input(g, kernel, x=x.aval, **window),
    to_second=lambda g, x, kernel, **window: _to_kernel(g, x, kernel=kernel.aval, **window),
    batch=_batch,
)


def _conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str | Sequence[Pair], **others: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, as `nn.Conv` calls it for maps and without dilations and groups."""
    del others
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return _conv(x, kernel, strides=tuple(strides), padding=tuple(map(tuple, padding)))


# The layers of Flax with the convolution of this file.
Conv = functools.partial(nn.Conv, conv_general_dilated=_conv_general_dilated)
