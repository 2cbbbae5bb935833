"""Images that are not square, and what sizes may be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_exif import encoded

from fcvit_jax import augment
from fcvit_jax.augment.randaugment import RESAMPLE, draw_resample
from fcvit_jax.configs import imagenet
from fcvit_jax.data import loader
from fcvit_jax.errors import UserError
from fcvit_jax.networks import create_model, init_variables
from fcvit_jax.networks.vit import resize_positions
from fcvit_jax.run.config import check_config
from fcvit_jax.sizes import as_saved, check_size, describe_size, height_width
from fcvit_jax.tasks import classification
from fcvit_jax.visualize import _points


# Computed with the formulas of timm 1.0 (`transforms_imagenet_eval`, `ResizeKeepRatio`, `CenterCrop`).
@pytest.mark.parametrize(
    "width, height, image_size, crop_pct, size, box",
    [
        (500, 375, (192, 256), 0.9, (284, 213), (14, 10, 270, 202)),  # 10.5 -> 10
        (500, 375, (192, 256), 1.0, (256, 192), (0, 0, 256, 192)),
        (500, 375, (256, 128), 0.9, (379, 284), (126, 14, 254, 270)),  # 378.67 is rounded, 125.5 -> 126
        (375, 500, (192, 256), 0.9, (284, 379), (14, 94, 270, 286)),  # 93.5 -> 94
        (375, 500, (256, 128), 1.0, (192, 256), (32, 0, 160, 256)),
        (1000, 120, (192, 256), 0.9, (1775, 213), (760, 10, 1016, 202)),
        (33, 70, (256, 128), 0.9, (142, 301), (7, 22, 135, 278)),
    ],
)
def test_evaluation_of_images_that_are_not_square_has_timms_sizes(width, height, image_size, crop_pct, size, box):
    assert augment.eval_geometry(width, height, image_size, crop_pct) == (size, box)


def test_pixels_of_images_that_are_not_square():
    content = encoded(1)  # 64 x 40
    image = augment.decode(content)
    expected = image.resize((51, 32), Image.BICUBIC).crop((14, 2, 38, 30))  # 28 / 0.85 and 24 / 0.85 are 32 and 28
    np.testing.assert_array_equal(augment.eval_transform(content, (28, 24), 0.85), expected)
    rng = np.random.default_rng(1)
    box, resample = augment.crop_box(rng, 64, 40), draw_resample(rng)
    expected = image.crop(box).resize((24, 28), RESAMPLE[resample])
    trained = augment.train_transform(content, np.random.default_rng(1), (28, 24), flip=0.0, rand_augment=())
    np.testing.assert_array_equal(trained, expected)
    turned = augment.train_transform(encoded(6), np.random.default_rng(1), (28, 24), exif=True)
    assert turned.shape == (28, 24, 3)


def test_two_equal_numbers_are_a_square():
    content = encoded(1)
    for pair in ((24, 24), [24, 24]):
        np.testing.assert_array_equal(
            augment.eval_transform(content, pair, 0.9), augment.eval_transform(content, 24, 0.9)
        )
        assert as_saved(pair) == 24 and height_width(pair) == (24, 24)
    assert as_saved((24, 28)) == [24, 28] and describe_size([24, 28]) == "24 x 28" and describe_size(24) == "24 x 24"


@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
def test_data_and_metadata_of_images_that_are_not_square(digits_dir, dataset):
    options = dict(dataset=dataset, data_dir=digits_dir, batch_size=4, rand_augment=())
    data = classification.open_dataset(image_size=[12, 16], **options)
    assert data.about["image_size"] == [12, 16]
    assert loader.batch_shapes(data)[0]["image"].shape == (4, 12, 16, 3)
    assert next(loader.eval_batches(data))["image"].shape == (4, 12, 16, 3)
    assert classification.open_dataset(image_size=(12, 12), **options).about["image_size"] == 12


@pytest.mark.parametrize("size", [0, (32, 0), (32, 10**6), (32,), (32, 32, 3), 2.5, (32, 2.5), "32", True, None])
def test_what_is_no_size_is_refused_by_name(size):
    with pytest.raises(UserError, match="data.image_size="):
        check_size("data", image_size=size)
    with pytest.raises(UserError, match="data.image_size="):
        classification.open_dataset(dataset="synthetic", batch_size=4, image_size=size)


def test_the_recipe_takes_a_size_of_both_kinds():
    for size in ((192, 256), 160):
        config = imagenet.get_config()
        config.data.image_size = size
        check_config(config, classification)
        assert ConfigDict(config.data).to_dict()["image_size"] == size


def test_a_vit_has_positions_for_images_that_are_not_square():
    fields = dict(dim=12, depth=1, heads=3, patch_size=8)
    model = create_model("deit_tiny_patch16_224", 5, **fields, image_size=[16, 40])
    variables = init_variables(model, jax.random.key(0))
    positions = variables["params"]["pos_embed"]
    assert model.grid == (2, 5) and positions.shape == (11, 12)
    images = jax.random.normal(jax.random.key(1), (2, 16, 40, 3))
    logits = model.apply(variables, images)
    # As of a network for another grid, that has the positions as they are wanted here.
    square = create_model("deit_tiny_patch16_224", 5, **fields, image_size=32)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(square.apply(_with(variables, jnp.zeros((17, 12))), images), logits, rtol=1e-4)
    larger = jax.random.normal(jax.random.key(1), (2, 24, 48, 3))
    resized = resize_positions(positions, 1, (3, 6), (2, 5))
    own = create_model("deit_tiny_patch16_224", 5, **fields, image_size=(24, 48))
    np.testing.assert_allclose(
        model.apply(variables, larger), own.apply(_with(variables, resized), larger), rtol=1e-5, atol=1e-6
    )
    by_rows = positions[1:].reshape(2, 5, 12)
    expected = jax.image.resize(by_rows, (3, 6, 12), "cubic", antialias=True).reshape(-1, 12)
    np.testing.assert_allclose(resized[1:], expected, rtol=1e-6)


def _with(variables, positions):
    return {"params": {**variables["params"], "pos_embed": positions}}


def test_queries_are_pixels_of_height_and_width():
    assert _points([], (16, 40)) == [(20.5 / 40, 8.5 / 16)]
    assert _points(["15,39", "class"], (16, 40)) == [(39.5 / 40, 15.5 / 16), None]
    for query in ("16,0", "0,40"):
        with pytest.raises(UserError, match="16 x 40 pixels"):
            _points([query], (16, 40))
