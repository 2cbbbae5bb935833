"""How examples of detection are made of images and their objects: resized, flipped, on a canvas, masks in few bytes."""

from collections.abc import Iterable

import numpy as np

from fcvit_jax.augment import objects, paired
from fcvit_jax.data import coco, image_files, scenes, segments
from fcvit_jax.data.loader import Data, Example
from fcvit_jax.errors import Unreadable, UserError

NOISE_OBJECTS = 7  # in a synthetic image, as in one of COCO on average


def load_example(data: Data, record: coco.Record, rng: np.random.Generator | None) -> Example:
    """Decodes and transforms an image with its objects.

    Args:
      data: from `open_dataset`.
      record: the encoded image and its objects.
      rng: the source of randomness in training; None: the transforms of evaluation.

    Returns:
      "image" uint8 (H, W, 3), the image at the top left of a canvas, and "size" int32 (2,), its height and width. In
      training further "boxes" float32 (G, 4), "labels" int32 (G,) and "valid" bool (G,), with G = max_objects; and,
      with masks, "masks" uint8 (G, h, w / 8), eight pixels a byte, "rows" int32 (H,) and "columns" int32 (W,): as in
      `networks.objects.Objects`. In evaluation further "scale" float32 (4,), as `objects.fit_image` gives it, and
      "index" int32 (), the example's.

    Raises:
      Unreadable: the image is broken, or has no longer the size that it had when the dataset was opened.
    """
    try:
        image = image_files.decode(record.encoded, data.options["exif"])
    except UserError as error:
        raise Unreadable(f"not a readable image: {error}") from error
    width, height = record.size
    if image.shape[:2] != (height, width):
        raise Unreadable(f"it has {image.shape[1]} x {image.shape[0]} pixels now, and had {width} x {height}")
    if rng is None:
        return _eval_example(data, record.index, image)
    rles = record.rles if data.options["masks"] else ()
    masks = (segments.decode([rle], height, width)[0] for rle in rles)  # one by one: those of photographs are large
    return _train_example(data, image, record.boxes, record.classes, masks, rng)


def load_scene(data: Data, record: tuple[str, int], rng: np.random.Generator | None) -> Example:
    """A scene of digits, as `load_example`: in training a new one, of `rng` alone."""
    scene = scenes.make_scene(*record, rng)
    if rng is None:
        return _eval_example(data, record[1], scene.image)
    return _train_example(data, scene.image, scene.boxes, scene.classes, scene.masks, rng)


def load_noise(data: Data, record: int, rng: np.random.Generator | None) -> Example:
    """A synthetic example, as `load_example`: noise with some rectangles, of the record's number alone."""
    options, noise = data.options, np.random.default_rng(record)
    width, height = options["long"], options["short"]
    image = noise.integers(0, 256, (height, width, 3), np.uint8)
    if rng is None:
        return _eval_example(data, record, image)
    x, y = (np.sort(noise.integers(0, side - 1, (NOISE_OBJECTS, 2)), axis=1) + [0, 1] for side in (width, height))
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    masks = np.zeros((NOISE_OBJECTS, height, width), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    classes = noise.integers(data.num_classes, size=NOISE_OBJECTS)
    return _train_example(data, image, boxes.astype(np.float32), classes, masks, rng)


def _eval_example(data: Data, index: int, image: np.ndarray) -> Example:
    pixels, scale = objects.fit_image(image, data.options["long"], data.options["short"])
    canvas = data.options["eval_canvases"][image.shape[1] > image.shape[0]]
    size = np.array(pixels.shape[:2], np.int32)
    return {"image": objects.on_canvas(pixels, canvas), "size": size, "scale": scale, "index": np.int32(index)}


def _train_example(
    data: Data,
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    masks: Iterable[np.ndarray],
    rng: np.random.Generator,
) -> Example:
    """An example of training, from boxes (n, 4) and n masks (H, W) in pixels of the image."""
    options, number = data.options, min(len(boxes), data.options["max_objects"])
    pixels, _ = objects.fit_image(image, options["long"], options["short"])
    wide = image.shape[1] > image.shape[0]
    canvas = options["train_canvases"][wide]
    boxes = objects.resize_boxes(boxes[:number], image.shape[1::-1], pixels.shape[1::-1])
    flipped = rng.random() < options["flip"]
    if flipped:
        pixels, boxes = pixels[:, ::-1], objects.flip_boxes(boxes, pixels.shape[1])
    example = {
        "image": objects.on_canvas(pixels, canvas),
        "size": np.array(pixels.shape[:2], np.int32),
        "boxes": np.zeros((options["max_objects"], 4), np.float32),
        "labels": np.zeros(options["max_objects"], np.int32),
        "valid": np.arange(options["max_objects"]) < number,
    }
    example["boxes"][:number], example["labels"][:number] = boxes, classes[:number]
    if options["masks"]:
        sizes = options["mask_shapes"][wide], image.shape[:2], pixels.shape[:2], canvas
        example |= _stored_masks(masks, options["max_objects"], *sizes, flipped)
    return example


def mask_shape(width: int, height: int, long: int, short: int) -> tuple[int, int]:
    """(height, width) in which masks are stored: as their image was or as it is resized, whichever is smaller."""
    new = paired.rescaled_size(width, height, long, short)
    return min((width, height), new, key=lambda size: size[0] * size[1])[::-1]


def _stored_masks(
    masks: Iterable[np.ndarray],
    number: int,
    shape: tuple[int, int],
    old: tuple[int, int],
    new: tuple[int, int],
    canvas: tuple[int, int],
    flipped: bool,
) -> Example:
    """Masks in few bytes, and which of their pixels the image on the canvas shows.

    Args:
      masks: as the image was, bool (height, width) each; those beyond `number` are left out.
      number: of masks in the result.
      shape: (height, width) of the masks in the result.
      old, new: (height, width) of the image before and after it was resized.
      canvas: (height, width).
      flipped: whether it was flipped as well.
    """
    rows, columns = (objects.source_indices(*sides) for sides in zip(old, new, strict=True))
    shrunk = np.prod(new) < np.prod(old)
    bits = np.zeros((number, shape[0], -(-shape[1] // 8)), np.uint8)
    for place, mask in zip(bits, masks, strict=False):
        packed = np.packbits(mask[rows[:, None], columns] if shrunk else mask, axis=1)
        place[: packed.shape[0], : packed.shape[1]] = packed
    if shrunk:
        rows, columns = np.arange(new[0]), np.arange(new[1])
    shown = {"rows": rows, "columns": columns[::-1] if flipped else columns}
    for name, side in zip(("rows", "columns"), canvas, strict=True):
        shown[name] = np.pad(shown[name], (0, side - len(shown[name])), constant_values=-1).astype(np.int32)
    return {"masks": bits, **shown}
