"""Weights of any network <-> the state dict of its PyTorch original."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from fcvit_jax import networks
from fcvit_jax.convert import convnext, detectors, fcvit, vit
from fcvit_jax.convert.files import as_numpy, is_ours
from fcvit_jax.convert.layouts import their_shape, to_ours, to_theirs
from fcvit_jax.errors import UserError
from fcvit_jax.networks.convnext import ConvNeXt, create_convnext
from fcvit_jax.networks.fcvit import Backbone, FCViT, abstract_variables, create_backbone, create_model
from fcvit_jax.networks.mask_rcnn import MaskRCNN, create_detector
from fcvit_jax.networks.semantic_fpn import SemanticFPN, create_segmenter
from fcvit_jax.networks.vit import ViT, create_vit

Network = FCViT | Backbone | SemanticFPN | MaskRCNN | ViT | ConvNeXt


class Family(NamedTuple):
    """What is known of the networks of one class.

    Attributes:
      description: with its article.
      create: makes a variant by its name.
      variants: its variants by name.
      names: the module that knows how the original names and lays out the tensors.
      task: what the networks are trained for, as in `config.task`.
    """

    description: str
    create: Callable[..., nn.Module]
    variants: Mapping[str, Mapping[str, Any]]
    names: ModuleType
    task: str = "classification"


_FCVITS = networks.fcvit.VARIANTS
FAMILIES = {
    FCViT: Family("a classifier", create_model, _FCVITS, fcvit),
    Backbone: Family("a feature pyramid", create_backbone, _FCVITS, fcvit),
    SemanticFPN: Family("a segmenter", create_segmenter, _FCVITS, detectors, "segmentation"),
    MaskRCNN: Family("a detector", create_detector, _FCVITS, detectors, "detection"),
    ViT: Family("a Vision Transformer", create_vit, networks.vit.VARIANTS, vit),
    ConvNeXt: Family("a ConvNeXt", create_convnext, networks.convnext.VARIANTS, convnext),
}


def kind_of(names: Iterable[str]) -> type[Network]:
    """What tensors of these names, ours or the original's, are the weights of."""
    names = list(names)
    if detectors.is_segmenter(names):
        return SemanticFPN
    if detectors.is_detector(names):
        return MaskRCNN
    if vit.is_vit(names):
        return ViT
    if convnext.is_convnext(names):
        return ConvNeXt
    return Backbone if fcvit.is_pyramid(names) else FCViT


def with_timm_names(weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Weights of a ViT or a ConvNeXt, which are published under several names, by timm's; all others as they are."""
    kind = kind_of(weights)
    return weights if is_ours(weights) or kind not in (ViT, ConvNeXt) else FAMILIES[kind].names.timm_names(weights)


def infer(weights: Mapping[str, np.ndarray]) -> Network:
    """The network that weights by the original's names or by our paths belong to; see `infer_model` of the names."""
    shapes = {name: x.shape for name, x in with_timm_names(weights).items()}
    return FAMILIES[kind_of(weights)].names.infer_model(shapes)


def abstract_weights(model: Network) -> dict[str, jax.ShapeDtypeStruct]:
    """The model's variables without values, by path: "params/stem/conv/kernel", ..."""
    return traverse_util.flatten_dict(abstract_variables(model), sep="/")


def _check(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a UserError that lists every tensor that is missing, unexpected or has another shape."""
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    problems += [f"unexpected: {name} {found[name]}" for name in found if name not in expected]
    problems += [
        f"misshaped: {name} {found[name]}, should be {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        raise UserError("\n  ".join([f"The weights do not fit the model ({len(problems)} tensors):", *problems]))


def from_torch(state_dict: Mapping[str, np.ndarray], model: Network) -> dict[str, Any]:
    """Makes our variables from a state dict of the original.

    Example::

        state_dict = torch.load("fcvit_b12.pth", weights_only=True)
        variables = from_torch(state_dict, create_model("fcvit_s12"))

    Args:
      state_dict: NumPy or PyTorch tensors by the original's names, of any float dtype; for ViTs and ConvNeXts by
        any published names. `num_batches_tracked`, on which nothing depends, is ignored.
      model: what the variables are for.

    Returns:
      {"params": ..., "batch_stats": ...} of NumPy arrays in the model's dtypes.

    Raises:
      UserError: tensors are missing, unexpected or misshaped; lists them all.
    """
    state_dict = with_timm_names(state_dict)
    abstract, layout = abstract_weights(model), FAMILIES[type(model)].names.layout
    names = FAMILIES[type(model)].names.original_names({path: x.shape for path, x in abstract.items()})
    expected = {names[path]: their_shape(x.shape, layout(path)) for path, x in abstract.items()}
    found = {name: tuple(x.shape) for name, x in state_dict.items()}
    for name in [name for name in found if name.endswith("num_batches_tracked")]:
        if name.replace("num_batches_tracked", "running_var") in expected:
            del found[name]
    _check(found, expected)
    flat = {
        path: np.array(to_ours(as_numpy(state_dict[names[path]]), layout(path), x.shape), x.dtype, order="C")
        for path, x in abstract.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def to_torch(variables: Mapping[str, Any], model: Network) -> dict[str, np.ndarray]:
    """Makes a state dict of the original from our variables; the exact inverse of `from_torch`.

    Example::

        state_dict = {name: torch.from_numpy(x) for name, x in to_torch(variables, model).items()}

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      model: what the variables are for.

    Returns:
      float32 arrays by the original's names, in no particular order; `num_batches_tracked` (int64), which has no
      counterpart here, is 0.

    Raises:
      UserError: tensors are missing, unexpected or misshaped; lists them all.
    """
    flat = traverse_util.flatten_dict(variables, sep="/")
    shapes = {path: x.shape for path, x in abstract_weights(model).items()}
    _check({path: tuple(x.shape) for path, x in flat.items()}, shapes)
    state_dict = {}
    for path, name in FAMILIES[type(model)].names.original_names(shapes).items():
        x = to_theirs(np.asarray(flat[path]), FAMILIES[type(model)].names.layout(path))
        state_dict[name] = np.array(x, np.float32, order="C")
        if name.endswith("running_var"):
            state_dict[name.replace("running_var", "num_batches_tracked")] = np.array(0, np.int64)
    return state_dict


def fit(weights: Mapping[str, np.ndarray], model: Network) -> dict[str, Any]:
    """The model's variables of weights by the original's names or by our paths."""
    if not is_ours(weights):
        return from_torch(weights, model)
    abstract = abstract_weights(model)
    _check({path: x.shape for path, x in weights.items()}, {path: x.shape for path, x in abstract.items()})
    return traverse_util.unflatten_dict({path: weights[path].astype(x.dtype) for path, x in abstract.items()}, sep="/")


def fields_of(model: Network) -> dict[str, Any]:
    """The fields of a model, with those of its backbone among them."""
    names = (field.name for field in dataclasses.fields(model) if field.name not in ("name", "parent"))
    fields = {name: getattr(model, name) for name in names}
    return (fields_of(fields.pop("backbone")) if "backbone" in fields else {}) | fields
