"""TFDS's coco/2017, of which a miniature is written, as a source of boxes."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fcvit_jax.data import coco_names, detection, loader
from fcvit_jax.errors import UserError

SIZES = [(80, 60), (60, 80), (64, 64), (70, 50)]  # width and height
# Of every image: x1, y1, x2, y2 as shares, label, crowd.
OBJECTS = [
    [(0.1, 0.2, 0.5, 0.8, 3, False), (0.0, 0.0, 1.0, 0.5, 7, True)],
    [(0.25, 0.25, 0.75, 1.0, 79, False)],
    [],
    [(0.3, 0.1, 0.9, 0.9, 0, False), (0.5, 0.5, 0.505, 0.9, 1, False)],
]
SPLITS = {"train_split": "train", "eval_split": "validation"}
OPTIONS = {"dataset": "coco/2017", "batch_size": 2, "long": 96, "short": 64, "max_objects": 3, **SPLITS}


def examples():
    rng = np.random.default_rng(0)
    for number, (size, found) in enumerate(zip(SIZES, OBJECTS, strict=True)):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(file, "png")
        objects = [
            {
                "area": round((x2 - x1) * (y2 - y1) * size[0] * size[1]),
                "bbox": tfds.features.BBox(ymin=y1, xmin=x1, ymax=y2, xmax=x2),
                "id": i,
                "is_crowd": crowd,
                "label": label,
            }
            for i, (x1, y1, x2, y2, label, crowd) in enumerate(found)
        ]
        yield (
            number,
            {"image": file.getvalue(), "image/filename": f"{number}.png", "image/id": 100 + number}
            | {"objects": objects},
        )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Written by TFDS's own builder."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    builder = tfds.builder("coco/2017", data_dir=folder, file_format="array_record")

    def splits(builder, *_):
        builder.info.features["objects"]["label"].names = list(coco_names.NAMES)  # as TFDS's own function does
        return {"train": examples(), "validation": examples()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(builder), "_split_generators", splits)
        builder.download_and_prepare()
    return folder


def test_boxes_are_those_of_the_records(data_dir):
    data = detection.open_dataset(data_dir=data_dir, masks=False, flip=0.0, **OPTIONS)
    assert data.num_classes == 80 and data.class_names[3] == "motorcycle"
    assert (data.num_train, data.num_eval) == (3, 4)  # an image has no object
    for index in range(4):
        number = data.eval.image_id(index) - 100
        image, truth = detection.read_pair(data, index)
        assert image.shape[1::-1] == SIZES[number] and truth.rles is None
        expected = np.array(OBJECTS[number], float).reshape(-1, 6)
        assert truth.classes.tolist() == expected[:, 4].tolist() and truth.crowd.tolist() == expected[:, 5].tolist()
        corners = expected[:, :4] * np.tile(SIZES[number], 2)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        np.testing.assert_allclose(truth.boxes, boxes, atol=1e-4)
    assert data.eval.category_ids[-1] == 90
    seen = {}
    for batch in loader.train_batches(data, 0, 0, data.steps_per_epoch):
        for size, boxes, labels, valid in zip(*(batch[k] for k in ("size", "boxes", "labels", "valid")), strict=True):
            seen[tuple(labels[valid].tolist())] = boxes[valid] / np.tile(size[::-1], 2)
    # Crowds, and what is under one pixel wide, are not trained on.
    assert seen.keys() == {(3,), (79,), (0,)}
    np.testing.assert_allclose(seen[(79,)], [OBJECTS[1][0][:4]], atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "has no masks: set --config.model.masks=False, or use coco:PATH"),
        ({"masks": False, "exif": True}, "data.exif=True: the boxes of coco/2017"),
        ({"masks": False, "train_split": "train2017"}, "data.train_split=train2017: .* has train, validation"),
        ({"masks": False, "dataset": "coco/2014"}, "coco/2014 is not prepared in"),
    ],
)
def test_what_cannot_be_used_is_refused(data_dir, options, message):
    with pytest.raises(UserError, match=message):
        detection.open_dataset(data_dir=data_dir, **OPTIONS | options)
