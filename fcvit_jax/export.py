"""Writes a network as a program: `python -m fcvit_jax.export --checkpoint runs/digits exported`.

The program needs only JAX and flatbuffers to run::

    program = jax.export.deserialize(open("exported/model.jax_export", "rb").read())
    logits = program.call(images)                   # images (N, S, S, 3) uint8, any N; logits (N, num_classes) float32
    names = json.load(open("exported/model.json"))["class_names"]
"""

import argparse
import inspect
import json
import shutil
from pathlib import Path

import jax
import jax.export
import numpy as np
from flax import traverse_util
from safetensors.numpy import save

from fcvit_jax.errors import UserError, exit_on_error
from fcvit_jax.predict import CHECKPOINT_HELP
from fcvit_jax.run.saved import load, task_of

PLATFORMS = ("cpu", "cuda", "tpu")
_OF_THE_RUN = ("best", "evaluated", "num_eval", "num_train")  # metadata that do not describe the network


def export(checkpoint: str | Path, dest: str | Path, size: tuple[int, int] | None = None) -> None:
    """Writes three files with the weights that evaluation uses of a checkpoint (averages, if the run kept them).

    - `model.jax_export`: a serialised `jax.export` program for CPU, CUDA and TPU. Weights and normalisation are part of
      it. A classifier's maps images uint8 (N, S, S, 3) to logits float32 (N, num_classes), or to the pooled features of
      a network without a head. A segmenter's maps images uint8 (N, h, w, 3), as evaluation resizes images of height H
      and width W, to logits float32 (N, H, W, num_classes). A detector's maps an image and its size to the objects in
      it; see `detection.make_program`.
    - `model.json`: "class_names", "task", and "model" (the arguments of the task's `create_model`). A classifier has
      "image_size" (S) and "crop_pct": resize an image (bicubic) to a shorter side of floor(S / crop_pct), and crop its
      centre. A segmenter has "size" (H, W), "canvas" (h, w), "long", "short" (see `segmentation.eval_image`) and
      "palette". A detector has "canvas" (h, w), "long", "short" (see `augment.objects.fit_image`) and "category_ids".
    - `model.safetensors`: the variables by path, "params/stem/conv/kernel", ...

    Args:
      checkpoint: as in `saved.load`.
      dest: a new or empty folder.
      size: (height, width) of the images of a segmenter, None: its "short" both; of a detector's canvas, multiples of
        32 pixels, None: that of wide images.

    Raises:
      UserError: the checkpoint cannot be read or its task takes no size, the folder is not empty or cannot be written.
    """
    dest = Path(dest).expanduser()
    if dest.is_file() or (dest.is_dir() and any(dest.iterdir())):
        raise UserError(f"{dest} is not an empty folder: choose another.")
    task, model, variables, metadata = load(checkpoint)
    about = {key: value for key, value in metadata.items() if key not in _OF_THE_RUN}
    if size is not None and "size" not in inspect.signature(task.make_program).parameters:
        raise UserError(
            f"{checkpoint} is of the task {task_of(metadata)}, whose images have one size: leave out --size."
        )
    options = {} if size is None else {"size": tuple(size)}
    function, *shapes = task.make_program(model, variables, metadata, **options)
    about |= {"size": list(size)} if size is not None else {}
    if "size" in inspect.signature(task.make_program).parameters:
        about["canvas"] = list(shapes[0].shape[-3:-1])
    program = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)
    weights = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(variables, sep="/").items()}
    files = {
        "model.jax_export": program.serialize(),
        "model.json": json.dumps(about, indent=2).encode() + b"\n",
        "model.safetensors": save(weights, {"about": json.dumps(about)}),
    }
    try:
        dest.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (dest / name).write_bytes(content)
            print(f"{dest / name}: {len(content):,} bytes")
    except OSError as error:
        shutil.rmtree(dest, ignore_errors=True)  # otherwise the next attempt would refuse the folder
        raise UserError(f"{error.filename or dest} cannot be written: {error.strerror}.") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fcvit_jax.export",
        description="Write a network as a jax.export program for any batch size on CPU, CUDA and TPU. Weights and "
        "normalisation are part of it. Its labels (JSON) and its weights (safetensors) are written beside it.",
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
    parser.add_argument("dest", type=Path, metavar="DEST", help="a new or empty folder")
    args = parser.parse_args(argv)
    with exit_on_error():
        export(args.checkpoint, args.dest, args.size)


if __name__ == "__main__":
    main()
