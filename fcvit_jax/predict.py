"""Names what is in images: `python -m fcvit_jax.predict --checkpoint runs/digits photos/ cat.jpg`."""

import argparse
import functools
import glob
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fcvit_jax.augment.images import IMAGE_SUFFIXES, eval_transform, is_image_file
from fcvit_jax.augment.mixing import normalize
from fcvit_jax.convert.fcvit import is_pyramid
from fcvit_jax.errors import UserError, exit_on_error
from fcvit_jax.networks.fcvit import FCViT, abstract_variables, create_saved
from fcvit_jax.run.checkpoint import find_step, load_metadata, load_variables, local_path

CHECKPOINT_HELP = "a run's folder, its checkpoints or best folder (the newest step is taken), or one step's folder"


def load(checkpoint: str | Path) -> tuple[FCViT, dict[str, Any], dict[str, Any]]:
    """Loads what evaluation uses of a checkpoint: the moving averages where the run kept them.

    Example::

        model, variables, metadata = load("runs/digits")
        logits = model.apply(variables, images)                     # images (N, H, W, 3) float, normalised

    Args:
      checkpoint: as in `checkpoint.find_step`.

    Returns:
      The network, its variables as NumPy arrays, and the metadata with "class_names", "image_size" and "crop_pct"; a
      line on stderr tells which of these three were not in the checkpoint.

    Raises:
      UserError: there is no checkpoint, it cannot be read, or it holds another network.
    """
    path = local_path(checkpoint)
    if path.is_file():
        raise UserError(
            f"{path} is a file, not a checkpoint's folder: python -m fcvit_jax.convert {path} FOLDER makes one,"
            " if the file holds weights."
        )
    step = find_step(path)
    metadata = load_metadata(step)
    variables = load_variables(step)
    if is_pyramid(f"params/{name}/" for name in variables["params"]):
        raise UserError(f"{step} holds a feature pyramid, which has no classes: a classifier is needed here.")
    model = create_saved(step, metadata)
    if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, abstract_variables(model)):
        raise UserError(f"{step} holds the weights of another network than the {metadata['model']} that it names.")
    deep = metadata["model"]["name"].endswith(("24", "48"))  # which the original evaluates with another crop
    usual = {
        "class_names": [str(i) for i in range(model.num_classes)],
        "image_size": 224,
        "crop_pct": 0.95 if deep else 0.9,
    }
    if missing := sorted(usual.keys() - metadata.keys()):
        print(
            f"{step} says nothing of {', '.join(missing)}; the defaults are numbered classes, images of "
            f"{usual['image_size']} pixels a side and crop_pct {usual['crop_pct']}",
            file=sys.stderr,
        )
    return model, variables, usual | metadata


def read_image(path: Path, metadata: Mapping[str, Any]) -> np.ndarray:
    """Reads an image as evaluation does: (image_size, image_size, 3) uint8.

    Raises:
      UserError: it cannot be read; names it.
    """
    try:
        return eval_transform(path.read_bytes(), metadata["image_size"], metadata["crop_pct"])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


@functools.partial(jax.jit, static_argnames="model")
def probabilities(model: FCViT, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """The probability of every class.

    Args:
      model: the network.
      variables: its "params" and "batch_stats".
      images: (N, H, W, 3) uint8.

    Returns:
      (N, num_classes) float32; rows sum to 1.
    """
    return jax.nn.softmax(model.apply(variables, normalize(images)))


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The paths, each folder replaced by the images beneath it; a UserError where it holds none."""
    found = []
    for path in paths:
        if path.is_dir():
            # Unlike Path.rglob it follows links, and leaves out what is hidden.
            beneath = map(Path, glob.iglob(f"{glob.escape(str(path))}/**/*", recursive=True))
            inside = sorted(filter(is_image_file, beneath))
            if not inside:
                raise UserError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
            found += inside
        else:
            found.append(path)
    return found


def _predict(args: argparse.Namespace) -> int:
    """Prints predictions batch by batch; returns 1 if an image could not be read."""
    if args.top < 1 or args.batch_size < 1:
        raise UserError("--top and --batch-size must be at least 1.")
    paths = find_images(args.images)
    model, variables, metadata = load(args.checkpoint)
    if not model.num_classes:
        raise UserError(f"{args.checkpoint} has no head: there are no classes to predict.")
    names = metadata["class_names"]
    widths = [max(len(text) for text in texts) for texts in (["image", *map(str, paths)], ["class", *names])]
    if not args.json:
        print(f"{'image':{widths[0]}}  {'class':{widths[1]}}  probability")
    variables, failed = jax.device_put(variables), False
    size = min(args.batch_size, len(paths))
    for start in range(0, len(paths), size):
        read, batch = [], np.zeros((size, metadata["image_size"], metadata["image_size"], 3), np.uint8)
        for path in paths[start : start + size]:
            try:
                batch[len(read)] = read_image(path, metadata)
                read.append(path)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                failed = True
        for path, row in zip(read, np.asarray(probabilities(model, variables, batch)), strict=False):
            best = np.argsort(-row, kind="stable")[: args.top].tolist()
            if args.json:
                top = [{"class": names[i], "index": i, "probability": float(row[i])} for i in best]
                print(json.dumps({"image": str(path), "predictions": top}), flush=True)
            else:
                for label, i in zip([str(path)] + [""] * len(best), best, strict=False):
                    print(f"{label:{widths[0]}}  {names[i]:{widths[1]}}  {row[i]:11.2%}", flush=True)
    return int(failed)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fcvit_jax.predict",
        description="Predict the classes of images. If one cannot be read, it is named and the exit status is 1.",
        epilog="example: python -m fcvit_jax.predict --checkpoint runs/digits photos/ cat.jpg --top 3",
    )
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="a folder: all images beneath it")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many classes to print (default: 5)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    args = parser.parse_args(argv)
    with exit_on_error():
        sys.exit(_predict(args))


if __name__ == "__main__":
    main()
