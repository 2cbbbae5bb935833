"""Folds the constants of a trained FCViT into its weights, for inference: fewer operations, the same results.

A convolution or a product over channels is linear, so a scale or a bias per channel just before it or just after it can
be part of its own weights. What is folded:

| constant | into |
|---|---|
| BatchNorm in evaluation, with its running statistics | the convolution before it: stem and downsampling |
| bias of a depthwise convolution of a token mixer | the bias of the 1x1 convolution after it |
| scale and bias of a block's second norm | the 1x1 convolution after it |
| second layer scale, unless channel attention is before it | the 1x1 convolution before it |
| scale and bias of the last norm | the classifier's head |

The other constants have an operation beside them that is not linear (GELU), or that sees the zeros of the padding.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from fcvit_jax.networks.fcvit import Backbone, FCViT

Layer = dict[str, np.ndarray]  # a kernel (..., C, D) and a bias (D,)


def fold(model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    """Folds norms, layer scales and biases of FCViT into the weights beside them.

    Example::

        fast, weights = fold(model, variables)
        logits = fast.apply(weights, images)                        # as model.apply(variables, images)

    Args:
      model: any network. FCViT as classifier, as backbone or below another network's heads is folded, others (ViT,
        ConvNeXt, and FCViT that is folded) are returned as they are.
      variables: its variables.

    Returns:
      A network of the same class, for evaluation only, and its variables, as NumPy arrays where they differ. Its
      results are those of `model` but for rounding: within 1e-5 of the largest value in float32.
    """
    if hasattr(model, "backbone"):
        backbone, inner = fold(model.backbone, {kind: tree["backbone"] for kind, tree in variables.items()})
        outer = {kind: {name: x for name, x in tree.items() if name != "backbone"} for kind, tree in variables.items()}
        both = {kind: tree | ({"backbone": inner[kind]} if kind in inner else {}) for kind, tree in outer.items()}
        return model.clone(backbone=backbone), {kind: tree for kind, tree in both.items() if tree}
    if not isinstance(model, FCViT | Backbone) or model.folded:
        return model, variables
    folded = {}
    for name, tree in variables["params"].items():
        if name == "stem" or name.startswith("downsample"):
            folded[name] = {
                "conv": _times_batch_norm(tree["conv"], tree["norm"], variables["batch_stats"][name]["norm"])
            }
        else:
            folded[name] = _fold_block(tree) if name.startswith("stages") else tree
    if "head" in folded:
        norm = folded.pop("norm")
        folded["head"] = _of_scaled(folded["head"], norm["scale"], norm["bias"])
    return model.clone(folded=True), {"params": folded}


def _fold_block(block: Mapping[str, Any]) -> dict[str, Any]:
    folded = dict(block)
    mixer = folded["token_mixer"] = dict(block["token_mixer"])
    for name, depthwise in block["token_mixer"].items():
        if step := name.partition("depthwise")[2]:
            following = f"reduce{step}" if f"reduce{step}" in mixer else f"expand{step}"
            mixer[name] = {"kernel": depthwise["kernel"]}
            mixer[following] = _of_scaled(mixer[following], np.ones(depthwise["bias"].shape), depthwise["bias"])

    mixer = folded["channel_mixer"] = dict(block["channel_mixer"])
    norm = folded.pop("norm2")
    mixer["expand"] = _of_scaled(mixer["expand"], norm["scale"], norm["bias"])
    if "layer_scale2" in block and "channel_attention" not in mixer:
        mixer["reduce"] = _scaled(mixer["reduce"], folded.pop("layer_scale2"))
    return folded


def _of_scaled(layer: Mapping[str, Any], scale: Any, bias: Any) -> Layer:
    """The layer of x that gives what `layer`, a product over channels, gives of x * scale + bias."""
    kernel = np.asarray(layer["kernel"], np.float64)
    new = {"kernel": np.asarray(scale, np.float64)[:, None] * kernel, "bias": layer["bias"] + bias @ kernel}
    return _like(layer, new)


def _scaled(layer: Mapping[str, Any], scale: Any, bias: Any = 0) -> Layer:
    """The layer that gives what `layer` gives, times `scale`, plus `bias`."""
    scale = np.asarray(scale, np.float64)
    return _like(layer, {"kernel": layer["kernel"] * scale, "bias": layer["bias"] * scale + bias})


def _times_batch_norm(conv: Mapping[str, Any], norm: Mapping[str, Any], stats: Mapping[str, Any]) -> Layer:
    factor = norm["scale"] / np.sqrt(np.asarray(stats["var"], np.float64) + 1e-5)
    return _scaled(conv, factor, norm["bias"] - stats["mean"] * factor)


def _like(layer: Mapping[str, Any], new: Mapping[str, Any]) -> Layer:
    """`new`, which is computed in float64, in the dtypes of `layer`."""
    return {name: np.asarray(new[name]).astype(layer[name].dtype) for name in ("kernel", "bias")}
