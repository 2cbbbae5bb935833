"""Shows the shapes and costs of a network: `python -m fcvit_jax.summary fcvit_s12 --image-size 224`."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.errors import UserError, exit_on_error
from fcvit_jax.networks.blocks import Block, GlobalContext
from fcvit_jax.networks.fcvit import VARIANTS, FCViT, create_model
from fcvit_jax.networks.layers import Conv1x1, DepthwiseConv
from fcvit_jax.predict import CHECKPOINT_HELP, load


@dataclasses.dataclass
class Part:
    """What a part of the network costs, for one image.

    Attributes:
      shape: of its output, without the batch.
      parameters: how many values are trained.
      multiply_adds: of convolutions and matrix products, as the paper counts them, not as a platform computes them.
      activations: bytes that the backward pass needs from the forward pass, before the compiler optimises either.
    """

    shape: tuple[int, ...] = ()
    parameters: int = 0
    multiply_adds: int = 0
    activations: int = 0


def summarize(model: FCViT, image_size: int = 224) -> dict[str, Part]:
    """Counts what the parts of a network cost, by tracing it: nothing is compiled or computed.

    Example::

        summarize(create_model("fcvit_s12"))["total"].multiply_adds      # 2645471232

    Args:
      model: the network.
      image_size: side of the images in pixels.

    Returns:
      Parts by name, in their order: "stem", "stage 1", "downsample 1", ..., "norm", "head", and "total".

    Raises:
      UserError: the images are too small.
    """
    if image_size < 32:
        raise UserError(f"--image-size={image_size}: the network needs at least 32 pixels a side.")
    parts: dict[str, Part] = {}
    calls = []

    def count(call, args, kwargs, context):
        module, out = context.module, call(*args, **kwargs)
        if context.method_name != "__call__" or not module.path:
            return out
        part = parts.setdefault(_part_name(module.path[0]), Part())
        if len(module.path) == 1:
            part.shape = out.shape[1:]
            part.parameters += sum(x.size for x in jax.tree.leaves(module.variables["params"]))
            x, *train = args[:2]  # drop-path keeps next to nothing
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (module.variables, x))
            calls.append((part, module.clone(parent=None, name=None), *shapes, *train))
        if isinstance(module, nn.Conv | nn.Dense | Conv1x1 | DepthwiseConv):
            # Each weight meets one input per output position.
            part.multiply_adds += module.variables["params"]["kernel"].size * math.prod(out.shape[:-1])
        elif isinstance(module, GlobalContext) and module.weighted:
            part.multiply_adds += args[0].size  # the similarity: every value times its head's query
        return out

    # One image is the whole batch, and one block is counted for all of its stage.
    traced = model.clone(bn_group_size=None, depths=[min(depth, 1) for depth in model.depths])
    with nn.intercept_methods(count):
        jax.eval_shape(lambda: traced.init(_rngs(), jnp.zeros((1, image_size, image_size, 3)), train=True))
    for part, module, variables, x, *train in calls:
        if model.remat and isinstance(module, Block):  # from its input alone
            part.activations += x.size * x.dtype.itemsize
        else:
            part.activations += _saved_bytes(module, variables, x, *train)
    costs = [field for field in Part.__dataclass_fields__ if field != "shape"]
    for stage, depth in enumerate(model.depths, 1):
        if depth:
            part = parts[f"stage {stage}"]
            parts[f"stage {stage}"] = Part(part.shape, *(depth * getattr(part, field) for field in costs))
    return parts | {"total": Part((), *(sum(getattr(part, field) for part in parts.values()) for field in costs))}


def _rngs() -> dict[str, jax.Array]:
    return {"params": jax.random.key(0), "dropout": jax.random.key(0)}


def _saved_bytes(module: nn.Module, variables: dict[str, Any], x: jax.ShapeDtypeStruct, *train: bool) -> int:
    """Bytes that the backward pass of a module needs: its input and what it computed, but not its variables."""

    def saved(variables, x):
        def forward(params, x):
            return module.apply(variables | {"params": params}, x, *train, rngs=_rngs(), mutable=["batch_stats"])[0]

        return jax.tree.leaves(jax.vjp(forward, variables["params"], x)[1])

    jaxpr = jax.make_jaxpr(saved)(variables, x).jaxpr
    found = {var for var in jaxpr.outvars if isinstance(var, jax.extend.core.Var)} - set(jaxpr.invars[:-1])
    return sum(var.aval.size * var.aval.dtype.itemsize for var in found)


def _part_name(module_name: str) -> str:
    """The part that a module belongs to: of "stages_0_block_1" it is "stage 1", as people count."""
    if module_name.startswith("stages"):
        return f"stage {int(module_name.split('_')[1]) + 1}"
    return module_name.replace("_", " ")


def _summary(args: argparse.Namespace) -> None:
    model, metadata = None, {"image_size": 224}
    if args.checkpoint:
        model, _, metadata = load(args.checkpoint)
    elif args.name:
        model = create_model(args.name)
    size = metadata["image_size"] if args.image_size is None else args.image_size
    if model is not None:
        what = f"{args.name or args.checkpoint}, {model.num_classes} classes, {jnp.dtype(model.dtype)}"
        header = ["part", "output"]
        rows = [(name, " x ".join(map(str, part.shape)), part) for name, part in summarize(model, size).items()]
    else:
        what, header, rows = "all variants, 1000 classes, float32", ["name", "blocks x channels"], []
        for name, sizes in VARIANTS.items():
            stages = " ".join(f"{depth}x{dim}" for depth, dim in zip(sizes["depths"], sizes["dims"], strict=True))
            rows.append((name, stages, summarize(create_model(name), size)["total"]))
    print(f"{what}, one image of {size} x {size}\n")
    first, second = (max(len(row[i]) for row in [header, *rows]) for i in range(2))
    print(f"{header[0]:{first}}  {header[1]:{second}}  parameters   multiply-adds  activations")
    for name, shape, part in rows:
        costs = f"{part.parameters:10,}  {part.multiply_adds:14,}  {part.activations / 2**20:7.2f} MiB"
        print(f"{name:{first}}  {shape:{second}}  {costs}")
    print("\nMultiply-adds: in convolutions and matrix products of the forward pass.")
    print("Activations: what training keeps for the backward pass, before the compiler optimises either pass.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fcvit_jax.summary",
        description="Show the shapes, parameters, multiply-adds and activations of a network, without running it.",
        epilog="example: python -m fcvit_jax.summary fcvit_s12 --image-size 384",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("name", nargs="?", metavar="NAME", help=f"{', '.join(VARIANTS)}; without it: compare all")
    which.add_argument("--checkpoint", type=Path, help=CHECKPOINT_HELP)
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="side of the images (default: the checkpoint's, else 224)"
    )
    args = parser.parse_args(argv)
    with exit_on_error():
        _summary(args)


if __name__ == "__main__":
    main()
