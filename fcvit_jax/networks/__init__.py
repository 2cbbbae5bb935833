"""The networks, as Flax modules, and what the tasks ask of any of them."""

import dataclasses
from typing import Any

from flax import linen as nn

from fcvit_jax.networks import fcvit
from fcvit_jax.networks.fcvit import create_model, init_variables, with_fields

__all__ = ["create_model", "init_variables", "model_fields", "settings", "traced_once", "with_fields"]


def settings(name: str) -> dict[str, Any]:
    """How a variant is trained and evaluated by its authors: "image_size", "crop_pct" and "drop_path_rate".

    Raises:
      UserError: there is no such variant.
    """
    return fcvit.SETTINGS[fcvit.variant(name)]


def model_fields(name: str) -> set[str]:
    """The arguments of `create_model` for a variant, besides its name.

    Raises:
      UserError: there is no such variant.
    """
    # `traced_once` sets share_blocks; the other two are Flax's.
    names = {field.name for field in dataclasses.fields(create_model(name))}
    return names - {"parent", "name", "share_blocks"}


def traced_once(model: nn.Module) -> nn.Module:
    """The same network, whose equal blocks are traced once: steps of training and evaluation compile faster."""
    return with_fields(model, share_blocks=True)
