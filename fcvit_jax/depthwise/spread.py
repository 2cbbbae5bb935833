"""Runs a function on every device of the mesh in context, each with its own images."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec as P


def _batch_axes(x: jax.Array) -> tuple[str, ...]:
    """The axes of the mesh in context over which a batch can be split evenly; none without a mesh or on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in mesh.auto_axes if mesh.shape[axis] > 1)
    return axes if axes and x.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def per_device(function: Callable[[Any, Any], Any], rows: Any, shared: Any) -> Any:
    """Computes on each device for its own images. Falls back to a single computation if they cannot be split evenly.

    Args:
      function: of rows and shared; returns a pytree of arrays (N, ...).
      rows: pytree of arrays (N, ...), such as images.
      shared: pytree of arrays that all images share, such as a kernel.
    """
    if not (axes := _batch_axes(jax.tree.leaves(rows)[0])):
        return function(rows, shared)
    own = {"in_specs": (P(axes), P()), "out_specs": P(axes), "axis_names": set(axes), "check_vma": False}
    return jax.shard_map(function, **own)(rows, shared)


def summed_over_devices(function: Callable[..., Any], *rows: jax.Array) -> Any:
    """Computes sums over a batch on each device from its own rows, then sums over devices.

    Falls back to a single computation if the batch cannot be split evenly.

    Args:
      function: of arrays (n, ...), such as a weight gradient of images; returns a pytree of sums over the n rows.
      *rows: arrays (N, ...).
    """
    if not (axes := _batch_axes(rows[0])):
        return function(*rows)
    own = {"in_specs": P(axes), "out_specs": P(), "axis_names": set(axes), "check_vma": False}
    return jax.shard_map(lambda *rows: lax.psum(function(*rows), axes), **own)(*rows)
