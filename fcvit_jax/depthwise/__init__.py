"""The depthwise convolution: one op, several implementations, chosen by platform and size.

Forward, input gradient and weight gradient are bilinear maps, each the derivative of another, so the two rules below
give derivatives of every order in reverse mode. The choices in `_cpu_impl` and `_cuda_impl` come from
`benchmarks/depthwise.py`, that in `_tpu_impl` from `benchmarks/tpu_schedule.py`; figures are in docs/performance.md.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fcvit_jax.depthwise import loops, primitives, toeplitz
from fcvit_jax.depthwise.primitives import vary_alike

IMPLS = ("lax", "shift", "banded", "toeplitz", "pallas")

_TPU_TAPS = 25  # of the smallest filter for which the matrix units are faster
_GPU_TAPS = 9  # of the smallest filter for which GPUs use the kernels; 3x3 is the smallest that was timed


def depthwise_conv(x: jax.Array, kernel: jax.Array, impl: str | None = None) -> jax.Array:
    """Convolves every channel with its own k x k filter: stride 1, zero padding k // 2, no bias.

    Example::

        depthwise_conv(jnp.ones((2, 56, 56, 32)), jnp.ones((11, 11, 32))).shape                     # (2, 56, 56, 32)

    Args:
      x: (N, H, W, C), float32 or bfloat16.
      kernel: (k, k, C), odd k; any float dtype, which its gradient shares. Sums are taken in float32.
      impl: one of `IMPLS` for all passes, or None for the best on the platform that the program is lowered for.
        "pallas" is as "lax" where no CUDA GPU is at hand, and in a program for several devices without its mesh in
        context (`jax.set_mesh`).

    Returns:
      (N, H, W, C), dtype of x. Reverse mode works to any order; forward mode raises JAX's TypeError for custom_vjp.

    Raises:
      ValueError: shapes that do not fit, even k, x without a float dtype, unknown impl.
    """
    if x.ndim != 4 or kernel.ndim != 3 or kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
        raise ValueError(f"expected x (N, H, W, C) and kernel (k, k, C) with odd k, got {x.shape} and {kernel.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected x of a float dtype, got {x.dtype}")
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(f"x has {x.shape[3]} channels, the kernel has {kernel.shape[2]}")
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}, choose one of {IMPLS}")
    x, kernel = vary_alike(x, kernel)
    # Taps that only ever meet the padding of a small map need no work.
    rows, cols = (max(0, kernel.shape[0] // 2 - size + 1) for size in x.shape[1:3])
    return _conv(x, kernel[rows : kernel.shape[0] - rows, cols : kernel.shape[1] - cols], impl)


def _cpu_impl(shape: tuple[int, ...], window: tuple[int, int]) -> str:
    """The fastest on a CPU: the one whose loop is shorter, over positions or over taps."""
    return "banded" if shape[1] * shape[2] <= window[0] * window[1] else "shift"


def _tpu_impl(shape: tuple[int, ...], window: tuple[int, int]) -> str:
    """The faster on a TPU by its compiler's schedules: the matrix units, unless filters are small or rows long."""
    return "toeplitz" if window[0] * window[1] >= _TPU_TAPS and shape[2] <= toeplitz.LANES else "lax"


def _cuda_impl(shape: tuple[int, ...], window: tuple[int, int]) -> str:
    """The faster on a CUDA GPU: the kernels, unless filters are small."""
    return "pallas" if window[0] * window[1] >= _GPU_TAPS else "lax"


_CHOICES = {"cpu": _cpu_impl, "cuda": _cuda_impl, "tpu": _tpu_impl}


def _choose(impls: dict[str, Callable], impl: str | None, x: jax.Array, other: jax.Array, window: tuple[int, int]):
    """Runs one of `impls`, that for the platform if `impl` is None."""
    if impl is not None:
        return impls[impl](x, other)
    by_platform = {platform: impls[choice(x.shape, window)] for platform, choice in _CHOICES.items()}
    return lax.platform_dependent(x, other, **by_platform, default=impls["lax"])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, impl: str | None) -> jax.Array:
    return _choose(_FORWARD, impl, x, kernel, kernel.shape[:2])


def _conv_fwd(x, kernel, impl):
    return _conv(x, kernel, impl), (x, kernel)


def _conv_bwd(impl, residuals, g):
    x, kernel = residuals
    return _conv(g, kernel[::-1, ::-1], impl), _weight_grad(x, g, kernel.shape[:2], impl).astype(kernel.dtype)


_conv.defvjp(_conv_fwd, _conv_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int], impl: str | None) -> jax.Array:
    """Sum x[n, h + i - p, w + j - p, c] * g[n, h, w, c] over n, h, w: (*window, C) in float32."""
    return _choose({name: partial(f, window=window) for name, f in _WEIGHT_GRAD.items()}, impl, x, g, window)


def _weight_grad_fwd(x, g, window, impl):
    return _weight_grad(x, g, window, impl), (x, g)


def _weight_grad_bwd(window, impl, residuals, t):
    x, g = residuals
    return _conv(g, t[::-1, ::-1], impl).astype(x.dtype), _conv(x, t, impl).astype(g.dtype)


_weight_grad.defvjp(_weight_grad_fwd, _weight_grad_bwd)


_FORWARD = {
    "lax": loops.lax_forward,
    "shift": loops.shift_forward,
    "banded": loops.banded_forward,
    "toeplitz": toeplitz.forward,
    "pallas": primitives.pallas_forward,
}
_WEIGHT_GRAD = {
    "lax": loops.lax_weight_grad,
    "shift": loops.shift_weight_grad,
    "banded": loops.shift_weight_grad,
    "toeplitz": toeplitz.weight_grad,
    "pallas": primitives.pallas_weight_grad,
}
