"""The depthwise convolution: one op, several implementations, chosen by platform and size.

The convolution and its weight gradient are linear in each of their two inputs, and the derivatives of either are made
of both. So two operations give derivatives of every order, in forward and reverse mode.

The choices in `_cpu_impl` and `_cuda_impl` come from `benchmarks/depthwise.py`, that in `_tpu_impl` from
`benchmarks/tpu_schedule.py`; figures are in docs/performance.md.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fcvit_jax.depthwise import loops, primitives, toeplitz

IMPLS = ("lax", "shift", "banded", "toeplitz", "pallas", "cuda")

_TPU_TAPS = 25  # taps of the smallest filter for which the matrix units are faster
_GPU_TAPS = 9  # taps of the smallest filter for which GPUs use the kernels; 3x3 is the smallest that was timed


def depthwise_conv(x: jax.Array, kernel: jax.Array, impl: str | None = None) -> jax.Array:
    """Convolves every channel with its own k x k filter: stride 1, zero padding k // 2, no bias.

    Example::

        depthwise_conv(jnp.ones((2, 56, 56, 32)), jnp.ones((11, 11, 32))).shape                     # (2, 56, 56, 32)

    Args:
      x: (N, H, W, C), float32 or bfloat16.
      kernel: (k, k, C), odd k, any float dtype; its gradient has the same dtype. Sums are computed in float32.
      impl: one of `IMPLS` for all passes, or None for the best on the platform that the program is lowered for.
        "pallas" and "cuda" are kernels for CUDA GPUs; "cuda" was not run on one. They are the same as "lax" on other
        platforms, in exports, and in programs for several devices whose mesh is not in context (`jax.set_mesh`).

    Returns:
      (N, H, W, C), dtype of x. It has derivatives of every order, in forward and reverse mode.

    Raises:
      ValueError: shapes that do not fit, even k, x without a float dtype, unknown impl.
      UserError: when the program is lowered for a CUDA GPU with impl="cuda", and NVRTC is not installed.
    """
    if x.ndim != 4 or kernel.ndim != 3 or kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
        raise ValueError(f"expected x (N, H, W, C) and kernel (k, k, C) with odd k, got {x.shape} and {kernel.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected x of a float dtype, got {x.dtype}")
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(f"x has {x.shape[3]} channels, the kernel has {kernel.shape[2]}")
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}, choose one of {IMPLS}")
    # Drop the taps that only ever meet the padding of a small map.
    rows, cols = (max(0, kernel.shape[0] // 2 - size + 1) for size in x.shape[1:3])
    return _conv(x, kernel[rows : kernel.shape[0] - rows, cols : kernel.shape[1] - cols], impl=impl)


def _cpu_impl(shape: tuple[int, ...], window: tuple[int, int]) -> str:
    """The fastest on a CPU: the one with the shorter loop, over positions or over taps."""
    return "banded" if shape[1] * shape[2] <= window[0] * window[1] else "shift"


def _tpu_impl(shape: tuple[int, ...], window: tuple[int, int]) -> str:
    """The faster on a TPU, by its compiler's schedules: matrix units, unless filters are small or rows are long."""
    return "toeplitz" if window[0] * window[1] >= _TPU_TAPS and shape[2] <= toeplitz.LANES else "lax"


def _cuda_impl(shape: tuple[int, ...], window: tuple[int, int]) -> str:
    """The faster on a CUDA GPU: the kernels, unless filters are small."""
    return "pallas" if window[0] * window[1] >= _GPU_TAPS else "lax"


_CHOICES = {"cpu": _cpu_impl, "cuda": _cuda_impl, "tpu": _tpu_impl}


_FORWARD = {
    "lax": loops.lax_forward,
    "shift": loops.shift_forward,
    "banded": loops.banded_forward,
    "toeplitz": toeplitz.forward,
    "pallas": partial(primitives.kernel_forward, impl="pallas"),
    "cuda": partial(primitives.kernel_forward, impl="cuda"),
}
_WEIGHT_GRAD = {
    "lax": loops.lax_weight_grad,
    "shift": loops.shift_weight_grad,
    "banded": loops.shift_weight_grad,
    "toeplitz": toeplitz.weight_grad,
    "pallas": partial(primitives.kernel_weight_grad, impl="pallas"),
    "cuda": partial(primitives.kernel_weight_grad, impl="cuda"),
}


def _choose(impls: dict[str, Callable], impl: str | None, x: jax.Array, other: jax.Array, window: tuple[int, int]):
    """Runs `impls[impl]`; if `impl` is None, the best for the platform that the program is lowered for."""
    if impl is not None:
        return impls[impl](x, other)
    by_platform = {platform: impls[choice(x.shape, window)] for platform, choice in _CHOICES.items()}
    return lax.platform_dependent(x, other, **by_platform, default=impls["lax"])


@partial(jax.jit, static_argnames="impl")
def _compute_conv(x: jax.Array, kernel: jax.Array, *, impl: str | None) -> jax.Array:
    return _choose(_FORWARD, impl, x, kernel, kernel.shape[:2])


@partial(jax.jit, static_argnames=("window", "impl"))
def _compute_weight_grad(x: jax.Array, g: jax.Array, *, window: tuple[int, int], impl: str | None) -> jax.Array:
    return _choose({name: partial(f, window=window) for name, f in _WEIGHT_GRAD.items()}, impl, x, g, window)


def _conv_input_grad(g, x, kernel, *, impl):
    return _conv(g, kernel[::-1, ::-1], impl=impl)


def _conv_kernel_grad(g, x, kernel, *, impl):
    kernel = kernel.aval
    return _weight_grad(x, g, window=kernel.shape[:2], impl=impl).astype(kernel.dtype)


def _weight_grad_by_x(t, x, g, *, window, impl):
    return _conv(g, t[::-1, ::-1], impl=impl).astype(x.aval.dtype)


def _weight_grad_by_g(t, x, g, *, window, impl):
    return _conv(x, t, impl=impl).astype(g.aval.dtype)


def _to_channels(array: jax.Array, axis: int | None, size: int) -> jax.Array:
    """Makes the axis that `jax.vmap` maps part of the channels, each of which is convolved by itself anyway."""
    *positions, channels = array.shape if axis is None else jnp.moveaxis(array, axis, 0).shape[1:]
    array = array[..., None, :] if axis is None else jnp.moveaxis(array, axis, -2)
    return jnp.broadcast_to(array, (*positions, size, channels)).reshape(*positions, size * channels)


def _from_channels(array: jax.Array, size: int) -> tuple[jax.Array, int]:
    return array.reshape(*array.shape[:-1], size, array.shape[-1] // size), array.ndim - 1


def _batch_conv(x, kernel, x_axis, kernel_axis, *, impl):
    if kernel_axis is None:  # more images of the same filters
        xs = jnp.moveaxis(x, x_axis, 0)
        y = _conv(xs.reshape(xs.shape[0] * xs.shape[1], *xs.shape[2:]), kernel, impl=impl)
        return y.reshape(xs.shape), 0
    size = kernel.shape[kernel_axis]
    y = _conv(_to_channels(x, x_axis, size), _to_channels(kernel, kernel_axis, size), impl=impl)
    return _from_channels(y, size)


def _batch_weight_grad(x, g, x_axis, g_axis, *, window, impl):
    size = g.shape[g_axis] if x_axis is None else x.shape[x_axis]
    maps = _to_channels(x, x_axis, size), _to_channels(g, g_axis, size)
    return _from_channels(_weight_grad(*maps, window=window, impl=impl), size)


# x (N, H, W, C), kernel (h, w, C) to the sum over i, j of x[n, y + i - h // 2, z + j - w // 2, c] * kernel[i, j, c].
_conv = primitives.bilinear(
    "depthwise_conv",
    compute=_compute_conv,
    result=lambda x, kernel, impl: x,
    to_first=_conv_input_grad,
    to_second=_conv_kernel_grad,
    batch=_batch_conv,
)

# x, g (N, H, W, C) to the sum over n, y, z of x[n, y + i - h // 2, z + j - w // 2, c] * g[n, y, z, c], in float32.
_weight_grad = primitives.bilinear(
    "depthwise_weight_grad",
    compute=_compute_weight_grad,
    result=lambda x, g, window, impl: primitives.array_type(x, (*window, x.shape[3]), jnp.float32),
    to_first=_weight_grad_by_x,
    to_second=_weight_grad_by_g,
    batch=_batch_weight_grad,
)
