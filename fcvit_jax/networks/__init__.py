"""The networks, as Flax modules, and functions that work for every classifier among them."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from flax import linen as nn

from fcvit_jax.networks import convnext, fcvit, vit
from fcvit_jax.networks.fcvit import with_fields

# The classifiers, by the module of their network, and the function that makes each of them.
_CREATE = {fcvit: fcvit.create_model, vit: vit.create_vit, convnext: convnext.create_convnext}


def _family(name: str) -> ModuleType:
    """The module of a variant's network. It is FCViT's for any unknown name, since FCViT has the original's names."""
    return next((module for module in (vit, convnext) if name in module.VARIANTS), fcvit)


def create_model(name: str, num_classes: int = 1000, **fields) -> nn.Module:
    """Makes a classifier: FCViT, ViT, DeiT or ConvNeXt.

    Example::

        model = create_model("fcvit_s12", num_classes=10, drop_path_rate=0.1, bn_group_size=128)
        model = create_model("deit_small_patch16_224")

    Args:
      name: a key of `VARIANTS` of `networks.fcvit`, `networks.vit` or `networks.convnext`; the names that the original
        gives to FCViT (fcvit_b12, ...) are accepted too.
      num_classes: outputs; 0: no head.
      **fields: attributes of `FCViT`, `ViT` or `ConvNeXt`.

    Raises:
      UserError: the name is unknown, or a value is not allowed, such as a rate of 1, an even kernel or dtype float16.
    """
    return _CREATE[_family(name)](name, num_classes, **fields)


def settings(name: str) -> dict[str, Any]:
    """How a variant is trained and evaluated by its authors: "image_size", "crop_pct" and "drop_path_rate".

    Raises:
      UserError: there is no such variant.
    """
    family = _family(name)
    return family.SETTINGS[fcvit.variant(name) if family is fcvit else name]


def model_fields(name: str) -> set[str]:
    """The arguments of `create_model` for a variant, besides its name.

    Raises:
      UserError: there is no such variant.
    """
    # share_blocks is set by `traced_once`, folded by `folded.fold`; "parent" and "name" belong to Flax.
    names = {field.name for field in dataclasses.fields(create_model(name))}
    return names - {"parent", "name", "share_blocks", "folded"}


def init_variables(
    model: nn.Module, key: jax.Array, jit: Callable = lambda function, *args: jax.jit(function)
) -> dict[str, Any]:
    """Draws the initial variables of a classifier; see `fcvit.init_variables`."""
    families = {vit.ViT: vit, convnext.ConvNeXt: convnext}
    return families.get(type(model), fcvit).init_variables(model, key, jit)


def traced_once(model: nn.Module) -> nn.Module:
    """Returns the network with `share_blocks` on: JAX traces equal blocks once, so that steps compile faster."""
    return with_fields(model, share_blocks=True)
