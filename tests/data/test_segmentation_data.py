"""The datasets of segmentation: examples of folders and scenes, batches of equal shapes, and what is refused."""

import functools

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.augment import paired
from fcvit_jax.data import loader, scenes
from fcvit_jax.data.segmentation import open_dataset, read_pair
from fcvit_jax.errors import UserError

SIZES = [(80, 60), (64, 64), (81, 60), (60, 80), (128, 128), (100, 75)]  # width and height
SMALL = {"batch_size": 2, "crop_size": 32, "long": 128, "short": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and masks in the layout of ADE20K; 0 is "other", there are three classes, and 255 is ignored."""
    path = tmp_path_factory.mktemp("ade")
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (path / kind / split).mkdir(parents=True)
        for i, (width, height) in enumerate(SIZES):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path / f"images/{split}/{i}.png")
            mask = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (height, width))
            Image.fromarray(mask).save(path / f"annotations/{split}/{i}.png")
    (path / "classes.txt").write_text("wall\nsky\nfloor\n")
    return path


@pytest.fixture(scope="module")
def data(folder):
    return open_dataset(dataset=f"ade:{folder}", **SMALL)


def raw(folder, split, index):
    image = np.asarray(Image.open(folder / f"images/{split}/{index}.png"))
    return image, paired.ignore_zero(np.asarray(Image.open(folder / f"annotations/{split}/{index}.png")))


def test_batches_of_evaluation_have_every_image_at_its_size(folder, data):
    seen = []
    for batch in loader.eval_batches(data):
        shape = batch["image"].shape[1:3]
        for image, label, size, kept in zip(*(batch[k] for k in ("image", "label", "size", "mask")), strict=True):
            if not kept:
                continue
            index = SIZES.index(tuple(size[::-1].tolist()))
            pixels, labels = raw(folder, "validation", index)
            np.testing.assert_array_equal(image, paired.eval_transform(pixels, 128, 64))
            assert image.shape[:2] == shape
            np.testing.assert_array_equal(label[: labels.size].reshape(labels.shape), labels)
            assert (label[labels.size :] == 255).all()
            seen.append(index)
    assert sorted(seen) == list(range(len(SIZES)))
    shapes = {paired.eval_transform(raw(folder, "validation", i)[0], 128, 64).shape for i in range(len(SIZES))}
    assert len(loader.batch_shapes(data, training=False)) == len(shapes) == 3


def test_examples_of_training_are_those_of_the_transform(folder, data):
    (batch,) = loader.train_batches(data, 3, 0, 1)
    for row, index in enumerate(loader.train_order(data, 3, 0)[0]):
        transform = functools.partial(paired.train_transform, crop_size=32, long=128, short=64)
        expected = transform(*raw(folder, "training", index), np.random.default_rng([3, 0, index]))
        for name, x in zip(("image", "label", "size"), expected, strict=True):
            np.testing.assert_array_equal(batch[name][row], x)
    assert set(np.unique(batch["label"])) <= {0, 1, 2, 255}
    assert (data.class_names, len(data.about["palette"])) == (("wall", "sky", "floor"), 3)


def test_offsets_of_labels_are_applied_once_in_training_and_evaluation(folder):
    options = SMALL | {"crop_size": 64}
    data = open_dataset(dataset=f"ade:{folder}", scale=(1, 1), flip=0, distortion=False, **options)
    image, labels = read_pair(data, 1)  # which is 64 x 64 and stays so
    expected = raw(folder, "validation", 1)
    assert np.array_equal(image, expected[0]) and np.array_equal(labels, expected[1])
    for source, rng in ((data.eval, None), (data.train, np.random.default_rng(0))):
        (record,) = source.read([1])
        example = data.load_example(data, record, rng)
        found = example["label"][: 64 * 64] if rng is None else example["label"]
        split = "validation" if rng is None else "training"
        np.testing.assert_array_equal(found.reshape(64, 64), raw(folder, split, 1)[1])


def test_a_relative_path_starts_at_data_dir(folder):
    data = open_dataset(False, dataset=f"ade:{folder.name}", data_dir=str(folder.parent), **SMALL)
    assert data.num_eval == len(SIZES) and data.train is None


def test_scenes_are_new_in_training_and_fixed_in_evaluation():
    sizes = {"batch_size": 2, "crop_size": 96, "long": 96, "short": 96, "scale": (1, 1), "max_share": 1}
    data = open_dataset(dataset="digit_scenes", flip=0, distortion=False, **sizes)
    assert data.num_classes == 11 and data.eval_buckets is None and (data.num_train, data.num_eval) == (2000, 400)
    first, later = (next(iter(loader.train_batches(data, 0, step, 1))) for step in (0, 1000))
    assert not np.array_equal(first["image"], later["image"])
    index = loader.train_order(data, 0, 0)[0, 0]
    scene = scenes.make_scene("train", index, np.random.default_rng([0, 0, index]))
    np.testing.assert_array_equal(first["image"][0], scene.image)
    np.testing.assert_array_equal(first["label"][0], scene.labels)
    batch = next(iter(loader.eval_batches(data)))
    fixed = scenes.make_scene("validation", 1)
    np.testing.assert_array_equal(batch["image"][1], fixed.image)
    np.testing.assert_array_equal(batch["label"][1], fixed.labels.ravel())
    image, labels = read_pair(data, 1)
    assert np.array_equal(image, fixed.image) and np.array_equal(labels, fixed.labels)


def test_noise_is_one_batch():
    data = open_dataset(dataset="synthetic", batch_size=2, crop_size=64, long=64, short=64)
    first, second = loader.train_batches(data, 0, 0, 2)
    assert first is second and first["image"].shape == (2, 64, 64, 3) and data.num_classes == 150
    assert data.num_eval_batches == 1 and data.num_train == 20_210


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": "scene_parse150"}, "scene_parse150 has other labels .* ADEChallengeData2016.zip"),
        ({"dataset": "digit"}, "'digit' is unknown: choose ade:PATH, digit_scenes or synthetic"),
        ({"dataset": "digit_scenes", "crop_size": 512}, "crop_size=512 is larger than every image.* has 128 x 128"),
        ({"dataset": "digit_scenes", "batch_size": 3000}, "2000 training images, less than one batch"),
        ({"dataset": "digit_scenes", "scale": (2, 1)}, "data.scale="),
        ({"dataset": "digit_scenes", "long": 32}, "data.long=32 must be at least 64"),
        ({"dataset": "ade:nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_used_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        open_dataset(**SMALL | options)


def test_a_broken_image_is_named(folder, data):
    record = b"\xff\xd8 broken", np.zeros((4, 4), np.uint8)
    with pytest.raises(UserError, match="not a readable image"):
        data.load_example(data, record, None)
