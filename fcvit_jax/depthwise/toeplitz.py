"""The depthwise convolution as products with banded (Toeplitz) matrices, for the matrix units of TPUs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fcvit_jax.depthwise.spread import per_device, summed_over_devices

LANES = 128  # rows and columns of a TPU's matrix unit


def _tiles(shape: tuple[int, ...], window: tuple[int, int]) -> tuple[int, int, int]:
    """Rows per tile (about `LANES` positions), tiles per map, and how many tiles away a tap reaches."""
    height, width = shape[1:3]
    tiles = -(-height // max(1, LANES // width))
    rows = -(-height // tiles)
    return rows, tiles, min(tiles - 1, -(-(window[0] // 2) // rows))


def _to_tiles(x: jax.Array, rows: int, tiles: int) -> jax.Array:
    """(N, H, W, C) to (N, tiles, C * rows * W)."""
    n, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, tiles * rows - height), (0, 0), (0, 0)))
    return x.reshape(n, tiles, rows * width, channels).swapaxes(2, 3).reshape(n, tiles, channels * rows * width)


def _bands(rows: int, reach: int, width: int, window: tuple[int, int], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """One-hot arrays (q, a, b, i) and (v, w, j).

    The first is 1 where tap i goes from row a of the tile that is q away to row b. The second is 1 where tap j goes
    from column v to column w.
    """
    q, a, b = jnp.ogrid[-reach : reach + 1, :rows, :rows]
    v, w = jnp.ogrid[:width, :width]
    i, j = q * rows + a - b + window[0] // 2, v - w + window[1] // 2
    return jax.nn.one_hot(i, window[0], dtype=dtype), jax.nn.one_hot(j, window[1], dtype=dtype)


@jax.jit
def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies each channel's tiles of whole rows by the banded (Toeplitz) matrices that go from tile to tile."""

    def conv(x, kernel):
        n, height, width, channels = x.shape
        rows, tiles, reach = _tiles(x.shape, kernel.shape)
        row_bands, col_bands = _bands(rows, reach, width, kernel.shape[:2], x.dtype)
        by_rows = jnp.einsum("qabi,ijc->qabjc", row_bands, kernel.astype(x.dtype))
        matrices = jnp.einsum("qabjc,vwj->qavcbw", by_rows, col_bands)
        y = lax.conv_general_dilated(
            _to_tiles(x, rows, tiles),
            matrices.reshape(2 * reach + 1, rows * width, -1),
            window_strides=(1,),
            padding=[(reach, reach)],
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=channels,
        )
        y = y.reshape(n, tiles, channels, rows * width).swapaxes(2, 3)
        return y.reshape(n, tiles * rows, width, channels)[:, :height]

    # If XLA partitioned this, devices would exchange the matrices, which are much larger than the filters.
    return per_device(conv, x, kernel)


@partial(jax.jit, static_argnames="window")
def weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    """Computes the gradient of the matrices and sums it along their bands."""

    def taps(x, g):
        width, channels = x.shape[2:]
        rows, tiles, reach = _tiles(x.shape, window)
        row_bands, col_bands = _bands(rows, reach, width, window, jnp.float32)
        matrices = lax.conv_general_dilated(
            _to_tiles(x, rows, tiles),
            _to_tiles(g, rows, tiles),
            window_strides=(1,),
            padding=[(reach, reach)],
            dimension_numbers=("CHN", "IHO", "HNC"),
            batch_group_count=channels,
            preferred_element_type=jnp.float32,
        )
        matrices = matrices.reshape(2 * reach + 1, rows, width, channels, rows, width)
        by_rows = jnp.einsum("qavcbw,vwj->qabjc", matrices, col_bands, precision="highest")
        return jnp.einsum("qabjc,qabi->ijc", by_rows, row_bands, precision="highest")

    return summed_over_devices(taps, x, g)
