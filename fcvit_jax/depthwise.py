"""The depthwise convolution: one op, several implementations, chosen by platform and size.

Forward, input gradient and weight gradient are three bilinear maps, each the derivative of the others, so a rule
written in terms of the same two functions gives derivatives of every order in reverse mode.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

IMPLS = ("lax", "shift")


def depthwise_conv(x, kernel, impl=None):
    """Convolve every channel with its own k x k filter, stride 1, zero padding k // 2.

    Args:
      x: (N, H, W, C), float32 or bfloat16.
      kernel: (k, k, C), k odd; sums are taken in float32 whatever the dtype.
      impl: one of `IMPLS` for all three passes, or None: the best for the platform the program is lowered for.

    Returns:
      (N, H, W, C), dtype of x. Reverse mode works to any order; forward mode raises JAX's TypeError.

    Raises:
      ValueError: wrong rank, even k, another number of channels, unknown impl.
    """
    if x.ndim != 4 or kernel.ndim != 3 or kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
        raise ValueError(f"expected x (N, H, W, C) and kernel (k, k, C) with odd k, got {x.shape} and {kernel.shape}")
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(f"x has {x.shape[3]} channels, the kernel {kernel.shape[2]}")
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl {impl!r} is not one of {IMPLS}")
    # Taps that only ever meet the padding of a small map need no work.
    rows, cols = (max(0, kernel.shape[0] // 2 - size + 1) for size in x.shape[1:3])
    kernel = kernel[rows : kernel.shape[0] - rows, cols : kernel.shape[1] - cols]
    return _conv(x, kernel, impl)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, kernel, impl):
    if impl is not None:
        return _CONV[impl](x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_CONV["shift"], default=_CONV["lax"])


def _conv_fwd(x, kernel, impl):
    return _conv(x, kernel, impl), (x, kernel)


def _conv_bwd(impl, residuals, g):
    x, kernel = residuals
    return _conv(g, kernel[::-1, ::-1], impl), _weight_grad(x, g, kernel.shape[:2], impl).astype(kernel.dtype)


_conv.defvjp(_conv_fwd, _conv_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _weight_grad(x, g, window, impl):
    """sum over n, h, w of x[n, h + i - p, w + j - p, c] * g[n, h, w, c], in float32."""
    if impl is not None:
        return _WEIGHT_GRAD[impl](x, g, window)
    cpu, default = (partial(_WEIGHT_GRAD[name], window=window) for name in ("shift", "lax"))
    return lax.platform_dependent(x, g, cpu=cpu, default=default)


def _weight_grad_fwd(x, g, window, impl):
    return _weight_grad(x, g, window, impl), (x, g)


def _weight_grad_bwd(window, impl, residuals, t):
    x, g = residuals
    return _conv(g, t[::-1, ::-1], impl).astype(x.dtype), _conv(x, t, impl).astype(g.dtype)


_weight_grad.defvjp(_weight_grad_fwd, _weight_grad_bwd)


def _lax(x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None].astype(x.dtype),
        (1, 1),
        [(size // 2, size // 2) for size in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )


def _lax_weight_grad(x, g, window):
    kernel = jax.ShapeDtypeStruct((*window, x.shape[3]), x.dtype)
    return jax.linear_transpose(partial(_lax, x), kernel)(g)[0].astype(jnp.float32)


def _pad(x, window):
    rows, cols = window[0] // 2, window[1] // 2
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (rows, rows), (cols, cols), (0, 0)))


def _shift(x, kernel):
    """A sum of shifted products: a loop over the rows of the kernel, whose body is one fused pass over the map."""
    height, width = x.shape[1:3]
    padded, kernel = _pad(x, kernel.shape[:2]), kernel.astype(jnp.float32)

    def add_row(i, total):
        rows, taps = lax.dynamic_slice_in_dim(padded, i, height, 1), kernel[i]
        return total + sum(rows[:, :, j : j + width] * taps[j] for j in range(kernel.shape[1]))

    return lax.fori_loop(0, kernel.shape[0], add_row, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def _shift_weight_grad(x, g, window):
    height, width = x.shape[1:3]
    padded, g = _pad(x, window), g.astype(jnp.float32)

    def row(i):
        rows = lax.dynamic_slice_in_dim(padded, i, height, 1)
        return jnp.stack([(rows[:, :, j : j + width] * g).sum((0, 1, 2)) for j in range(window[1])])

    return lax.map(row, jnp.arange(window[0]))


_CONV = {"lax": _lax, "shift": _shift}
_WEIGHT_GRAD = {"lax": _lax_weight_grad, "shift": _shift_weight_grad}
