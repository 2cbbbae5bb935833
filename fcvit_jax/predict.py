"""Says what is in images: `python -m fcvit_jax.predict --checkpoint runs/digits photos/ cat.jpg`."""

import argparse
import glob
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from fcvit_jax import tasks
from fcvit_jax.errors import UserError, exit_on_error, log
from fcvit_jax.run import saved
from fcvit_jax.run.record import as_json

CHECKPOINT_HELP = (
    "a run's folder, its checkpoints or best folder (the newest step is taken), or one step's folder; or a file of"
    " weights: .pth, .pth.tar, .safetensors, .npz; FILE:NAME where it does not tell a ViT from a DeiT"
)


def load(checkpoint: str | Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Loads what evaluation uses of a checkpoint: the moving averages where the run kept them.

    Example::

        model, variables, metadata = load("runs/digits")
        logits = model.apply(variables, images)                     # images (N, H, W, 3) float, normalised

    Args:
      checkpoint: as in `saved.load`.

    Returns:
      The network, its variables as NumPy arrays, and the metadata, such as "class_names", "image_size" and "crop_pct"
      of a classifier; a warning tells which of these were not in the checkpoint.

    Raises:
      UserError: there is no checkpoint, it cannot be read, or it holds another network than it says.
    """
    return saved.load(checkpoint)[1:]


def read_image(path: Path, metadata: Mapping[str, Any]) -> np.ndarray:
    """Reads an image as evaluation does.

    Args:
      path: of the file.
      metadata: of a checkpoint, from `load`.

    Returns:
      For a classifier, (image_size, image_size, 3) uint8.

    Raises:
      UserError: it cannot be read; names it.
    """
    try:
        return tasks.load(saved.task_of(metadata)).read_image(path.read_bytes(), metadata)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def probabilities(model: nn.Module, variables: Mapping[str, Any], images: np.ndarray) -> jax.Array:
    """The probability of every class; see `tasks.classification.probabilities`."""
    return tasks.load("classification").probabilities(model, variables, images)


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The paths, each folder replaced by the images beneath it; a UserError where it holds none."""
    from fcvit_jax.augment import IMAGE_SUFFIXES, is_image_file  # Pillow is not needed for --help

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
    task, model, variables, metadata = saved.load(args.checkpoint)
    if not model.num_classes:
        raise UserError(f"{args.checkpoint} has no head: there are no classes to predict.")
    widths = [max(map(len, texts)) for texts in (["image", *map(str, paths)], ["class", *metadata["class_names"]])]
    if not args.json:
        print(f"{'image':{widths[0]}}  {'class':{widths[1]}}  probability")
    variables, failed = jax.device_put(variables), False
    size = min(args.batch_size, len(paths))
    for start in range(0, len(paths), size):
        read, images = [], []
        for path in paths[start : start + size]:
            try:
                images.append(read_image(path, metadata))
                read.append(path)
            except UserError as error:
                log.error("%s", error)
                failed = True
        if not read:
            continue
        # Filled up to one size, so that one program serves all batches.
        batch = np.stack(images + images[:1] * (size - len(images)))
        found = task.predict(model, variables, batch, metadata, args.top)
        for path, predictions in zip(read, found, strict=False):
            if args.json:
                print(as_json({"image": str(path), "predictions": predictions}), flush=True)
                continue
            for i, line in enumerate(predictions):
                label = "" if i else str(path)
                print(f"{label:{widths[0]}}  {line['class']:{widths[1]}}  {line['probability']:11.2%}", flush=True)
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
