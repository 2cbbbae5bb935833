"""Computes for a few boxes of every image after the others, since all at once would not fit in memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def in_chunks(function: Callable[..., jax.Array], size: int, *arrays: jax.Array) -> jax.Array:
    """Applies a function to chunks of the places that images have, one chunk after the other.

    Args:
      function: of arrays (N, size, ...); returns (N, size, ...).
      size: the most places of an image in a chunk. All have the same number, the last is filled up with zeros.
      *arrays: (N, R, ...).

    Returns:
      (N, R, ...): what the function gives for all places.
    """
    number = arrays[0].shape[1]
    chunks = max(-(-number // size), 1)
    size = -(-number // chunks)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * size - number), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(len(x), chunks, size, *x.shape[2:]).swapaxes(0, 1)

    out = jax.lax.map(lambda chunk: function(*chunk), tuple(map(split, arrays))).swapaxes(0, 1)
    return out.reshape(len(out), chunks * size, *out.shape[3:])[:, :number]
