"""How timm and the authors name the tensors of ConvNeXt, and which network a set of tensors belongs to.

timm's names are the original's here; `timm_names` brings the authors' to them.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from fcvit_jax.convert.files import is_ours
from fcvit_jax.convert.layouts import find_layout, rename, rename_paths, their_shape
from fcvit_jax.errors import UserError
from fcvit_jax.networks.convnext import ConvNeXt

# What to replace in our path, one row after the other, to get timm's name of a tensor.
NAMES = (
    (r"^stem_conv/", "stem.0."),
    (r"^stem_norm/", "stem.1."),
    (r"^downsample_(\d)_norm/", r"stages.\1.downsample.0."),
    (r"^downsample_(\d)_conv/", r"stages.\1.downsample.1."),
    (r"^stages_(\d)_block_(\d+)/", r"stages.\1.blocks.\2."),
    (r"\bdepthwise/", "conv_dw."),
    (r"\bexpand/", "mlp.fc1."),
    (r"\breduce/", "mlp.fc2."),
    (r"\blayer_scale$", "gamma"),
    (r"^norm/", "head.norm."),
    (r"^head/", "head.fc."),
    (r"(kernel|scale)$", "weight"),
    (r"/", "."),
)
# The first row found in our path counts.
LAYOUTS = (
    (r"_conv/kernel", "HWIO->OIHW"),
    (r"depthwise/kernel", "HWC->C1HW"),
    (r"kernel", "IO->OI"),
    (r"", "C->C"),
)
# What to replace in the authors' name to get timm's.
AUTHORS_NAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def original_names(shapes: Iterable[str]) -> dict[str, str]:
    """timm's name of every one of our paths."""
    return rename_paths(shapes, NAMES)


def layout(path: str) -> str:
    """How a tensor, given our path, lies in memory here and there; see `layouts`."""
    return find_layout(path, LAYOUTS)


def is_convnext(names: Iterable[str]) -> bool:
    """Whether tensors of these names (ours, timm's or the authors') are those of a ConvNeXt."""
    return any(re.search(r"(^|/)stem_conv/|^stem\.0\.weight$|^downsample_layers\.0\.0\.", name) for name in names)


def timm_names(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gives weights timm's names, whether they have timm's or the authors'."""
    if not any(name.startswith("downsample_layers.") for name in weights):
        return dict(weights)
    return {rename(name, AUTHORS_NAMES): x for name, x in weights.items()}


def infer_model(shapes: Mapping[str, tuple[int, ...]]) -> ConvNeXt:
    """Finds the network that weights belong to.

    Args:
      shapes: by timm's names (see `timm_names`) or by our paths ("params/stem_conv/kernel", ...).

    Raises:
      UserError: these are no weights of a ConvNeXt.
    """
    if is_ours(shapes):
        shapes = {name: their_shape(shapes[path], layout(path)) for path, name in original_names(shapes).items()}
    needed = ("stem.0.bias", *(f"stages.{s}.downsample.1.bias" for s in (1, 2, 3)))
    if missing := [name for name in needed if name not in shapes]:
        raise UserError(f"These are no weights of a ConvNeXt: {', '.join(missing)} not among the tensors.")
    blocks = {(int(x[1]), int(x[2])) for name in shapes if (x := re.match(r"stages\.(\d)\.blocks\.(\d+)\.", name))}
    return ConvNeXt(
        depths=tuple(1 + max((block for stage, block in blocks if stage == s), default=-1) for s in range(4)),
        dims=tuple(shapes[name][0] for name in needed),
        layer_scale_init=1e-6 if any(name.endswith(".gamma") for name in shapes) else None,
        num_classes=shapes["head.fc.weight"][0] if "head.fc.weight" in shapes else 0,
    )
