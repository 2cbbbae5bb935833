"""What the tools ask of segmentation: predictions for images of any size, as masks, shares and files."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fcvit_jax.augment import decode, paired
from fcvit_jax.data import image_files, mask_files, palettes
from fcvit_jax.devices import cpu
from fcvit_jax.errors import UserError, log
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.networks.semantic_fpn import resize_bilinear


def eval_image(encoded: bytes, long: int = 2048, short: int = 512) -> np.ndarray:
    """Decodes an image and resizes it as evaluation wants it; see `paired.eval_transform`.

    Example::

        pixels = eval_image(open("room.jpg", "rb").read())

    Args:
      encoded: an image file in any format Pillow reads.
      long, short: the longer and the shorter side, in pixels, that the image must not exceed after the first resize.

    Returns:
      (h, w, 3) uint8, RGB; h and w are multiples of 32.

    Raises:
      UserError: it is no image, or a broken one.
    """
    return paired.eval_transform(np.asarray(decode(encoded)), long, short)


def resize_logits(logits: jax.Array, size: Sequence[int]) -> jax.Array:
    """Resizes logits bilinearly, without antialiasing, also where they shrink.

    Args:
      logits: (N, h, w, classes) float.
      size: (height, width) of the result, in pixels.

    Returns:
      (N, height, width, classes) float32.
    """
    return resize_bilinear(logits.astype(jnp.float32), size)


def complete_metadata(source: Path, model: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a checkpoint with "class_names", "palette", "long", "short" and "exif"; says which it lacked.

    There is also "image_size" for tools that want one size: "short".

    Args:
      source: of the metadata, to be named.
      model: the network.
      metadata: as it was saved.
    """
    count = model.num_classes
    palette = palettes.ade20k() if count == 150 else palettes.distinct(count)
    usual = {"class_names": [str(i) for i in range(count)], "palette": palette.tolist()}
    usual |= {"long": 2048, "short": 512, "exif": False}
    if missing := sorted(usual.keys() - metadata.keys()):
        log.warning(
            "%s says nothing of %s; the defaults are numbered classes, %s colours and images that fit %d x %d pixels",
            *(source, ", ".join(missing), "ADE20K's" if count == 150 else "distinct", usual["long"], usual["short"]),
        )
    complete = usual | metadata
    return complete | {"image_size": complete["short"]}


def read_image(encoded: bytes, metadata: Mapping[str, Any]) -> np.ndarray:
    """Decodes an image as evaluation does: (H, W, 3) uint8, of the size that it has; `predict` resizes it.

    Raises:
      UserError: it cannot be read.
    """
    return image_files.decode(encoded, metadata["exif"])


@functools.partial(cpu.jit, static_argnames=("model", "size"))
def _classify(model: nn.Module, variables: Mapping[str, Any], image: jax.Array, size: tuple[int, int]) -> jax.Array:
    return full_logits(model, variables, image[None], size)[0].argmax(-1).astype(jnp.uint8)


def full_logits(model: nn.Module, variables: Mapping[str, Any], images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The logits at the size that images had before evaluation resized them: by way of the size that it gave them.

    Args:
      model: the network.
      variables: its variables.
      images: (N, h, w, 3) uint8, as `eval_image` makes them.
      size: (height, width) as they were.

    Returns:
      (N, height, width, classes) float32.
    """
    logits = model.apply(variables, normalize(images, model.mean, model.std))
    return resize_logits(resize_logits(logits, images.shape[1:3]), size)


def predict(
    model: nn.Module, variables: Mapping[str, Any], images: Iterable[np.ndarray], metadata: Mapping[str, Any]
) -> Iterator[np.ndarray]:
    """The class of every pixel of images, one image after the other.

    Args:
      model: the network.
      variables: its variables.
      images: each (H, W, 3) uint8, from `read_image`; of any sizes.
      metadata: of the checkpoint; its "long" and "short" are used.

    Yields:
      (H, W) uint8 for each image: classes from 0.
    """
    for image in images:
        aligned = paired.eval_transform(image, metadata["long"], metadata["short"])
        yield np.asarray(_classify(model, variables, aligned, image.shape[:2]))


def add_arguments(parser: Any) -> None:
    """The options of `predict_files` are also other tasks', and the tool adds them."""


def predict_files(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Iterable[tuple[Path, np.ndarray]],
    metadata: Mapping[str, Any],
    *,
    masks: Path | None = None,
    overlay: bool = False,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What the `predict` tool says of images, and the masks that it writes.

    Args:
      model, variables, metadata: as in `predict`.
      images: paths, and what `read_image` gave for them.
      masks: a folder to write NAME.png to, whose palette is the dataset's and whose indices are the classes from 0.
      overlay: write NAME_overlay.png too.

    Yields:
      For each image its path, and "predictions": for each class that it has, the largest share first, "class" (its
      name), "index" and "share" (of the pixels); and the paths "mask" and "overlay" of what was written.

    Raises:
      UserError: a file cannot be written, or two images have one name.
    """
    if overlay and masks is None:
        raise UserError("--overlay needs --masks FOLDER, to which it is written.")
    palette, written = np.array(metadata["palette"], np.uint8), set()
    for path, image in images:
        (mask,) = predict(model, variables, [image], metadata)
        counts = np.bincount(mask.ravel(), minlength=len(palette))
        found = [
            {"class": metadata["class_names"][i], "index": i, "share": int(counts[i]) / mask.size}
            for i in np.argsort(-counts, kind="stable").tolist()
            if counts[i]
        ]
        files = {}
        if masks is not None:
            mask_files.check_new(path, masks, written)
            files["mask"] = mask_files.write_mask(masks / f"{path.stem}.png", mask, palette)
            if overlay:
                picture = mask_files.lay_over(image, mask, palette)
                files["overlay"] = mask_files.write_image(masks / f"{path.stem}_overlay.png", picture)
        yield path, {"predictions": found, **{name: str(file) for name, file in files.items()}}


def make_program(
    model: nn.Module, variables: Mapping[str, Any], metadata: Mapping[str, Any], size: tuple[int, int] | None = None
) -> tuple[Callable[[jax.Array], jax.Array], jax.ShapeDtypeStruct]:
    """The function that `export` writes, with the weights, the normalisation and both resizes of the logits in it.

    Args:
      model: the network.
      variables: its variables.
      metadata: of the checkpoint; its "long" and "short" are used.
      size: (height, width) of the images as they are; None: "short" both.

    Returns:
      The function from images, as `eval_image` makes them of that size, to logits (N, height, width, classes) float32;
      and the images' shape, (N, h, w, 3) uint8 with any N.
    """
    height, width = size or (metadata["short"],) * 2
    aligned = paired.aligned_size(width, height, metadata["long"], metadata["short"])[::-1]

    def logits(images: jax.Array) -> jax.Array:
        return full_logits(model, variables, images, (height, width))

    return logits, jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *aligned, 3), jnp.uint8)
