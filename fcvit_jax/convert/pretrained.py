"""A network's weights out of any file that has some for it; what the file lacks starts afresh."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fcvit_jax.convert import vit
from fcvit_jax.convert.files import is_ours, read
from fcvit_jax.convert.weights import FAMILIES, Network, fields_of, fit, infer, kind_of, with_timm_names
from fcvit_jax.devices.storage import as_path
from fcvit_jax.errors import UserError, log
from fcvit_jax.networks import mask_rcnn, semantic_fpn
from fcvit_jax.networks.convnext import ConvNeXt
from fcvit_jax.networks.fcvit import Backbone, FCViT, abstract_variables
from fcvit_jax.networks.mask_rcnn import MaskRCNN
from fcvit_jax.networks.semantic_fpn import SemanticFPN
from fcvit_jax.networks.vit import ViT


def load_pretrained(
    path: str | Path, model: Network, *, ema: bool | None = None, partial: bool = True
) -> dict[str, Any]:
    """Reads weights for a model from a file of ours or of the original.

    What the file does not hold starts afresh, always the same, and a warning says so: the classifying layer, if the
    file has another number of classes (or no head); the norms of a pyramid that is given a classifier's weights; neck
    and heads of a segmenter or a detector that is given a classifier's or a pyramid's.

    Example::

        model = create_model("fcvit_s12", num_classes=10)
        variables = load_pretrained("fcvit_b12.pth.tar", model)
        variables = load_pretrained("fcvit_b12.pth.tar", create_backbone("fcvit_s12"))
        variables = load_pretrained("fcvit_b12.pth.tar", create_segmenter("fcvit_s12"))
        variables = load_pretrained("fcvit_b12.pth.tar", create_detector("fcvit_s12"))

    Args:
      path: a .pth or .pth.tar of the original, a .npz of ours, the folder of a run or of one Orbax checkpoint, or
        weights in the layout of the Hugging Face hub: a folder, or `hf-hub:owner/name` (see `formats.hub.local`).
      model: what the weights are for.
      ema: True: the exponential moving averages; False: the plain weights; None: for a run of ours, what evaluation
        uses (the averages, if it kept them); for a file of the original, the plain weights, if it holds them.
      partial: False: nothing may start afresh, as for an evaluation.

    Returns:
      {"params": ..., "batch_stats": ...} of NumPy arrays in the model's dtypes.

    Raises:
      UserError: the file cannot be read, holds another network, has tensors that do not fit (then it lists them all),
        or does not hold the whole model, and `partial` is False.
    """
    weights = with_timm_names(read(as_path(path), ema)[0])
    held, load = kind_of(weights), _LOADERS.get(type(model), _load_classifier)
    # What is none of the others counts as an FCViT's classifier, and what does not fit is listed.
    if held not in (FCViT, *_STARTS.get(type(model), ()), type(model)):
        raise UserError(
            f"{path} holds {FAMILIES[held].description}: {FAMILIES[type(model)].description} is needed here."
        )
    variables, lack, afresh = load(path, weights, model)
    if lack and not partial:
        raise UserError(f"{path} {lack}: it does not hold the whole model, {FAMILIES[type(model)].description}.")
    if lack:
        log.warning("%s %s: %s.", path, lack, afresh)
    return variables


Loaded = tuple[dict[str, Any], str, str]  # variables; what the file lacks, as a predicate, or ""; what comes of that


def _load_classifier(path: str | Path, weights: Mapping[str, np.ndarray], model: FCViT | ViT | ConvNeXt) -> Loaded:
    theirs = "head.fc.weight" if isinstance(model, ConvNeXt) else "head.weight"
    classes = _count_classes(weights, "params/head/kernel", theirs)
    if isinstance(model, ViT):
        weights = vit.fit_positions(weights, model)
    variables = _fit(path, weights, model.clone(num_classes=classes))
    if classes == model.num_classes:
        return variables, "", ""
    params = {name: x for name, x in variables["params"].items() if name not in ("head", "head_dist")}
    rng = np.random.default_rng(0)
    for name, head in abstract_variables(model)["params"].items():
        if name not in params:
            kernel = rng.normal(0, 0.02, head["kernel"].shape).astype(model.param_dtype)
            params[name] = {"kernel": kernel, "bias": np.zeros(head["bias"].shape, model.param_dtype)}
    afresh = "the head starts afresh" if model.num_classes else "the head is left out"
    return variables | {"params": params}, f"has {classes} classes, the model {model.num_classes}", afresh


def _load_pyramid(path: str | Path, weights: Mapping[str, np.ndarray], model: Backbone) -> Loaded:
    if kind_of(weights) is Backbone:
        return _fit(path, weights, model), "", ""
    classes = _count_classes(weights, "params/head/kernel", "head.weight")
    variables = _fit(path, weights, FCViT(num_classes=classes, **fields_of(model)))
    params = {name: x for name, x in variables["params"].items() if name not in ("norm", "head")}
    for i, dim in enumerate(model.dims):
        params[f"norm_{i}"] = {"scale": np.ones(dim, model.param_dtype), "bias": np.zeros(dim, model.param_dtype)}
    return variables | {"params": params}, "holds a classifier", "the norms of the pyramid start afresh"


def _load_over_backbone(path: str | Path, weights: Mapping[str, np.ndarray], model: SemanticFPN | MaskRCNN) -> Loaded:
    """A segmenter, or a detector."""
    decoder = _DECODERS[type(model)]
    if kind_of(weights) is type(model):
        fields = {"num_classes": decoder.classes(_count_classes(weights, decoder.ours, decoder.theirs))}
        if isinstance(model, MaskRCNN):
            fields["masks"] = any(name.startswith(("params/mask_head/", "roi_head.mask_head.")) for name in weights)
        stored = model.clone(**fields)
        variables = _fit(path, weights, stored)
        if stored == model:
            return variables, "", ""
        held, fresh, lack, afresh = variables["params"], _fresh_decoder(model)["params"], [], []
        if fields["num_classes"] != model.num_classes:
            lack.append(f"has {fields['num_classes']} classes, the model {model.num_classes}")
            afresh.append(decoder.afresh)
            for head, layer in decoder.last:
                if layer in fresh.get(head, {}) and head in held:
                    held[head][layer] = fresh[head][layer]
        if "mask_head" in fresh and "mask_head" not in held:
            held["mask_head"] = fresh["mask_head"]
            lack.append("has no mask head")
            afresh.append("the mask head starts afresh")
        elif "mask_head" in held and "mask_head" not in fresh:
            del held["mask_head"]
            lack.append("has a mask head, the model none")
            afresh.append("the mask head is left out")
        return variables, " and ".join(lack), ", ".join(afresh)
    backbone, lack, _ = _load_pyramid(path, weights, model.backbone)
    fresh = _fresh_decoder(model)
    variables = {name: {"backbone": tree, **fresh.get(name, {})} for name, tree in backbone.items()}
    norms = "the norms of the pyramid, " if lack else ""
    return variables, lack or "holds a feature pyramid", f"{norms}the neck and the {decoder.heads} start afresh"


def _fit(path: str | Path, weights: Mapping[str, np.ndarray], model: Network) -> dict[str, Any]:
    """As `fit`, but a network of another size gets one line, not one a tensor."""
    try:
        return fit(weights, model)
    except UserError as error:
        if 0 in getattr(_backbone(model), "depths", ()):  # infer_model does not know such
            raise
        theirs, ours = _sizes(_inferred(weights, model)), _sizes(model)
        if theirs == ours:
            raise
        raise UserError(f"{path} holds another network than the model: {theirs}; the model has {ours}.") from error


def _inferred(weights: Mapping[str, np.ndarray], model: Network) -> Network:
    """What `infer` finds; a ViT with the heads of the model, which weights do not tell."""
    if isinstance(model, ViT) and kind_of(weights) is ViT:
        return vit.infer_model({name: x.shape for name, x in weights.items()}, model.heads)
    return infer(weights)


def _sizes(model: Network) -> str:
    model = _backbone(model)
    names = ("depth", "dim", "patch_size", "distilled") if isinstance(model, ViT) else ("depths", "dims")
    return ", ".join(f"{name} {getattr(model, name)}" for name in names)


def _backbone(model: Network) -> Network:
    return model.backbone if isinstance(model, SemanticFPN | MaskRCNN) else model


def _count_classes(weights: Mapping[str, np.ndarray], ours: str, theirs: str) -> int:
    """The outputs of the classifying layer, whose kernel is given by our path and their name; 0 if it is not there."""
    kernel, axis = (ours, -1) if is_ours(weights) else (theirs, 0)
    return weights[kernel].shape[axis] if kernel in weights and weights[kernel].ndim > 1 else 0


def _fresh_decoder(model: SemanticFPN | MaskRCNN) -> dict[str, Any]:
    """Variables of neck and heads as training from scratch would start with, always the same."""
    init = functools.partial(_DECODERS[type(model)].init, model)
    return jax.device_get(jax.jit(init)(jax.random.key(0)))


class _Decoder(NamedTuple):
    """What is known of neck and heads of a network over a backbone.

    Attributes:
      init: draws their weights.
      ours, theirs: our path and their name of the kernel whose outputs tell the classes.
      classes: the classes, of the number of these outputs.
      last: (head, layer) of the layers that depend on the classes.
      afresh: says that those start afresh.
      heads: what the heads are called.
    """

    init: Callable[..., dict[str, Any]]
    ours: str
    theirs: str
    classes: Callable[[int], int]
    last: tuple[tuple[str, str], ...]
    afresh: str
    heads: str


_DECODERS = {
    SemanticFPN: _Decoder(
        init=semantic_fpn.init_decoder,
        ours="params/head/classifier/kernel",
        theirs="decode_head.conv_seg.weight",
        classes=lambda outputs: outputs,
        last=(("head", "classifier"),),
        afresh="the classifier starts afresh",
        heads="head",
    ),
    MaskRCNN: _Decoder(
        init=mask_rcnn.init_decoder,
        ours="params/box_head/logits/kernel",
        theirs="roi_head.bbox_head.fc_cls.weight",
        classes=lambda outputs: max(outputs - 1, 1),  # without the background
        last=(("box_head", "logits"), ("box_head", "deltas"), ("mask_head", "logits")),
        afresh="the last layers of the heads start afresh",
        heads="heads",
    ),
}


# What a network can start from besides weights of its own kind and a classifier's, and how it does.
_STARTS = {SemanticFPN: (Backbone,), MaskRCNN: (Backbone,)}
_LOADERS = {Backbone: _load_pyramid, SemanticFPN: _load_over_backbone, MaskRCNN: _load_over_backbone}
