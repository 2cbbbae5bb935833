"""The depthwise convolution by XLA's own operation, and as loops over taps or positions, which CPUs run fast."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fcvit_jax.depthwise.spread import per_device, summed_over_devices

_TERMS = 14  # products per loop body: more would spill registers, fewer would read and write the sums too often
_CHANNELS = 16  # channels per block: few enough to keep a row of eleven taps in registers


@jax.jit
def lax_forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    # If XLA partitioned this, devices would exchange maps when `fsdp` splits the kernel.
    return per_device(lax_conv, x, kernel)


def lax_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None].astype(x.dtype),
        window_strides=(1, 1),
        padding=[(size // 2, size // 2) for size in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )


@partial(jax.jit, static_argnames="window")
def lax_weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    # XLA (in JAX 0.10 to 0.12) partitions this wrongly: with a batch split over some mesh axes, it sums over all axes.
    return summed_over_devices(partial(lax_taps, window=window), x, g)


def lax_taps(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    kernel = jnp.zeros_like(x, shape=(*window, x.shape[3]))
    return jax.linear_transpose(partial(lax_conv, x), kernel)(g)[0].astype(jnp.float32)


@jax.jit
def _correlate(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums a[n, s + t, c] * b[n, t, c] over the positions t of b, for every s that fits.

    a and b are (N, H, W, C); if one has a batch of 1, it is used for all images of the other. The loop goes over blocks
    of t. Its body is one fused, vectorised pass over the sums, so the program does not grow with b.
    """
    sizes = [a.shape[axis] - b.shape[axis] + 1 for axis in (1, 2)]
    col_blocks = -(-b.shape[2] // _TERMS)
    cols = -(-b.shape[2] // col_blocks)
    row_blocks = -(-b.shape[1] // max(1, _TERMS // cols))
    rows = -(-b.shape[1] // row_blocks)
    pad = ((0, 0), (0, row_blocks * rows - b.shape[1]), (0, col_blocks * cols - b.shape[2]), (0, 0))
    a, b = jnp.pad(a, pad), jnp.pad(b, pad)

    # XLA:CPU vectorises a fused dynamic slice only if it has one reader, so slice once per term, not once per row.
    def window(array, row, col, height, width):
        start, size = (0, row, col, 0), (array.shape[0], height, width, array.shape[3])
        return lax.dynamic_slice(array, start, size, allow_negative_indices=False)

    def add_block(block, total):
        top, left = lax.div(block, col_blocks) * rows, lax.rem(block, col_blocks) * cols
        at = [(top + row, left + col) for row in range(rows) for col in range(cols)]
        return total + sum(window(a, *t, *sizes) * window(b, *t, 1, 1) for t in at)

    images = a.shape[0] if b.shape[0] == 1 else b.shape[0]
    total = jnp.zeros_like(a, jnp.float32, (images, *sizes, a.shape[3]))
    return lax.fori_loop(0, row_blocks * col_blocks, add_block, total)


def _pad(x: jax.Array, rows: int, cols: int) -> jax.Array:
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (rows, rows), (cols, cols), (0, 0)))


def _by_channels(f: Callable[..., jax.Array], terms: int, out: jax.Array, *arrays: jax.Array) -> jax.Array:
    """Applies `f`, a sum of `terms` products, to blocks of channels (the last axis); writes the results to `out`."""
    channels = out.shape[-1]
    # XLA fuses a sum that fits one loop body with the operations around it; a loop over blocks would prevent that.
    if channels % _CHANNELS or terms <= _TERMS:
        return f(*arrays)

    def fill(i, out):
        at = {"start_index": i * _CHANNELS, "axis": -1, "allow_negative_indices": False}
        blocks = (lax.dynamic_slice_in_dim(array, slice_size=_CHANNELS, **at) for array in arrays)
        return lax.dynamic_update_slice_in_dim(out, f(*blocks), **at)

    return lax.fori_loop(0, channels // _CHANNELS, fill, out)


@jax.jit  # so that it is compiled even if the caller is not
def shift_forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Sums over the taps: a shifted copy of the padded map times a filter value. x (N, H, W, C), kernel (h, w, C)."""
    height, width = kernel.shape[:2]

    def block(x, kernel):
        return _correlate(_pad(x, height // 2, width // 2), kernel[None].astype(jnp.float32)).astype(x.dtype)

    return _by_channels(block, height * width, jnp.zeros_like(x), x, kernel)


@partial(jax.jit, static_argnames="window")
def shift_weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    """Sums each tap over the positions. Images are summed last, so a sharded batch needs one reduction."""
    height, width = window

    def block(x, g):
        return _correlate(_pad(x, height // 2, width // 2), g.astype(jnp.float32))

    total = jnp.zeros_like(x, jnp.float32, (x.shape[0], *window, x.shape[3]))
    return _by_channels(block, height * width, total, x, g).sum(0)


@jax.jit
def banded_forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies each channel's map by its banded (Toeplitz) matrix, whose rows are windows of the flipped filter."""
    height, width = x.shape[1:3]
    rows, cols = (size - 1 - taps // 2 for size, taps in zip((height, width), kernel.shape[:2], strict=True))

    def block(x, kernel):
        bands = _pad(kernel[None, ::-1, ::-1], rows, cols)
        return _correlate(bands, x[:, ::-1, ::-1].astype(jnp.float32)).astype(x.dtype)

    return _by_channels(block, height * width, jnp.zeros_like(x), x, kernel)
