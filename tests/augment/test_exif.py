"""The EXIF orientation of images, in classification: Pillow's `exif_transpose` is the reference."""

import io

import numpy as np
import pytest
from helpers import METADATA
from PIL import Image, ImageOps

from fcvit_jax import augment
from fcvit_jax.data import loader
from fcvit_jax.predict import read_image
from fcvit_jax.tasks import classification

OPTIONS = dict(crop_scale=(0.2, 0.6), crop_ratio=(0.5, 0.9), rand_augment=(2, 9.0, 0.5))


def encoded(orientation, format="jpeg", **options):
    """A photograph of 64 x 40 pixels as it is stored, of which no two corners are alike."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (5, 8, 3), np.uint8)).resize((64, 40), Image.BICUBIC)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, format, exif=exif.tobytes(), **options)
    return file.getvalue()


def upright(content):
    """The image as Pillow turns it, without loss and without EXIF."""
    file = io.BytesIO()
    ImageOps.exif_transpose(Image.open(io.BytesIO(content)).convert("RGB")).save(file, "bmp")
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_and_evaluation_see_the_image_upright(orientation):
    content = encoded(orientation)
    expected = upright(content)
    evaluated = augment.eval_transform(content, 24, 0.9, exif=True)
    np.testing.assert_array_equal(evaluated, augment.eval_transform(expected, 24, 0.9))
    for seed in range(4):
        trained = augment.train_transform(content, np.random.default_rng(seed), 24, exif=True, **OPTIONS)
        np.testing.assert_array_equal(
            trained, augment.train_transform(expected, np.random.default_rng(seed), 24, **OPTIONS)
        )
    as_stored = augment.eval_transform(encoded(1), 24, 0.9)
    np.testing.assert_array_equal(augment.eval_transform(content, 24, 0.9), as_stored)  # as by default
    assert np.array_equal(evaluated, as_stored) == (orientation == 1)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_other_formats_have_an_orientation_too(format):
    content = encoded(6, format, **({"lossless": True} if format == "webp" else {}))
    seen = augment.eval_transform(content, 24, 0.9, exif=True)
    np.testing.assert_array_equal(seen, augment.eval_transform(upright(content), 24, 0.9))
    assert not np.array_equal(seen, augment.eval_transform(content, 24, 0.9))


@pytest.mark.parametrize("content", [b"", b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_what_is_no_exif_turns_nothing(content):
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (90, 0, 0)).save(file, "jpeg", exif=content)
    assert augment.decode(file.getvalue(), exif=True).size == (30, 20)


def test_data_and_checkpoints_remember_it(tmp_path):
    content = encoded(6)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "1.jpg").write_bytes(content)
    seen = {}
    for exif in (False, True):
        data = classification.open_dataset(dataset=f"folder:{tmp_path}", batch_size=1, image_size=24, exif=exif)
        (batch,) = loader.eval_batches(data)
        (trained,) = loader.train_batches(data, 0, 0, 1)
        drawn = augment.train_transform(content, np.random.default_rng([0, 0, 0]), 24, exif=exif)
        np.testing.assert_array_equal(trained["image"][0], drawn)
        seen[exif] = batch["image"][0]
        assert data.about["exif"] is exif
        by_tool = read_image(tmp_path / "val/a/1.jpg", data.about)
        np.testing.assert_array_equal(by_tool, seen[exif])
    assert not np.array_equal(seen[False], seen[True])
    # A checkpoint of an older version does not say it; its run did not turn images.
    older = METADATA | {"image_size": 24, "crop_pct": 0.9}
    np.testing.assert_array_equal(read_image(tmp_path / "val/a/1.jpg", older), seen[False])
