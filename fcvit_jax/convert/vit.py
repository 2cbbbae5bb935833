"""How timm, DeiT and Hugging Face name the tensors of a Vision Transformer, and which one a set of tensors belongs to.

timm's names are the original's here; `timm_names` brings the others to them. DeiT's files have timm's names.
"""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from fcvit_jax.convert.files import as_numpy, is_ours
from fcvit_jax.convert.layouts import find_layout, rename, rename_paths, their_shape
from fcvit_jax.errors import UserError, log
from fcvit_jax.networks.vit import ViT, resize_positions

# What to replace in our path, one row after the other, to get timm's name of a tensor.
NAMES = (
    (r"^patch_embed/", "patch_embed.proj."),
    (r"^block_(\d+)/", r"blocks.\1."),
    (r"\b(qkv|proj)/", r"attn.\1."),
    (r"\b(fc\d)/", r"mlp.\1."),
    (r"\blayer_scale(\d)$", r"ls\1.gamma"),
    (r"(kernel|scale)$", "weight"),
    (r"/", "."),
)
# The first row found in our path counts.
LAYOUTS = (
    (r"patch_embed/kernel", "HWIO->OIHW"),
    (r"kernel", "IO->OI"),
    (r"(cls|dist)_token", "C->11C"),
    (r"pos_embed", "TC->1TC"),
    (r"", "C->C"),
)
# What to replace in Hugging Face's name, without the network's prefix, to get timm's.
HUGGING_FACE_NAMES = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.mask_token", "mask_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.", ".attn."),  # query, key and value, which timm has in one
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
# Of pretraining, and without effect on tokens and logits.
UNUSED = re.compile(r"(pre_logits|pooler)\.|mask_token$")


def original_names(shapes: Iterable[str]) -> dict[str, str]:
    """timm's name of every one of our paths."""
    return rename_paths(shapes, NAMES)


def layout(path: str) -> str:
    """How a tensor, given our path, lies in memory here and there; see `layouts`."""
    return find_layout(path, LAYOUTS)


def is_vit(names: Iterable[str]) -> bool:
    """Whether tensors of these names (ours, timm's or Hugging Face's) are those of a Vision Transformer."""
    return any(re.search(r"(^|/)pos_embed$|\bembeddings\.position_embeddings$", name) for name in names)


def timm_names(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gives weights timm's names, whichever of the published names they have.

    Queries, keys and values that are apart are joined. Tensors that are of pretraining only are left out; a warning
    says so.

    Args:
      weights: NumPy or PyTorch tensors by timm's, DeiT's or Hugging Face's names (ViT, DeiT, Dinov2).
    """
    found = dict(weights)
    if any("embeddings.patch_embeddings" in name for name in weights):
        rows = ((r"^(vit|deit|dinov2)\.", ""), *HUGGING_FACE_NAMES)
        found = {rename(name, rows): x for name, x in weights.items()}
        for query in [name for name in found if ".attn.query." in name]:
            parts = [query, query.replace("query", "key"), query.replace("query", "value")]
            if all(name in found for name in parts):
                joined = np.concatenate([as_numpy(found.pop(name)) for name in parts])
                found[query.replace("query", "qkv")] = joined
    if unused := [name for name in found if UNUSED.match(name)]:
        log.warning("Left out, since only pretraining uses them: %s.", ", ".join(unused))
    return {name: x for name, x in found.items() if name not in unused}


def _check_positions(shapes: Mapping[str, tuple[int, ...]], prefix: int) -> None:
    rows = shapes["pos_embed"][-2]
    if rows > prefix and _side(rows - prefix) is None:
        reason = "is no square grid of patches behind the prefix tokens"
        if _side(rows):
            reason = "has none for the class token, as in DeiT III, which is another network"
        raise UserError(f"The position embedding, {rows} rows, {reason}: it cannot be used.")


def _prefix(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return 2 if "dist_token" in shapes else 1


def _side(patches: int) -> int | None:
    side = math.isqrt(patches)
    return side if side**2 == patches else None


def infer_model(shapes: Mapping[str, tuple[int, ...]], heads: int | None = None) -> ViT:
    """Finds the network that weights belong to.

    The mean and the standard deviation of its pixels, which no shape tells either, are ImageNet's, as DeiT has them.

    Args:
      shapes: by timm's names (see `timm_names`) or by our paths ("params/block_0/qkv/kernel", ...).
      heads: of the attention, which no shape tells; None: one for each 64 channels, as in every published network.

    Raises:
      UserError: these are no weights of a ViT, or the heads must be given.
    """
    if is_ours(shapes):
        shapes = {name: their_shape(shapes[path], layout(path)) for path, name in original_names(shapes).items()}
    depth = 1 + max((int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in shapes]:
        raise UserError(f"These are no weights of a ViT: {', '.join(missing)} not among the tensors.")
    _check_positions(shapes, _prefix(shapes))
    dim, patch = shapes["cls_token"][-1], shapes["patch_embed.proj.weight"][-1]
    if heads is None and dim % 64:
        raise UserError(
            f"The weights do not say how many heads share the {dim} channels: give the model by its fields."
        )
    return ViT(
        dim=dim,
        depth=depth,
        heads=heads or dim // 64,
        patch_size=patch,
        image_size=patch * _side(shapes["pos_embed"][1] - _prefix(shapes)),
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] // dim,
        distilled="dist_token" in shapes,
        layer_scale_init=1e-5 if "blocks.0.ls1.gamma" in shapes else None,
        num_classes=shapes["head.weight"][0] if "head.weight" in shapes else 0,
    )


def fit_positions(weights: Mapping[str, np.ndarray], model: ViT) -> dict[str, np.ndarray]:
    """Resizes the position embedding to the grid of the model's `image_size`, if it is another; a warning says so.

    Args:
      weights: by timm's names or by our paths.
      model: what they are for.

    Raises:
      UserError: the positions are those of no square, or the class token has none, as in DeiT III, another network.
    """
    grid, resized = model.grid, {}
    for name, x in weights.items():
        if name not in ("pos_embed", "params/pos_embed"):
            continue
        patches = x.shape[-2] - model.prefix
        side = _side(patches)
        if patches == math.prod(grid):
            if side and grid != (side, side):
                log.warning(
                    "Positions of %d patches are taken for those of %d x %d, and not of a square.", patches, *grid
                )
        elif side is None:
            if not model.distilled:  # otherwise of another network, which is refused later
                _check_positions({"pos_embed": x.shape}, model.prefix)
        else:
            log.warning("Positions of %d x %d patches are resized to %d x %d.", side, side, *grid)
            rows = resize_positions(as_numpy(x).reshape(x.shape[-2:]), model.prefix, grid)
            resized[name] = np.asarray(rows).reshape(*x.shape[:-2], *rows.shape)
    return {**weights, **resized}
