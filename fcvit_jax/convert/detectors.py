"""How MMSegmentation and MMDetection name and lay out the tensors of a segmenter and of a detector.

And which segmenter or detector a set of tensors belongs to.
"""

import re
from collections.abc import Iterable, Mapping

from fcvit_jax.convert import fcvit
from fcvit_jax.convert.files import is_ours
from fcvit_jax.convert.layouts import find_layout, rename_paths, their_shape
from fcvit_jax.errors import UserError
from fcvit_jax.networks.fcvit import Backbone
from fcvit_jax.networks.mask_rcnn import MaskRCNN
from fcvit_jax.networks.semantic_fpn import SemanticFPN

# What to replace in our path, one row after the other, to get the name of a tensor outside the backbone.
NAMES = (
    (r"^neck/lateral_(\d)/", r"neck.lateral_convs.\1.conv."),
    (r"^neck/output_(\d)/", r"neck.fpn_convs.\1.conv."),
    # Theirs counts the doublings among the steps.
    *((rf"^head/level_(\d)_step_{j}/", rf"decode_head.scale_heads.\1.{2 * j}.") for j in range(3)),
    (r"^head/classifier/", "decode_head.conv_seg."),
    (r"^rpn/conv/", "rpn_head.rpn_conv."),
    (r"^rpn/logits/", "rpn_head.rpn_cls."),
    (r"^rpn/deltas/", "rpn_head.rpn_reg."),
    (r"^box_head/hidden_(\d)/", r"roi_head.bbox_head.shared_fcs.\1."),
    (r"^box_head/logits/", "roi_head.bbox_head.fc_cls."),
    (r"^box_head/deltas/", "roi_head.bbox_head.fc_reg."),
    (r"^mask_head/conv_(\d)/", r"roi_head.mask_head.convs.\1.conv."),
    (r"^mask_head/doubling/", "roi_head.mask_head.upsample."),
    (r"^mask_head/logits/", "roi_head.mask_head.conv_logits."),
    (r"\bnorm/", "bn."),
    (r"(kernel|scale)$", "weight"),
    (r"(mean|var)$", r"running_\1"),
    (r"/", "."),
)
# The first row found in our path counts; what none is found in belongs to the backbone.
LAYOUTS = (
    (r"box_head/hidden_0/kernel", "HWIO->O(IHW)"),
    (r"box_head/\w+/kernel", "IO->OI"),
    (r"mask_head/doubling/kernel", "HWIO->IOHW"),
    (r"(/(conv|output_\d|conv_\d)|rpn/\w+)/kernel", "HWIO->OIHW"),
    (r"/(lateral_\d|classifier|logits)/kernel", "IO->OI11"),
    (r"", "C->C"),
)
BACKBONE = re.compile(r"(?<=/)backbone/")


def original_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """MMSegmentation's or MMDetection's name of every one of our paths, given their shapes."""
    backbone = {path: BACKBONE.sub("", path) for path in shapes if BACKBONE.search(path)}
    names = fcvit.original_names({inner: shapes[path] for path, inner in backbone.items()})
    found = rename_paths(shapes, NAMES)
    return found | {path: f"backbone.{names[inner]}" for path, inner in backbone.items()}


def layout(path: str) -> str:
    """How a tensor, given our path, lies in memory here and there; see `layouts`."""
    if BACKBONE.search(path):
        return fcvit.layout(BACKBONE.sub("", path))
    return find_layout(path, LAYOUTS)


def infer_model(shapes: Mapping[str, tuple[int, ...]]) -> SemanticFPN | MaskRCNN:
    """Finds the segmenter or detector that weights belong to, as `fcvit.infer_model` finds the backbone.

    Args:
      shapes: by MMSegmentation's or MMDetection's names or by our paths ("params/backbone/stem/conv/kernel", ...).

    Raises:
      UserError: these are no weights of a segmenter or a detector over an FCViT.
    """
    if is_ours(shapes):
        kept = {path: shape for path, shape in shapes.items() if len(shape) == layout(path).index("->")}
        shapes = {name: their_shape(kept[path], layout(path)) for path, name in original_names(kept).items()}
    prefix = "backbone."
    backbone = fcvit.infer_model({name[len(prefix) :]: x for name, x in shapes.items() if name.startswith(prefix)})
    if is_detector(shapes):
        return _infer_detector(shapes, backbone)
    try:
        num_classes, head_channels = shapes["decode_head.conv_seg.weight"][:2]
        neck_channels = shapes["neck.fpn_convs.0.conv.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError("These are no weights of a segmenter: its neck or its classifier is not among them.") from error
    return SemanticFPN(backbone, num_classes, neck_channels, head_channels)


def _infer_detector(shapes: Mapping[str, tuple[int, ...]], backbone: Backbone) -> MaskRCNN:
    try:
        outputs, box_channels = shapes["roi_head.bbox_head.fc_cls.weight"]
        neck_channels = shapes["neck.fpn_convs.0.conv.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError("These are no weights of a detector: its neck or its box head is not among them.") from error
    masks = any(name.startswith("roi_head.mask_head.") for name in shapes)
    return MaskRCNN(backbone, outputs - 1, neck_channels, box_channels, masks)


def is_detector(names: Iterable[str]) -> bool:
    """Whether tensors of these names, ours or MMDetection's, are a detector's."""
    return any(re.match(r"params/box_head/|roi_head\.", name) for name in names)


def is_segmenter(names: Iterable[str]) -> bool:
    """Whether tensors of these names, ours or MMSegmentation's, are a segmenter's."""
    return any(re.match(r"params/head/(level|classifier)|decode_head\.", name) for name in names)
