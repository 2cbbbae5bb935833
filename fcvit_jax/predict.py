"""Says what is in images: `python -m fcvit_jax.predict --checkpoint runs/digits photos/ cat.jpg`."""

import argparse
import glob
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from fcvit_jax.augment import IMAGE_SUFFIXES, is_image_file
from fcvit_jax.errors import UserError, exit_on_error, log
from fcvit_jax.run.saved import Saved, load

CHECKPOINT_HELP = "a run's folder, its checkpoints or best folder (the newest step is taken), or one step's folder"


def read_image(path: Path, saved: Saved) -> np.ndarray:
    """Reads an image as evaluation does.

    Args:
      path: of the file.
      saved: from `run.saved.load`.

    Returns:
      For a classifier, (image_size, image_size, 3) uint8.

    Raises:
      UserError: it cannot be read; names it.
    """
    try:
        return saved.task.read_image(path.read_bytes(), saved.metadata)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


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
    saved = load(args.checkpoint)
    if not saved.model.num_classes:
        raise UserError(f"{args.checkpoint} has no head: there are no classes to predict.")
    widths = [
        max(map(len, texts)) for texts in (["image", *map(str, paths)], ["class", *saved.metadata["class_names"]])
    ]
    if not args.json:
        print(f"{'image':{widths[0]}}  {'class':{widths[1]}}  probability")
    variables, failed = jax.device_put(saved.variables), False
    size = min(args.batch_size, len(paths))
    for start in range(0, len(paths), size):
        read, images = [], []
        for path in paths[start : start + size]:
            try:
                images.append(read_image(path, saved))
                read.append(path)
            except UserError as error:
                log.error("%s", error)
                failed = True
        if not read:
            continue
        # Filled up to one size, so that one program serves all batches.
        batch = np.stack(images + images[:1] * (size - len(images)))
        found = saved.task.predict(saved.model, variables, batch, saved.metadata, args.top)
        for path, predictions in zip(read, found, strict=False):
            if args.json:
                print(json.dumps({"image": str(path), "predictions": predictions}), flush=True)
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
