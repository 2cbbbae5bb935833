"""Checks of what users give to the networks: images and fields."""

import dataclasses
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.errors import UserError, check_range


def check_images(images: jax.Array) -> None:
    """Checks that images are (N, H, W, 3) floats.

    Raises:
      UserError: they are no such array, or have their channels first.
    """
    channels_first = images.shape[1:2] == (3,) != images.shape[3:]
    if images.ndim != 4 or channels_first or not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"Images must be (N, H, W, 3) floats, as fcvit_jax.normalize makes of uint8, not "
            f"{images.dtype} {images.shape}."
        )


def check_counts(low: int, **counts: Any) -> None:
    """Checks fields that are whole numbers.

    Args:
      low: the least that they may be.
      **counts: the numbers by the names of the fields.

    Raises:
      UserError: naming the first that is no whole number or less than `low`.
    """
    for name, count in counts.items():
        if not isinstance(count, Integral):
            raise UserError(f"model.{name}={count!r} must be a whole number.")
        check_range("model", low, below=2**20 + 1, **{name: count})


def check_tuples(low: int, **tuples: Any) -> None:
    """Checks fields that are tuples of whole numbers.

    Args:
      low: the least that a number may be.
      **tuples: the tuples by the names of the fields.

    Raises:
      UserError: naming the first that is no tuple, is empty, or holds a number that `check_counts` refuses.
    """
    for name, counts in tuples.items():
        if not isinstance(counts, tuple) or not counts:
            raise UserError(f"model.{name}={counts!r} must be a tuple of whole numbers.")
        for count in counts:
            check_counts(low, **{name: count})
        if name == "depths":
            check_range("model", low, below=1000, depths=max(counts))  # each block is traced


def check_dtypes(model: nn.Module) -> None:
    """Checks the fields `dtype` and `param_dtype`.

    Raises:
      UserError: one is neither float32 nor bfloat16.
    """
    for name in ("dtype", "param_dtype"):
        try:
            supported = jnp.dtype(getattr(model, name)) in (jnp.float32, jnp.bfloat16)
        except TypeError:  # no dtype at all
            supported = False
        if not supported:
            raise UserError(f"model.{name}={getattr(model, name)!r} is not supported: choose float32 or bfloat16.")


def check_switches(model: nn.Module) -> None:
    """Checks the fields that are on or off, and the start of the layer scales.

    Raises:
      UserError: one is neither True nor False; or the start is neither None nor a number from 0 up.
    """
    for field in dataclasses.fields(model):
        value = getattr(model, field.name, None)
        if field.type in (bool, "bool") and not isinstance(value, bool):
            raise UserError(f"model.{field.name}={value!r} must be True or False.")
    if model.layer_scale_init is not None:
        check_range("model", 0, layer_scale_init=model.layer_scale_init)
