"""Writes a network as a program: `python -m fcvit_jax.export --checkpoint runs/digits exported`.

The program needs only JAX and flatbuffers to run::

    program = jax.export.deserialize(open("exported/model.jax_export", "rb").read())
    logits = program.call(images)                   # images (N, S, S, 3) uint8, any N; logits (N, num_classes) float32
    names = json.load(open("exported/model.json"))["class_names"]

With fcvit_jax, `load("exported")` gives both, and refuses files that were changed.
"""

import argparse
import contextlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.export
import numpy as np
from flax import traverse_util
from safetensors.numpy import save

from fcvit_jax.devices.storage import local_path
from fcvit_jax.errors import UserError, exit_on_error
from fcvit_jax.formats import checksums, hub, onnx, tensorflow
from fcvit_jax.networks.fcvit import with_fields
from fcvit_jax.networks.folded import fold
from fcvit_jax.predict import CHECKPOINT_HELP
from fcvit_jax.run import saved
from fcvit_jax.run.results import parse_object

FORMATS = ("jax", "onnx", "tf", "hub")
PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, ABOUT = "model.jax_export", "model.json"
_OF_THE_RUN = ("best", "evaluated", "num_eval", "num_train")  # metadata that do not describe the network


def export(checkpoint: str | Path, dest: str | Path, size: tuple[int, int] | None = None, format: str = "jax") -> None:
    """Writes files with the weights that evaluation uses of a checkpoint (averages, if the run kept them).

    Of the format "jax":

    - `model.jax_export`: a serialised `jax.export` program for CPU, CUDA and TPU. Weights and normalisation are part of
      it. A classifier's maps images uint8 (N, H, W, 3) to logits float32 (N, num_classes), or to the pooled features of
      a network without a head. A segmenter's maps images uint8 (N, h, w, 3), as evaluation resizes images of height H
      and width W, to logits float32 (N, H, W, num_classes). A detector's maps an image and its size to the objects in
      it; see `detection.make_program`.
    - `model.json`: "class_names", "task", and "model" (the arguments of the task's `create_model`). A classifier has
      "image_size" (S, or [H, W] where they differ), "crop_pct" and "exif": resize an image (bicubic) to a shorter side
      of floor(S / crop_pct), and crop its centre; see `augment.eval_geometry`. A segmenter has "size" (H, W), "canvas"
      (h, w), "long", "short" (see `segmentation.eval_image`) and "palette". A detector has "canvas" (h, w), "long",
      "short" (see `augment.objects.fit_image`) and "category_ids".
    - `model.safetensors`: the variables by path, "params/stem/conv/kernel", ...

    Of the format "onnx", for classifiers and segmenters: `model.onnx`, the same function in float32 from "images" to
    "output"; and `model.json`. Of the format "tf": the same as a TensorFlow SavedModel; and `model.json`.

    Of the format "hub", the layout of the Hugging Face hub: `model.safetensors`, the metadata as `config.json`, and a
    card, `README.md`. In every format `SHA256SUMS` has the checksums of the other files.

    Args:
      checkpoint: as in `saved.load`.
      dest: a new or empty folder.
      size: (height, width) of the images of a segmenter, None: its "short" both; of a detector's canvas, multiples of
        32 pixels, None: that of wide images.
      format: one of `FORMATS`.

    Raises:
      UserError: the checkpoint cannot be read or its task takes no size, the folder is not empty or cannot be written.
    """
    dest = local_path(dest)
    if format not in FORMATS:
        raise UserError(f"There is no format {format!r}: choose from {', '.join(FORMATS)}.")
    if dest.is_file() or (dest.is_dir() and any(dest.iterdir())):
        raise UserError(f"{dest} is not an empty folder: choose another.")
    if format == "hub" and size is not None:
        raise UserError("The hub's layout holds no program for images of one size: leave out --size.")
    network = saved.load(checkpoint)
    about = {key: value for key, value in network.metadata.items() if key not in _OF_THE_RUN}
    if format == "hub":
        files = hub.make(_weights(network, about), about, network.metadata, _last_evaluation(network))
    else:
        if format != "jax":  # other runtimes know no bfloat16 on CPUs
            network = network._replace(model=with_fields(network.model, dtype=np.float32))
        function, *shapes = _program(checkpoint, network, size)
        about |= {"size": list(size)} if size is not None else {}
        if _takes_size(network.task):
            about["canvas"] = list(shapes[0].shape[-3:-1])
        files = {ABOUT: json.dumps(about, indent=2).encode() + b"\n"}
        if format == "onnx":
            files["model.onnx"] = onnx.convert(function, *shapes)
        elif format == "tf":
            files |= tensorflow.convert(function, *shapes)
        else:
            files |= {PROGRAM: _serialized(function, *shapes), "model.safetensors": _weights(network, about)}
    _write(dest, files | {checksums.NAME: checksums.make(files)})


def load(folder: str | Path) -> tuple[Callable[[jax.Array], jax.Array], dict[str, Any]]:
    """Loads what `export` has written in the format "jax".

    Example::

        function, metadata = load("exported")
        logits = function(images)                   # images (N, H, W, 3) uint8; metadata["image_size"] says H and W

    Returns:
      The program as a function of uint8 images, which can be called inside `jax.jit`; and the content of `model.json`.

    Raises:
      UserError: the folder or a file in it is missing, was changed, or cannot be read by this version of JAX.
    """
    folder = Path(folder).expanduser()
    if not (folder / PROGRAM).is_file():
        raise UserError(f"{folder} has no {PROGRAM}: give a folder that fcvit_jax.export has written.")
    checksums.check(folder)
    try:
        program = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    except ValueError as error:  # the file is what was written, so the version of JAX is too old or too new
        raise UserError(f"{folder / PROGRAM} cannot be read by JAX {jax.__version__}: {error}") from error
    return program.call, parse_object((folder / ABOUT).read_text())


def _takes_size(task: ModuleType) -> bool:
    return "size" in inspect.signature(task.make_program).parameters


def _program(checkpoint: str | Path, network: saved.Saved, size: tuple[int, int] | None) -> tuple[Any, ...]:
    """The function to export, and the shapes of its arguments, of which the images are the first."""
    task, metadata = network.task, network.metadata
    model, variables = fold(network.model, network.variables)
    if size is None:
        return task.make_program(model, variables, metadata)
    if not _takes_size(task):
        raise UserError(
            f"{checkpoint} is of the task {saved.task_of(metadata)}, whose images have one size: leave out --size."
        )
    return task.make_program(model, variables, metadata, size=tuple(size))


def _serialized(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> bytes:
    with _without_paths():
        return bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes).serialize())


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """Keeps the paths of source files, which tell of the exporter's machine, out of what is lowered meanwhile."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _weights(network: saved.Saved, about: Mapping[str, Any]) -> bytes:
    weights = traverse_util.flatten_dict(network.variables, sep="/")
    return save({path: np.asarray(x) for path, x in weights.items()}, {"about": json.dumps(about)})


def _last_evaluation(network: saved.Saved) -> str:
    """What the run's last evaluation gave, in a line; "" if the checkpoint says nothing of one."""
    result = network.metadata.get("evaluated")
    return f"{network.task.describe(result)} (step {result['step']:,})" if result else ""


def _write(dest: Path, files: Mapping[str, bytes]) -> None:
    """Writes all files, or none."""
    try:
        dest.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (dest / name).parent.mkdir(parents=True, exist_ok=True)
            (dest / name).write_bytes(content)
            print(f"{dest / name}: {len(content):,} bytes")
    except OSError as error:
        shutil.rmtree(dest, ignore_errors=True)  # otherwise the next attempt would refuse the folder
        raise UserError(f"{error.filename or dest} cannot be written: {error.strerror}.") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fcvit_jax.export",
        description="Write a network as a program for any batch size, or its weights. Normalisation is part of a "
        "program, and its labels (JSON) are written beside it.",
        epilog="example: python -m fcvit_jax.export --checkpoint runs/digits exported/digits",
    )
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images of a segmenter, or of the canvas of a detector (default: by its long and short)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="jax",
        help="jax (default): the program; onnx, tf: the same as an ONNX model or a TensorFlow SavedModel; hub: weights "
        "and a card in the layout of the Hugging Face hub",
    )
    parser.add_argument("dest", type=Path, metavar="DEST", help="a new or empty folder")
    args = parser.parse_args(argv)
    with exit_on_error():
        export(args.checkpoint, args.dest, args.size, args.format)


if __name__ == "__main__":
    main()
