"""What the tools ask of detection: the objects in images of any size, as boxes, masks, pictures and programs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fcvit_jax.augment.objects import fit_image, on_canvas
from fcvit_jax.augment.paired import ALIGNMENT, aligned
from fcvit_jax.data import coco_eval, coco_names, image_files, mask_files, palettes, segments
from fcvit_jax.devices import cpu
from fcvit_jax.errors import UserError, log
from fcvit_jax.networks.masks import paste_masks
from fcvit_jax.networks.normalize import normalize_inside
from fcvit_jax.networks.objects import Detections

LONG, SHORT = 1333, 800  # the sides in pixels that COCO's images must not exceed


def complete_metadata(source: Path, model: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a checkpoint with "class_names", "category_ids", "long", "short" and "exif"; says what it lacked.

    There is also "image_size" for tools that want one size: height and width of a canvas for wide images.

    Args:
      source: of the metadata, to be named.
      model: the network.
      metadata: as it was saved.
    """
    count = model.num_classes
    of_coco = count == len(coco_names.NAMES)
    names, ids = (coco_names.NAMES, coco_names.IDS) if of_coco else (map(str, range(count)), range(1, count + 1))
    usual = {"class_names": list(names), "category_ids": list(ids), "long": LONG, "short": SHORT, "exif": False}
    if missing := sorted(usual.keys() - metadata.keys()):
        log.warning(
            "%s says nothing of %s; the defaults are %s classes and images that fit %d x %d pixels",
            *(source, ", ".join(missing), "COCO's" if of_coco else "numbered", LONG, SHORT),
        )
    complete = usual | metadata
    return complete | {"image_size": aligned(complete["short"], complete["long"])}


def read_image(encoded: bytes, metadata: Mapping[str, Any]) -> np.ndarray:
    """Decodes an image as evaluation does: (H, W, 3) uint8, of the size that it has; `predict` resizes it.

    Raises:
      UserError: it cannot be read.
    """
    return image_files.decode(encoded, metadata["exif"])


def detect(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array, sizes: jax.Array, scales: jax.Array
) -> Detections:
    """What is in images on a canvas, each as if it were alone; on the device.

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, 3) uint8, as `fit_image` makes them, each at the top left of the canvas.
      sizes: (N, 2) int32, height and width of each in pixels.
      scales: (N, 4) float32, as `fit_image` gives them.
    """
    return model.apply(variables, normalize_inside(images, sizes, model.mean, model.std), sizes, scales)


def as_coco(found: Detections, index: int, size: tuple[int, int], threshold: float = 0.0) -> coco_eval.Detections:
    """What was found in one image, without the unused places, and its masks at the size of the image as runs.

    Args:
      found: of a batch, NumPy arrays.
      index: of the image in the batch.
      size: (height, width) of the image in pixels before it was resized.
      threshold: the least score.
    """
    used = np.flatnonzero(found.valid[index] & (found.scores[index] >= threshold))
    boxes, rles = found.boxes[index][used], None
    if found.masks is not None:  # one by one: all masks of a photograph would take gigabytes
        masks = found.masks[index][used]
        rles = [segments.encode(paste_masks(masks[i : i + 1], boxes[i : i + 1], size))[0] for i in range(len(used))]
    return coco_eval.Detections(boxes, found.scores[index][used], found.labels[index][used], rles)


_detect = cpu.jit(detect, static_argnames="model")


def predict(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Iterable[np.ndarray],
    metadata: Mapping[str, Any],
    threshold: float = 0.0,
) -> Iterator[coco_eval.Detections]:
    """The objects in images, one image after the other, each as evaluation sees it.

    Padding changes nothing, so that three programs serve images of all sizes: for square, wide and high canvases.

    Args:
      model: the network.
      variables: its variables.
      images: each (H, W, 3) uint8, from `read_image`; of any sizes.
      metadata: of the checkpoint; its "long" and "short" are used.
      threshold: the least score; no score is below the network's own threshold.

    Yields:
      The detections of each image, the best first, in pixels of the image.
    """
    for image in images:
        pixels, scale = fit_image(image, metadata["long"], metadata["short"])
        size = pixels.shape[:2]
        canvas = on_canvas(pixels, _canvas(size, metadata["short"], metadata["long"]))
        found = _detect(model, variables, canvas[None], np.array([size], np.int32), scale[None])
        yield as_coco(jax.device_get(found), 0, image.shape[:2], threshold)


def _canvas(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Height and width of the smallest of three canvases that a resized image (height, width) fits."""
    short, long = aligned(short, long)
    if max(size) <= short:
        return short, short
    return (short, long) if size[1] > size[0] else (long, short)


def add_arguments(parser: Any) -> None:
    """Adds the options of `predict_files` that no other task has to a parser or a group of one, without defaults."""
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="the least score of an object (default: 0.3)")
    parser.add_argument("--rle", action="store_true", help="add every object's mask as COCO's run lengths; with --json")


def predict_files(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Iterable[tuple[Path, np.ndarray]],
    metadata: Mapping[str, Any],
    *,
    threshold: float = 0.3,
    rle: bool = False,
    masks: Path | None = None,
    overlay: bool = False,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What the `predict` tool says of images, and the pictures that it writes.

    Args:
      model, variables, metadata, threshold: as in `predict`.
      images: paths, and what `read_image` gave for them.
      rle: add the masks to the predictions.
      masks: a folder to write NAME.png to, if the network has masks: the number of the prediction, from 1, that every
        pixel belongs to, the best first; 0: none. Those after the 255th are left out.
      overlay: write NAME_overlay.png there too, the image with boxes, masks, names and scores.

    Yields:
      For each image its path, and "predictions": for each object, the best first, "class" (its name), "index", "score",
      "box" (x1, y1, x2, y2 in pixels of the image) and, if asked for, "mask" (COCO's run lengths: "size" and "counts");
      and the paths "mask" and "overlay" of what was written.

    Raises:
      UserError: an option does not fit the network, a file cannot be written, or two images have one name.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold={threshold} must be from 0 to 1.")
    if overlay and masks is None:
        raise UserError("--overlay needs --masks FOLDER, to which it is written.")
    if not model.masks and (rle or (masks is not None and not overlay)):
        raise UserError("This detector has no masks: leave out --rle, and give --masks only for --overlay.")
    written = set()
    for path, image in images:
        (found,) = predict(model, variables, [image], metadata, threshold)
        said = {"predictions": _rows(found, metadata["class_names"], rle)}
        if masks is not None:
            mask_files.check_new(path, masks, written)
            for name, file in _write(masks, path.stem, image, found, metadata["class_names"], overlay).items():
                said[name] = str(file)
        yield path, said


def _rows(found: coco_eval.Detections, class_names: list[str], rle: bool) -> list[dict[str, Any]]:
    rows = []
    for i, (label, score, box) in enumerate(
        zip(found.classes.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    ):
        row = {"class": class_names[label], "index": label, "score": score, "box": box}
        if rle:
            row["mask"] = segments.as_text(found.rles[i])
        rows.append(row)
    return rows


def _write(
    folder: Path, stem: str, image: np.ndarray, found: coco_eval.Detections, class_names: list[str], overlay: bool
) -> dict[str, Path]:
    """Writes the pictures of an image, and returns their paths."""
    files = {}
    if found.rles is not None:
        numbers = np.zeros(image.shape[:2], np.uint8)
        for i, rle in reversed(list(enumerate(found.rles[:255]))):
            numbers[segments.decode([rle], *image.shape[:2])[0]] = i + 1
        palette = np.concatenate([np.zeros((1, 3), np.uint8), palettes.distinct(255)])
        files["mask"] = mask_files.write_mask(folder / f"{stem}.png", numbers, palette)
    if overlay:
        from fcvit_jax.figures.overlay import draw_objects  # matplotlib is not needed for the rest

        picture = draw_objects(image, found.boxes, found.classes, class_names, found.scores, found.rles)
        files["overlay"] = mask_files.write_image(folder / f"{stem}_overlay.png", picture)
    return files


def make_program(
    model: nn.Module, variables: Mapping[str, Any], metadata: Mapping[str, Any], size: tuple[int, int] | None = None
) -> tuple[Callable[[jax.Array, jax.Array], dict[str, jax.Array]], jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The function that `export` writes, with the weights and the normalisation in it.

    Args:
      model: the network.
      variables: its variables.
      metadata: of the checkpoint; its "long" and "short" are used.
      size: (height, width) of the canvas, multiples of 32; None: that of wide images.

    Returns:
      The function from a canvas with an image at its top left, resized to fit it, and the image's size there to the
      objects in it, the best first: "boxes" (D, 4) float32 in pixels of the resized image, "scores" (D,) float32, 0 in
      unused places, "labels" (D,) int32 and, if the network has them, "masks" (D, 28, 28) float32, probabilities within
      each box; and the shapes of its arguments, (height, width, 3) uint8 and (2,) int32.

    Raises:
      UserError: the size is none of a canvas.
    """
    height, width = size = size or metadata["image_size"]
    if min(size) < ALIGNMENT or aligned(*size) != tuple(size):
        raise UserError(f"--size {height} {width}: both must be multiples of {ALIGNMENT} pixels.")

    def objects(image: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
        found = jax.tree.map(lambda x: x[0], detect(model, variables, image[None], size[None], jnp.ones((1, 4))))
        arrays = {"boxes": found.boxes, "scores": jnp.where(found.valid, found.scores, 0), "labels": found.labels}
        return arrays if found.masks is None else arrays | {"masks": found.masks}

    return objects, jax.ShapeDtypeStruct((height, width, 3), jnp.uint8), jax.ShapeDtypeStruct((2,), jnp.int32)
