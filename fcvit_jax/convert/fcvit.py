"""How the original names and lays out every tensor, and which network a set of tensors belongs to."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from fcvit_jax.convert.files import is_ours
from fcvit_jax.convert.layouts import find_layout, rename_paths, their_shape
from fcvit_jax.errors import UserError
from fcvit_jax.networks.fcvit import Backbone, FCViT

# What to replace in our path, one row after the other, to get the original's name of a tensor.
NAMES = (
    *((rf"^stages_{s}_block_(\d+)/", rf"network.{2 * s}.\1.") for s in range(4)),
    *((rf"^downsample_{s}/", f"network.{2 * s - 1}.") for s in range(1, 4)),
    *((rf"^norm_{s}/", f"norm{2 * s}.") for s in range(4)),
    (r"^stem/", "patch_embed."),
    (r"\bconv/", "proj."),
    (r"layer_scale(\d)", r"layer_scale_\1"),
    (r"context(\d)/scale", r"gc\1.rescale_weight"),
    (r"context(\d)/bias", r"gc\1.rescale_bias"),
    (r"context(\d)/reduce/", r"gc\1.fc1."),
    (r"context(\d)/expand/", r"gc\1.fc2."),
    (r"depthwise(\d)/", r"dw\1."),
    (r"reduce(\d)/", r"fc\1.0."),
    (r"expand(\d)/", r"fc\1.2."),
    (r"spatial_attention/depthwise/", "spatial_att.spatial_att.0."),
    (r"spatial_attention/reduce/", "spatial_att.spatial_att.1."),
    (r"spatial_attention/expand/", "spatial_att.spatial_att.3."),
    (r"channel_attention/conv", "channel_att.channelConv"),
    (r"channel_mixer/expand/", "channel_mixer.fc1."),
    (r"channel_mixer/depthwise/", "channel_mixer.dwconv."),
    (r"channel_mixer/reduce/", "channel_mixer.fc2."),
    (r"(kernel|scale)$", "weight"),
    (r"(mean|var)$", r"running_\1"),
    (r"/", "."),
)
# Two options change names; these rows then follow.
NAMES_WITHOUT_COMPETITION = ((r"(gc\d)\.fc1", r"\1.fc.0"), (r"(gc\d)\.fc2", r"\1.fc.2"))
NAMES_WITHOUT_BOTTLENECK = ((r"(token_mixer\.fc\d)\.2", r"\1"),)

# Axes of our tensor -> axes of the original's, 1 being an axis of length 1. The first row found in our path counts.
LAYOUTS = (
    (r"(stem|downsample_\d)/conv/kernel", "HWIO->OIHW"),
    (r"depthwise\d?/kernel", "HWC->C1HW"),
    (r"conv\d/kernel", "WIO->OIW"),
    (r"(head|context\d/\w+)/kernel", "IO->OI"),
    (r"kernel", "IO->OI11"),
    (r"", "C->C"),
)


def original_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The original's name of every one of our paths, given their shapes (from which two options are read off)."""
    bottleneck = any("token_mixer/reduce" in path for path in shapes)
    competition = any(
        re.search(r"context\d/reduce/kernel", path)
        and shape[1:] == tuple(2 * n for n in shapes.get(path.replace("reduce", "expand"), ())[:1])
        for path, shape in shapes.items()
    )
    rows = (
        *NAMES,
        *(() if competition else NAMES_WITHOUT_COMPETITION),
        *(() if bottleneck else NAMES_WITHOUT_BOTTLENECK),
    )
    return rename_paths(shapes, rows)


def layout(path: str) -> str:
    """How a tensor, given our path, lies in memory here and there; see `layouts`."""
    return find_layout(path, LAYOUTS)


def infer_model(shapes: Mapping[str, tuple[int, ...]]) -> FCViT | Backbone:
    """Finds the network that weights belong to; tensors that do not fit the rest are outvoted, not refused.

    What shapes do not determine keeps its default and changes no output: the heads of an unweighted context,
    `mix_reduction` against `mix_min_dim`, and what acts only in training.

    Args:
      shapes: by the original's names or by our paths ("params/stem/conv/kernel", ...).

    Raises:
      UserError: these are no weights of an FCViT.
    """
    if is_ours(shapes):
        kept = {path: shape for path, shape in shapes.items() if len(shape) == layout(path).index("->")}
        shapes = {name: their_shape(kept[path], layout(path)) for path, name in original_names(kept).items()}

    def find(pattern: str, axis: int = 0) -> list[int]:
        """The length of an axis in every tensor whose name starts with the pattern."""
        return [shape[axis] for name, shape in shapes.items() if re.match(pattern, name) and len(shape) > abs(axis)]

    def vote(pattern: str, axis: int = 0) -> int | None:
        lengths = Counter(find(pattern, axis))
        return lengths.most_common(1)[0][0] if lengths else None

    blocks = [re.match(r"network\.(\d+)\.(\d+)\.", name) for name in shapes]
    blocks = {(int(found[1]) // 2, int(found[2])) for found in blocks if found}
    stages = range(1 + max((s for s, _ in blocks), default=-1))
    depths = [1 + max((b for stage, b in blocks if stage == s), default=-1) for s in stages]
    dims = [vote(rf"network\.{2 * s}\.\d+\.(norm\d|channel_mixer\.fc2\.bias)") for s in stages]
    hidden = [vote(rf"network\.{2 * s}\.\d+\.channel_mixer\.fc1\.") for s in stages]
    if not dims or not all(dims) or not all(hidden):
        raise UserError("These are no weights of an FCViT: the blocks of its stages are not among the tensors.")

    mixer = r"network\.\d+\.\d+\.token_mixer"
    fields = {
        "depths": tuple(depths),
        "dims": tuple(dims),
        "mlp_ratios": tuple(max(h // dim, 1) for h, dim in zip(hidden, dims, strict=True)),
        "kernel_sizes": tuple(k for i in range(1, 10) if (k := vote(rf"{mixer}\.dw{i}\.weight", -1))),
        "use_context": bool(find(rf"{mixer}\.gc")),
        "mlp_kernel_size": vote(r"network\.\d+\.\d+\.channel_mixer\.dwconv\.weight", -1),
        "spatial_attention": bool(find(rf"{mixer}\.spatial_att")),
        "channel_attention": bool(find(r"network\.\d+\.\d+\.channel_mixer\.channel_att")),
    }
    if not find(r"network\.\d+\.\d+\.layer_scale"):
        fields["layer_scale_init"] = None
    reductions = (8, *range(2, max(dims) + 1))
    if fields["use_context"]:
        fields["competition"] = bool(find(rf"{mixer}\.gc\d\.fc1\."))
        fields["weighted_context"] = bool(find(rf"{mixer}\.gc\d\.rescale"))
        fields["context_heads"] = vote(rf"{mixer}\.gc\d\.rescale") or 8
        hidden = [vote(rf"network\.{2 * s}\.\d+\.token_mixer\.gc\d\.fc\.?2\.weight", 1) for s in stages]
        fits = (r for r in (*reductions, 1) if [dim // r for dim in dims] == hidden)
        fields["context_reduction"] = next(fits, 8)
    hidden = [vote(rf"network\.{2 * s}\.\d+\.token_mixer\.fc\d\.0\.") for s in stages]
    if any(hidden):
        least = min(h for h in hidden if h)
        fits = ((r, m) for r in reductions for m in (16, least) if [max(dim // r, m) for dim in dims] == hidden)
        fields["mix_reduction"], fields["mix_min_dim"] = next(fits, (8, 16))
    else:
        fields["mix_reduction"] = 1
    if is_pyramid(shapes):
        return Backbone(**fields)
    return FCViT(num_classes=vote(r"head\.") or 0, **fields)


def is_pyramid(names: Iterable[str]) -> bool:
    """Whether tensors of these names, ours or the original's, are a feature pyramid's."""
    return any(re.match(r"params/norm_\d/|norm\d\.", name) for name in names)
