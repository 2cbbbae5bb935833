"""Shows the shapes and costs of a network: `python -m fcvit_jax.summary fcvit_s12 --image-size 224`."""

import argparse
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax import networks, tasks
from fcvit_jax.errors import MAX_IMAGE_SIZE, UserError, exit_on_error
from fcvit_jax.networks import roi_heads, vit
from fcvit_jax.networks.blocks import GlobalContext
from fcvit_jax.networks.fcvit import VARIANTS
from fcvit_jax.networks.layers import Conv1x1, DepthwiseConv
from fcvit_jax.predict import CHECKPOINT_HELP
from fcvit_jax.run.saved import load
from fcvit_jax.sizes import ImageSize, describe_size, height_width

COCO = (800, 1344)  # height and width in pixels of what detectors get of COCO's wide images


@dataclasses.dataclass
class Part:
    """The cost of a part of the network for one image.

    Attributes:
      shape: of the part's output, without the batch; of several maps, that of the last.
      parameters: the number of trained values.
      multiply_adds: in convolutions and matrix products, as the paper counts them. A platform may compute more.
    """

    shape: tuple[int, ...] = ()
    parameters: int = 0
    multiply_adds: int = 0


def summarize(model: nn.Module, image_size: ImageSize = 224) -> dict[str, Part]:
    """Counts the cost of the parts of a network by tracing it. Nothing is compiled or computed.

    A detector's heads are counted for all boxes that they may get: its `proposals` and its `max_detections`. What it
    does besides, such as pooling the features of boxes, is not.

    Example::

        summarize(create_model("fcvit_s12"))["total"].multiply_adds             # 2645471232
        summarize(create_segmenter("fcvit_s12"), 512)["neck"].parameters        # 2623488
        summarize(create_detector("fcvit_s12"), (800, 1344))["total"]           # 34.4 million parameters

    Args:
      model: the network.
      image_size: of the images in pixels: their side, or (height, width).

    Returns:
      Parts by name: those of the network itself, such as "pos embed", then those of its layers, in their order: "stem",
      "stages 0", "downsample 1", ..., "norm", "head", and "total".

    Raises:
      UserError: the network takes no images of this size.
    """
    least = getattr(model, "patch_size", 32)
    size = height_width(image_size)
    for side in size:
        if not least <= side <= MAX_IMAGE_SIZE:
            raise UserError(f"--image-size={side} must be at least {least} pixels and at most {MAX_IMAGE_SIZE}.")
    parts: dict[str, Part] = {}

    def count(call, args, kwargs, context):
        module, out = context.module, call(*args, **kwargs)
        if context.method_name != "__call__" or not module.path:
            return out
        part = parts.setdefault(_part_name(module.path[0]), Part())
        if len(module.path) == 1:
            part.shape = jax.tree.leaves(out)[-1].shape[1:]
            part.parameters += sum(x.size for x in jax.tree.leaves(module.variables["params"]))
        if isinstance(module, nn.Conv | nn.Dense | nn.DenseGeneral | Conv1x1 | DepthwiseConv):
            # Each weight is multiplied once for every output position.
            part.multiply_adds += module.variables["params"]["kernel"].size * math.prod(out.shape[:-1])
        elif isinstance(module, roi_heads.Doubling):  # each weight, once for every input position
            part.multiply_adds += module.variables["params"]["kernel"].size * math.prod(args[0].shape[:-1])
        elif isinstance(module, GlobalContext) and module.weighted:
            part.multiply_adds += args[0].size  # the similarity multiplies every value by its head's query
        elif isinstance(module, vit.Block):
            n, tokens, channels = out.shape
            part.multiply_adds += 2 * n * tokens**2 * channels  # queries by keys, attention by values
        return out

    with nn.intercept_methods(count):
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))["params"]
    own = {_part_name(name): Part(x.shape, x.size) for name, x in params.items() if not isinstance(x, Mapping)}
    parts = own | parts
    costs = [field.name for field in dataclasses.fields(Part) if field.name != "shape"]
    return parts | {"total": Part((), *(sum(getattr(part, name) for part in parts.values()) for name in costs))}


def _part_name(module_name: str) -> str:
    """The name of the part that a module belongs to. All blocks of a stage, or of a ViT, are one part."""
    return re.sub(r"^block_\d+$", "blocks", re.sub(r"_block_\d+$", "", module_name)).replace("_", " ")


def _size(text: str) -> ImageSize:
    """What --image-size says; argparse explains a ValueError."""
    sides = tuple(map(int, text.split("x")))
    if len(sides) > 2:
        raise ValueError
    return sides if len(sides) == 2 else sides[0]


def _summary(args: argparse.Namespace) -> None:
    task, model, size = tasks.load(args.task), None, COCO if args.task == "detection" else 224
    if args.checkpoint:
        _, model, _, metadata = load(args.checkpoint)
        size = metadata["image_size"]
    elif args.name:
        model = task.create_model(args.name)
        size = size if args.task == "detection" else networks.settings(args.name)["image_size"]
    size = size if args.image_size is None else args.image_size
    if model is not None:
        what = f"{args.name or args.checkpoint}, {model.num_classes} classes, {jnp.dtype(model.dtype)}"
        header = ["part", "output"]
        rows = [(name, " x ".join(map(str, part.shape)), part) for name, part in summarize(model, size).items()]
    else:
        header, rows = ["name", "blocks x channels"], []
        for name, sizes in VARIANTS.items():
            stages = " ".join(f"{depth}x{dim}" for depth, dim in zip(sizes["depths"], sizes["dims"], strict=True))
            model = task.create_model(name)
            rows.append((name, stages, summarize(model, size)["total"]))
        what = f"all FCViTs, {model.num_classes} classes, float32"
    print(f"{what}, one image of {describe_size(size)}\n")
    first, second = (max(len(row[i]) for row in [header, *rows]) for i in range(2))
    print(f"{header[0]:{first}}  {header[1]:{second}}  parameters   multiply-adds")
    for name, shape, part in rows:
        print(f"{name:{first}}  {shape:{second}}  {part.parameters:10,}  {part.multiply_adds:14,}")
    print("\nMultiply-adds: in convolutions and matrix products of the forward pass.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fcvit_jax.summary",
        description="Show the shapes, parameters and multiply-adds of a network, without running it.",
        epilog="example: python -m fcvit_jax.summary fcvit_s12 --image-size 384",
    )
    which = parser.add_mutually_exclusive_group()
    names = f"{', '.join(VARIANTS)}, or any ViT or ConvNeXt; without it: compare the FCViTs"
    which.add_argument("name", nargs="?", metavar="NAME", help=names)
    which.add_argument("--checkpoint", type=Path, help=CHECKPOINT_HELP)
    parser.add_argument(
        "--task", choices=tasks.NAMES, default=tasks.NAMES[0], help="of NAME or of all variants (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size",
        type=_size,
        metavar="PIXELS",
        help="side of the images, or HEIGHTxWIDTH (default: the network's, of detection 800x1344)",
    )
    args = parser.parse_args(argv)
    with exit_on_error():
        _summary(args)


if __name__ == "__main__":
    main()
