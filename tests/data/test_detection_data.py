"""The datasets of detection: examples with boxes and masks, batches of one orientation, and what is refused or said."""

import io
import json
import logging
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image
from whole_masks import resize_masks

from fcvit_jax.augment import objects
from fcvit_jax.data import detection, loader, scenes, segments
from fcvit_jax.data.coco import Record
from fcvit_jax.data.detection_examples import load_example
from fcvit_jax.errors import UserError
from fcvit_jax.networks.masks import crop_masks

DATA = Path(__file__).parent / "detection_data.npz"
# Width and height. Those with a side above 96 shrink, the others grow.
SIZES = [(80, 60), (60, 80), (64, 64), (200, 150), (120, 160), (90, 60), (61, 90)]
LONG, SHORT = 96, 64
SMALL = {"batch_size": 2, "long": LONG, "short": SHORT, "max_objects": 4}


def polygon(x, y, width, height):
    """Of a triangle."""
    return [x, y, x + width, y + 0.3 * height, x + 0.2 * width, y + height]


def content(rng):
    """Every image has as many objects as its number says, modulo 4: images 0 and 4 have none."""
    annotations = []
    for image, (width, height) in enumerate(SIZES):
        for _ in range(image % 4):
            (x, y), size = rng.uniform(0, 0.4, 2) * (width, height), rng.uniform(0.3, 0.6, 2) * (width, height)
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": 7 * (1 + len(annotations) % 2)}
            entry |= {"bbox": [x, y, *size], "segmentation": [polygon(x, y, *size)], "area": size.prod() / 2}
            annotations.append(entry)
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(SIZES)]
    categories = [{"id": 14, "name": "dog"}, {"id": 7, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images with triangles in the layout of COCO."""
    path, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (path / split).mkdir()
        for i, (width, height) in enumerate(SIZES):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path / split / f"{i}.png")
        (path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content(rng)))
    return path


def opened(folder, **options):
    return detection.open_dataset(dataset=f"coco:{folder}", **SMALL | options)


@pytest.fixture(scope="module")
def data(folder):
    return opened(folder)


def raw(folder, split, number):
    return np.asarray(Image.open(folder / split / f"{number}.png"))


def full_masks(example):
    """The masks on the canvas, as `networks.objects.Objects` says that they are shown."""
    bits = np.unpackbits(example["masks"], axis=-1).astype(bool)
    shown = bits[:, example["rows"][:, None], example["columns"]]
    return shown & (example["rows"] >= 0)[:, None] & (example["columns"] >= 0)


@pytest.fixture(scope="module")
def golden_data():
    with np.load(DATA) as file:
        return dict(file)


@pytest.mark.parametrize("case", ["pipe0", "pipe1"])
def test_examples_equal_the_originals(golden_data, case):
    case = {key.split("/")[1]: value for key, value in golden_data.items() if key.startswith(case)}
    image, masks = case["image_rgb"], case["masks"].astype(bool)
    height, width = image.shape[:2]
    (short, long), file = sorted(case["scale"].tolist()), io.BytesIO()
    Image.fromarray(image).save(file, "png")
    canvas, wide = tuple(case["out_masks"].shape[1:]), width > height
    options = {"long": long, "short": short, "exif": False, "masks": True, "max_objects": 5}
    options |= {"flip": float(case["flip"]), "train_canvases": {wide: canvas}, "mask_shapes": {wide: (60, 53)}}
    data = loader.Data(load_example, None, None, (), 1, options=options)
    record = Record(0, file.getvalue(), (width, height), case["boxes"], np.array([4, 0, 2]), segments.encode(masks))
    example = load_example(data, record, np.random.default_rng(0))
    assert example["size"].tolist() == case["img_shape"].tolist()
    pixels = example["image"][: example["size"][0], : example["size"][1]]
    np.testing.assert_array_equal(pixels[:, ::-1] if case["flip"] else pixels, case["resized_rgb"])
    assert not example["image"][example["size"][0] :].any() and not example["image"][:, example["size"][1] :].any()
    np.testing.assert_array_equal(example["boxes"][:3], case["out_boxes"])
    np.testing.assert_array_equal(full_masks(example)[:3], case["out_masks"])
    assert example["labels"].tolist() == [4, 0, 2, 0, 0] and example["valid"].tolist() == [True] * 3 + [False] * 2
    assert not full_masks(example)[3:].any() and not example["boxes"][3:].any()


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_masks_are_stored_small_and_mean_the_same(folder, index, flip):
    """Whether the image grows or shrinks, whether it is flipped: the targets are those of the resized masks."""
    data = opened(folder, flip=flip)
    (record,) = data.train.read([index])
    example = data.load_example(data, record, np.random.default_rng(0))
    width, height = record.size
    new_height, new_width = example["size"].tolist()
    masks = resize_masks(segments.decode(record.rles, height, width), (new_width, new_height))
    masks = masks[:, :, ::-1] if flip else masks
    padded = np.zeros((len(masks), *example["image"].shape[:2]), bool)
    padded[:, :new_height, :new_width] = masks
    np.testing.assert_array_equal(full_masks(example)[: len(masks)], padded)
    stored = example["masks"].shape[1:]
    assert stored[0] * stored[1] * 8 <= (new_height + 7) * (new_width + 40)
    boxes, which = example["boxes"][: len(masks)], np.arange(len(masks))
    bits = np.unpackbits(example["masks"], axis=-1).astype(bool)
    shown = {"rows": example["rows"], "columns": example["columns"]}
    np.testing.assert_allclose(crop_masks(bits, boxes, which, **shown), crop_masks(padded, boxes, which), atol=1e-5)


def test_batches_are_of_one_orientation_and_a_function_of_seed_and_step(folder, data):
    assert (data.num_train, data.steps_per_epoch) == (5, 2 + 1)
    wide = data.train.example_sizes[:, 0] > data.train.example_sizes[:, 1]
    shapes = loader.batch_shapes(data)
    assert [x["image"].shape[1:3] for x in shapes] == [(96, 64), (64, 96)]
    seen = []
    for step, batch in enumerate(loader.train_batches(data, 3, 0, 6)):
        bucket = loader.train_bucket(data, 3, step)
        assert {name: x.shape for name, x in batch.items()} == {name: x.shape for name, x in shapes[bucket].items()}
        (alone,) = loader.train_batches(data, 3, step, 1)
        chex.assert_trees_all_equal(batch, alone)
        order = loader.train_order(data, 3, step // 3)[step % 3].tolist()
        assert {bool(x) for x in wide[order]} == {bool(bucket)}
        for row, index in enumerate(order):
            (record,) = data.train.read([index])
            expected = data.load_example(data, record, np.random.default_rng([3, step // 3, index]))
            chex.assert_trees_all_equal({name: x[row] for name, x in batch.items()}, expected)
        seen += order
    assert set(seen[:6]) == set(seen[6:]) == set(range(5))


def test_evaluation_has_every_image_once(folder, data):
    seen = []
    for batch in loader.eval_batches(data):
        for row in np.flatnonzero(batch["mask"]):
            index = int(batch["index"][row])
            width, height = SIZES[index]
            pixels, scale = objects.fit_image(raw(folder, "val2017", index), LONG, SHORT)
            size = batch["size"][row].tolist()
            assert list(pixels.shape[:2]) == size
            np.testing.assert_array_equal(batch["image"][row, : size[0], : size[1]], pixels)
            assert not batch["image"][row, size[0] :].any() and not batch["image"][row, :, size[1] :].any()
            np.testing.assert_array_equal(batch["scale"][row], scale)
            np.testing.assert_array_equal(scale, np.float32([size[1] / width, size[0] / height] * 2))
            seen.append(index)
    assert sorted(seen) == list(range(len(SIZES)))


def test_what_a_checkpoint_keeps(data):
    assert data.about == {
        "long": LONG,
        "short": SHORT,
        "exif": False,
        "class_names": ["dog", "cat"],
        "category_ids": [14, 7],
    }


def test_objects_beyond_the_most_are_counted_once(folder, caplog):
    with caplog.at_level(logging.WARNING):
        data = opened(folder, max_objects=3)
    assert "max_objects" not in caplog.text
    with caplog.at_level(logging.WARNING):
        opened(folder, max_objects=1)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "3 images with more than data.max_objects=1" in line and "4 of all 9 objects" in line and "are 3" in line
    (record,) = data.train.read([2])
    cut = opened(folder, max_objects=1)
    example = cut.load_example(cut, record, np.random.default_rng(0))
    assert example["valid"].tolist() == [True] and example["boxes"].shape == (1, 4)
    assert len(record.boxes) == 3 and example["labels"].tolist() == record.classes[:1].tolist()


def test_images_without_objects_are_left_out_or_are_background(folder):
    assert opened(folder).num_train == 5
    data = opened(folder, empty_images=True)
    assert data.num_train == len(SIZES) and data.train.example_counts.tolist() == [0, 1, 2, 3, 0, 1, 2]
    (record,) = data.train.read([0])
    example = data.load_example(data, record, np.random.default_rng(0))
    assert not example["valid"].any() and not example["masks"].any()


def test_boxes_alone(folder):
    data = opened(folder, masks=False)
    (batch,) = loader.train_batches(data, 0, 0, 1)
    assert batch.keys() == {"image", "size", "boxes", "labels", "valid"}
    assert data.eval.truth(3).rles is None


def test_images_are_turned_as_exif_says(tmp_path):
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir(parents=True)
        tags = Image.Exif()
        tags[0x0112] = 6
        pixels = np.zeros((60, 80, 3), np.uint8)
        pixels[:20, :30] = 255
        Image.fromarray(pixels).save(tmp_path / split / "0.png", exif=tags)
        about = {"images": [{"id": "a", "file_name": "0.png", "width": 60, "height": 80}], "categories": []}
        about["categories"] = [{"id": 1, "name": "cat"}]
        about["annotations"] = [{"image_id": "a", "category_id": 1, "segmentation": [[40, 0, 60, 0, 60, 30, 40, 30]]}]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(about))
    data = opened(tmp_path, exif=True, batch_size=1, flip=0.0)
    (batch,) = loader.train_batches(data, 0, 0, 1)
    x1, y1, x2, y2 = batch["boxes"][0, 0].round().astype(int)
    assert batch["image"][0, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() == 255 and data.eval.image_id(0) == "a"
    assert batch["image"][0, :, : x1 - 1].max() == 0
    assert detection.read_pair(data, 0)[0].shape == (80, 60, 3)


def test_scenes_are_new_in_training_and_fixed_in_evaluation():
    options = {"batch_size": 2, "long": 96, "short": 96, "flip": 0.0, "max_objects": 4}
    data = detection.open_dataset(dataset="digit_scenes", **options)
    assert data.class_names == tuple("0123456789") and data.train_buckets is None and data.eval_buckets is None
    (batch,) = loader.train_batches(data, 0, 1000, 1)
    index = loader.train_order(data, 0, 1)[0, 1]
    scene = scenes.make_scene("train", index, np.random.default_rng([0, 1, index]))
    number = len(scene.boxes)
    np.testing.assert_array_equal(batch["image"][1], scene.image)
    np.testing.assert_array_equal(batch["boxes"][1, :number], scene.boxes)
    np.testing.assert_array_equal(batch["labels"][1, :number], scene.classes)
    example = {name: x[1] for name, x in batch.items()}
    np.testing.assert_array_equal(full_masks(example)[:number], scene.masks)
    (evaluation, *_) = loader.eval_batches(data)
    image, truth = detection.read_pair(data, 1)
    np.testing.assert_array_equal(evaluation["image"][1], image)
    np.testing.assert_array_equal(segments.decode(truth.rles, 96, 96), scenes.make_scene("validation", 1).masks)


def test_noise_is_one_batch():
    data = detection.open_dataset(dataset="synthetic", batch_size=2, long=96, short=64, max_objects=9)
    first, second = loader.train_batches(data, 0, 0, 2)
    assert first is second and first["image"].shape == (2, 64, 96, 3) and data.num_classes == 80
    assert data.num_eval_batches == 1 and first["valid"].sum() == 14
    masks = full_masks({name: x[0] for name, x in first.items()})
    for mask, box in zip(masks[:7], first["boxes"][0].astype(int), strict=False):
        assert mask.sum() == mask[box[1] : box[3], box[0] : box[2]].sum() == (box[3] - box[1]) * (box[2] - box[0]) > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": "digit"}, "'digit' is unknown: choose coco:PATH, coco/2017, digit_scenes or synthetic"),
        ({"dataset": "digit_scenes", "batch_size": 3000}, "2000 training images, less than one batch"),
        ({"dataset": "synthetic", "max_objects": 0}, "data.max_objects=0 must be at least 1"),
        ({"dataset": "digit_scenes", "long": 32}, "data.long=32 must be at least 64"),
        ({"dataset": "digit_scenes", "max_objects": 3}, "data.max_objects=3 must be at least 4"),
        (
            {"dataset": "digit_scenes", "results": "nowhere/x.json"},
            "data.results=nowhere/x.json: there is no such folder",
        ),
        ({"dataset": "coco:nowhere"}, "data.train_split=train2017: nowhere must have"),
    ],
)
def test_what_cannot_be_used_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        detection.open_dataset(**SMALL | options)


def test_a_split_without_annotations_is_refused(folder, tmp_path):
    for name in ("train2017", "val2017"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        about = content(np.random.default_rng(0)) | ({"annotations": []} if split == "val2017" else {})
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="instances_val2017.json has no annotation") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_broken_images_end_a_run_or_are_left_out(folder, tmp_path, caplog):
    """One whose header is broken, when the folder is opened; one whose pixels are cut off, when it is its turn."""
    path = shutil.copytree(folder, tmp_path / "coco")
    cut = path / "train2017/5.png"
    cut.write_bytes(cut.read_bytes()[:-900])
    with pytest.raises(UserError, match="5.png: not a readable image"):
        list(loader.train_batches(opened(path), 0, 0, 3))
    (path / "train2017/1.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="1 file cannot be read as images: 1.png"):
        opened(path)
    with caplog.at_level(logging.INFO):
        data = opened(path, on_broken="skip")
        batches = list(loader.train_batches(data, 0, 0, data.steps_per_epoch))
    assert data.num_train == 4 and len(batches) == data.steps_per_epoch == 2
    assert "1 image: " in caplog.text and "5.png" in caplog.text


def test_a_broken_image_is_named(folder, data):
    (record,) = data.train.read([0])
    for changed, message in (
        (record._replace(encoded=b"\xff\xd8 broken"), "not a readable image"),
        (record._replace(size=(61, 80)), "60 x 80 pixels now, and had 61 x 80"),
    ):
        with pytest.raises(UserError, match=message):
            data.load_example(data, changed, None)
