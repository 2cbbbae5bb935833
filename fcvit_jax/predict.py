"""Says what is in images: `python -m fcvit_jax.predict --checkpoint runs/digits photos/ cat.jpg`."""

import argparse
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from fcvit_jax import tasks
from fcvit_jax.devices.cpu import tune_cpu
from fcvit_jax.errors import UserError, exit_on_error, log, printable
from fcvit_jax.networks.folded import fold
from fcvit_jax.run import saved
from fcvit_jax.run.results import as_json

CHECKPOINT_HELP = (
    "a run's folder, its checkpoints or best folder (the newest step is taken), or one step's folder; or a file of"
    " weights: .pth, .pth.tar, .safetensors, .npz; FILE:NAME where it does not tell a ViT from a DeiT; or"
    " hf-hub:OWNER/NAME on the Hugging Face hub"
)
_SHARE = 7  # characters of a share in percent


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
      For a classifier, (height, width, 3) uint8, of the size that "image_size" says.

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
    """The paths, each folder replaced by the images beneath it, and none twice.

    Raises:
      UserError: a folder holds no image.
    """
    from fcvit_jax.data.image_files import count, first, list_images  # Pillow is not needed for --help

    found, again = {}, []
    for path in paths:
        inside = [path / name for name in list_images(str(path))] if path.is_dir() else [path]
        for image in inside:
            if found.setdefault(image.parent.resolve() / image.name, image) is not image:
                again.append(str(image))
    if again:
        log.warning("%s given twice, taken once: %s", count(len(again), "image"), first(again))
    return list(found.values())


def _predict(args: argparse.Namespace) -> int:
    """Prints predictions as they are made; returns 1 if an image could not be read."""
    options = dict(vars(args))
    checkpoint, as_lines, paths = options.pop("checkpoint"), options.pop("json"), find_images(options.pop("images"))
    task, model, variables, metadata = saved.load(checkpoint)
    unknown = [
        f"--{name.replace('_', '-')}" for name in options.keys() - inspect.signature(task.predict_files).parameters
    ]
    if unknown:
        raise UserError(f"{checkpoint} is of the task {saved.task_of(metadata)}, which has no {', '.join(unknown)}.")
    failed = []

    def read() -> Iterator[tuple[Path, np.ndarray]]:
        for path in paths:
            try:
                yield path, read_image(path, metadata)
            except UserError as error:
                log.error("%s", error)
                failed.append(path)

    model, variables = fold(model, variables)
    found = task.predict_files(model, jax.device_put(variables), read(), metadata, **options)
    if as_lines:
        for path, said in found:
            print(as_json({"image": str(path)} | said), flush=True)
    else:
        widths = [max(map(len, texts)) for texts in (["image", *map(str, paths)], ["class", *metadata["class_names"]])]
        _print_table(found, widths)
    return int(bool(failed))


def _add_pictures(group: Any) -> None:
    group.add_argument(
        "--masks", type=Path, metavar="FOLDER", help="write a PNG of the classes, or of the objects, of every image"
    )
    group.add_argument("--overlay", action="store_true", help="and one of them in colours on the image")


def _print_table(found: Iterable[tuple[Path, Mapping[str, Any]]], widths: Sequence[int]) -> None:
    """Prints a line for each prediction, with what it has besides the number of its class and its mask.

    Args:
      found: from the task's `predict_files`.
      widths: in characters, of the columns of the images and of the classes.
    """
    header = True
    for path, said in found:
        label = str(path)
        for row in said["predictions"]:
            columns = {name: value for name, value in row.items() if name not in ("class", "index", "mask")}
            if header:
                titles = [f"{name:{_SHARE}}" for name in columns]
                print(f"{'image':{widths[0]}}  {'class':{widths[1]}}  {'  '.join(titles).rstrip()}")
                header = False
            texts = "  ".join(map(_as_text, columns.values()))
            print(f"{label:{widths[0]}}  {printable(row['class']):{widths[1]}}  {texts}".rstrip(), flush=True)
            label = ""
        if not said["predictions"]:
            print(f"{label:{widths[0]}}  nothing found", flush=True)


def _as_text(value: float | Sequence[float]) -> str:
    """A share in percent, or a box in whole pixels."""
    return f"{value:<{_SHARE}.2%}" if isinstance(value, float) else " ".join(f"{x:.0f}" for x in value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fcvit_jax.predict",
        description="Predict the classes of images. If one cannot be read, it is named and the exit status is 1.",
        epilog="example: python -m fcvit_jax.predict --checkpoint runs/digits photos/ cat.jpg --top 3",
    )
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="a folder: all images beneath it")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    for name in tasks.NAMES:
        group = parser.add_argument_group(name, argument_default=argparse.SUPPRESS)
        try:
            task = tasks.load(name)
        except ModuleNotFoundError as error:  # the networks alone are installed
            group.description = f'{error}: pip install "fcvit-jax[train]"'
        else:
            task.add_arguments(group)
    _add_pictures(parser.add_argument_group("segmentation and detection", argument_default=argparse.SUPPRESS))
    args = parser.parse_args(argv)
    tune_cpu()
    with exit_on_error():
        sys.exit(_predict(args))


if __name__ == "__main__":
    main()
