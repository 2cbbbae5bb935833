"""Scenes of several handwritten digits on a coloured ground, drawn from scikit-learn's digits: nothing to download.

They serve semantic segmentation and object detection. Every sixth digit is kept for the scenes of validation, as in
`fcvit_jax.data.digits`; no digit of a training scene is seen there.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from fcvit_jax.data import segments
from fcvit_jax.data.coco_eval import Truth

SIZE = 96  # height and width of a scene in pixels
CLASS_NAMES = tuple("0123456789")
NUM_SCENES = {"train": 2000, "validation": 400}
OBJECTS = (2, 4)  # least and most digits in a scene
SCALE = (3.0, 6.0)  # pixels of the scene for one of the 8x8 pixels of a digit
DEGREES = 12.0  # largest rotation
MASK_ABOVE = 0.4  # of a digit's strongest ink
MOST_IOU = 0.15  # of two boxes
MOST_HIDDEN = 0.25  # share of a digit under later ones
BORDER = 2  # pixels of no ink around a digit, so that the bicubic filter ends softly and a rotation cuts nothing


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image and what is to be found in it; `n` objects in the order in which they were drawn.

    Attributes:
      image: uint8 (96, 96, 3), RGB.
      labels: uint8 (96, 96): 0 is background, c + 1 the digit c. Later digits hide earlier ones.
      boxes: float32 (n, 4): x1, y1, x2, y2 in pixels around the visible pixels of each object.
      classes: int32 (n,), the digits, 0 to 9.
      masks: bool (n, 96, 96), the visible pixels of each object.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    masks: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scenes:
    """One split as a source of examples; its records are (split, index), from which `make_scene` makes the scene.

    Attributes:
      split: "train" or "validation".
    """

    split: str

    def __len__(self) -> int:
        return NUM_SCENES[self.split]

    def read(self, indices: Sequence[int]) -> Iterator[tuple[str, int]]:
        return ((self.split, index) for index in indices)

    def describe(self, index: int) -> str:
        return f"scene {index} of digit_scenes {self.split}"

    @property
    def example_sizes(self) -> np.ndarray:
        """Width and height of every scene in pixels, int32 (n, 2)."""
        return np.full((len(self), 2), SIZE, np.int32)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The digits."""
        return tuple(range(len(CLASS_NAMES)))

    def image_id(self, index: int) -> int:
        return index

    def truth(self, index: int) -> Truth:
        """The objects of the fixed scene `index`, for COCO's evaluation."""
        scene = make_scene(self.split, index)
        low, high = scene.boxes[:, :2], scene.boxes[:, 2:]
        return Truth(
            boxes=np.concatenate([low, high - low], axis=1),
            classes=scene.classes,
            areas=scene.masks.sum((1, 2)),
            crowd=np.zeros(len(scene.classes), bool),
            rles=segments.encode(scene.masks),
        )


def make_scene(split: str, index: int, rng: np.random.Generator | None = None) -> Scene:
    """Makes one scene, in a millisecond or two.

    Example::

        fixed = make_scene("validation", 7)
        fresh = make_scene("train", 7, np.random.default_rng([seed, epoch, 7]))

    Args:
      split: "train" or "validation", which have no digit in common.
      index: of the scene in its split. It counts only where there is no `rng`.
      rng: the source of randomness, of which the scene is a pure function; one for each (seed, epoch, index) gives new
        scenes in every epoch. None: the fixed scene `index`, the same in every run and epoch.
    """
    validation = split == "validation"
    if rng is None:
        rng = np.random.default_rng([validation, index])
    pixels, digits = _digits(validation)
    while True:  # a scene whose last digit finds no place is given up
        scene = _draw_scene(rng, pixels, digits)
        if scene is not None:
            return scene


@functools.cache
def _digits(validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ink in 0 to 1, float32 (count, 12, 12) with the border, and digits int (count,) of one split."""
    from sklearn.datasets import load_digits  # slow to import

    loaded = load_digits()
    chosen = (np.arange(len(loaded.target)) % 6 == 5) == validation
    pixels = (loaded.images[chosen] / 16).astype(np.float32)
    return np.pad(pixels, ((0, 0), (BORDER, BORDER), (BORDER, BORDER))), loaded.target[chosen]


def _draw_scene(rng: np.random.Generator, pixels: np.ndarray, digits: np.ndarray) -> Scene | None:
    image = _background(rng)
    classes = []
    masks = np.zeros((0, SIZE, SIZE), bool)  # visible pixels
    areas = np.zeros(0)  # of the whole digits
    for _ in range(rng.integers(*OBJECTS, endpoint=True)):
        for _ in range(20):
            which = rng.integers(len(digits))
            ink = _place(rng, _scaled(rng, pixels[which]))
            mask = ink > MASK_ABOVE
            visible = np.concatenate([masks & ~mask, mask[None]])
            whole = np.append(areas, mask.sum())
            if _is_good(visible, whole):
                break
        else:
            return None
        masks, areas = visible, whole
        classes.append(digits[which])
        colour = rng.uniform(0.6, 1.0, 3)
        image += ink[..., None] * (colour - image)
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for mask, digit in zip(masks, classes, strict=True):
        labels[mask] = digit + 1
    return Scene(
        image=np.rint(image * 255).astype(np.uint8),
        labels=labels,
        boxes=_boxes(masks),
        classes=np.array(classes, np.int32),
        masks=masks,
    )


def _background(rng: np.random.Generator) -> np.ndarray:
    """Dark, smooth, coloured noise in 0 to 0.45: float64 (96, 96, 3)."""
    coarse = rng.uniform(0, 0.45, (6, 6, 3)).astype(np.float32)
    channels = [Image.fromarray(coarse[..., c]).resize((SIZE, SIZE), Image.BICUBIC) for c in range(3)]
    return np.stack([np.asarray(channel, float) for channel in channels], axis=-1).clip(0, 0.45)


def _scaled(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """One digit enlarged and turned, cut to the pixels that have ink: float32 (h, w) in 0 to 1."""
    scale = math.exp(rng.uniform(*np.log(SCALE)))
    angle = math.radians(rng.uniform(-DEGREES, DEGREES))
    size, middle = len(pixels), len(pixels) / 2
    side = math.ceil(size * scale)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    # Pillow wants the map from a point of the output to one of the input; the middles belong together.
    matrix = (cos, sin, middle - (cos + sin) * side / 2, -sin, cos, middle - (cos - sin) * side / 2)
    ink = np.asarray(Image.fromarray(pixels).transform((side, side), Image.AFFINE, matrix, Image.BICUBIC)).clip(0, 1)
    (top, bottom), (left, right) = (_extent((ink > 0.05).any(axis)) for axis in (1, 0))
    return ink[top:bottom, left:right]


def _place(rng: np.random.Generator, ink: np.ndarray) -> np.ndarray:
    """The ink somewhere on an empty scene, wholly inside."""
    height, width = ink.shape
    top, left = rng.integers(SIZE - height, endpoint=True), rng.integers(SIZE - width, endpoint=True)
    placed = np.zeros((SIZE, SIZE), np.float32)
    placed[top : top + height, left : left + width] = ink
    return placed


def _is_good(visible: np.ndarray, whole: np.ndarray) -> bool:
    """Whether enough of each object is seen, and no two boxes overlap much."""
    if (visible.sum((1, 2)) < (1 - MOST_HIDDEN) * whole).any():
        return False
    boxes = _boxes(visible)
    lower = np.maximum(boxes[:, None, :2], boxes[:, :2])
    upper = np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    shared = np.prod((upper - lower).clip(0), axis=-1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    iou = shared / (areas[:, None] + areas - shared)
    return bool((iou[np.triu_indices(len(boxes), 1)] <= MOST_IOU).all())


def _boxes(masks: np.ndarray) -> np.ndarray:
    """Boxes around masks: (n, 96, 96) bool to (n, 4) float32."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        box[[0, 2]] = _extent(mask.any(0))
        box[[1, 3]] = _extent(mask.any(1))
    return boxes


def _extent(used: np.ndarray) -> tuple[int, int]:
    """First and one past the last True."""
    return int(used.argmax()), len(used) - int(used[::-1].argmax())
