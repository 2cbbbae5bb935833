"""COCO's folders: what training and evaluation take of them, and annotations as people have them."""

import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.data import coco, segments
from fcvit_jax.data.coco_eval import Detections, evaluate, to_results
from fcvit_jax.errors import UserError

WIDTH, HEIGHT = 80, 60
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 18, "name": "dog"}, {"id": 44, "name": "bottle"}]


def annotation(number, image, category, box, **more):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": [x, y, w, h], "area": w * h}
    return entry | {"iscrowd": 0, "segmentation": [polygon]} | more


CONTENT = {
    "images": [{"id": 10 * i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(1, 4)],
    "categories": CATEGORIES,
    "annotations": [
        annotation(1, 20, 18, [5, 6, 20, 30]),
        annotation(2, 10, 3, [1, 2, 10, 12.5]),
        annotation(3, 20, 44, [30, 20, 50, 40]),
        annotation(4, 30, 3, [0, 0, 80, 60]),
    ],
}


class Folder:
    """A COCO folder whose JSON files are written when it is opened, from `train` and `val`."""

    def __init__(self, path):
        self.path = path
        self.train, self.val = copy.deepcopy(CONTENT), copy.deepcopy(CONTENT)
        for split in ("train2017", "val2017"):
            (path / split).mkdir()
            for i in range(1, 4):
                self.image(f"{split}/{i}.jpg")
        (path / "annotations").mkdir()

    def image(self, name, width=WIDTH, height=HEIGHT, orientation=1):
        tags = Image.Exif()
        tags[0x0112] = orientation
        (self.path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (width, height)).save(self.path / name, exif=tags)

    def open(self, **options):
        for split, content in (("train2017", self.train), ("val2017", self.val)):
            (self.path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        return coco.open_folder(str(self.path), **options)

    def refused(self, *words, **options):
        with pytest.raises(UserError) as error:
            self.open(**options)
        message = str(error.value)
        assert "\n" not in message
        for word in words:
            assert word in message, message


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def boxes(source):
    return [record.boxes.tolist() for record in source.read(range(len(source)))]


def test_what_is_read(folder):
    opened = folder.open()
    assert opened.class_names == ("cat", "dog", "bottle") and opened.notes == []
    train = pickle.loads(pickle.dumps(opened.train))
    assert len(train) == len(opened.eval) == 3
    assert [train.image_id(index) for index in range(3)] == [10, 20, 30]
    assert train.category_ids == (3, 18, 44) and train.sizes.tolist() == [[WIDTH, HEIGHT]] * 3
    record = next(train.read([1]))
    assert record.encoded == (folder.path / "train2017" / "2.jpg").read_bytes()
    assert train.describe(1) == str(folder.path / "train2017" / "2.jpg")
    assert record.boxes.dtype == np.float32 and record.boxes.tolist() == [[5, 6, 25, 36], [30, 20, 80, 60]]
    assert record.classes.dtype == np.int32 and record.classes.tolist() == [1, 2]
    masks = segments.decode(record.rles, HEIGHT, WIDTH)
    assert masks.sum((1, 2)).tolist() == [600, 2000] and masks[0, 6:36, 5:25].all() and masks[1, 20:, 30:].all()

    truth = opened.eval.truth(0)
    assert truth.boxes.tolist() == [[1, 2, 10, 12.5]] and truth.areas.tolist() == [125]
    assert not opened.eval.truth(1).crowd.any() and opened.eval.truth(1).classes.tolist() == [1, 2]


def test_images_are_in_the_order_of_their_ids(folder):
    """So that equal scores of several images count in pycocotools' order."""
    expected = boxes(folder.open().eval)
    folder.val["images"].reverse()
    evaluation = folder.open().eval
    assert evaluation.image_ids == [10, 20, 30] and boxes(evaluation) == expected


def test_the_truth_has_an_average_precision_of_1_and_results_its_ids(folder):
    evaluation = folder.open().eval
    truths = [evaluation.truth(index) for index in range(3)]
    corners = [np.concatenate([t.boxes[:, :2], t.boxes[:, :2] + t.boxes[:, 2:]], 1) for t in truths]
    found = [Detections(c, np.ones(len(c)), t.classes, t.rles) for c, t in zip(corners, truths, strict=True)]
    for masks in (False, True):
        assert evaluate(truths, found, 3, masks=masks).summary["ap"] == pytest.approx(1)
    results = to_results(found, [evaluation.image_id(i) for i in range(3)], evaluation.category_ids)
    assert [(r["image_id"], r["category_id"]) for r in results] == [(10, 3), (20, 18), (20, 44), (30, 3)]


def test_training_file_may_be_absent(folder):
    for file in (folder.path / "train2017").iterdir():
        file.unlink()
    (folder.path / "train2017").rmdir()
    opened = folder.open(training=False)
    assert opened.train is None and len(opened.eval) == 3
    assert folder.open(training=False, class_names=("dog", "bottle", "cat")).eval.category_ids == (18, 44, 3)
    folder.refused("data.train_split=train2017", "annotations", "val2017")
    folder.refused("data.eval_split=test", training=False, eval_split="test")


def test_what_training_leaves_out(folder):
    """What MMDetection leaves out."""
    folder.train["annotations"] += [
        annotation(5, 20, 3, [2, 2, 9, 9], ignore=1),
        annotation(6, 20, 3, [80, 0, 10, 10]),
        annotation(7, 20, 3, [3, 3, 0.9, 20]),
        annotation(8, 20, 3, [3, 3, 9, 9], area=0),
        annotation(9, 20, 3, [4, 4, 9, 9], iscrowd=1),
        annotation(10, 20, 3, [70, 50, 20, 20]),  # reaches out of the image and is kept as it is
        annotation(11, 40, 3, [4, 4, 9, 9], iscrowd=1),
        annotation(12, 60, 3, [4, 4, 9, 9]),
    ]
    for number, (width, height) in ((4, (WIDTH, HEIGHT)), (5, (WIDTH, HEIGHT)), (6, (WIDTH, 31))):
        folder.image(f"train2017/{number}.jpg", width, height)
        entry = {"id": 10 * number, "file_name": f"{number}.jpg", "width": width, "height": height}
        folder.train["images"].append(entry)
    opened = folder.open()
    assert [opened.train.image_id(index) for index in range(len(opened.train))] == [10, 20, 30, 40]
    assert boxes(opened.train)[1] == [[5, 6, 25, 36], [30, 20, 80, 60], [70, 50, 90, 70]]
    assert boxes(opened.train)[3] == []  # of a crowd alone: trained on, without an object
    record = next(opened.train.read([3]))
    assert record.boxes.shape == (0, 4) and segments.decode(record.rles, HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH)
    (note,) = opened.notes
    for words in ("1 object outside", "2 objects under one pixel", "1 image without objects", "1 image with a side"):
        assert words in note


def test_evaluation_keeps_every_image_and_what_training_leaves_out(folder):
    folder.val["annotations"] = [
        annotation(1, 10, 3, [4, 4, 9, 9], iscrowd=1),
        annotation(2, 10, 3, [3, 3, 0.9, 20]),
    ]
    evaluation = folder.open().eval
    assert len(evaluation) == 3 and evaluation.truth(1).boxes.shape == (0, 4)
    assert evaluation.truth(0).crowd.tolist() == [True, False]


def test_sizes_of_images(folder):
    for name, size in (("2.jpg", (60, 80)), ("3.jpg", (60, 60))):
        folder.image(f"train2017/{name}", *size)
    for entry, size in zip(folder.train["images"], ((80, 60), (60, 80), (60, 60)), strict=True):
        entry["width"], entry["height"] = size
    assert folder.open().train.example_sizes.tolist() == [[80, 60], [60, 80], [60, 60]]


# Categories


def test_names_decide_not_ids_or_order(folder):
    folder.val["categories"] = [{"id": 0, "name": "bottle"}, {"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}]
    for entry in folder.val["annotations"]:
        entry["category_id"] = {3: 5, 18: 2, 44: 0}[entry["category_id"]]
    opened = folder.open()
    assert opened.train.category_ids == (3, 18, 44) and opened.eval.category_ids == (5, 2, 0)
    for index in range(3):
        assert opened.eval.truth(index).classes.tolist() == next(opened.train.read([index])).classes.tolist()


@pytest.mark.parametrize("name", ["none", "Background"])
def test_a_background_that_no_object_has_is_no_class(folder, name):
    for content in (folder.train, folder.val):
        content["categories"] = [{"id": 0, "name": name}, *content["categories"]]
    opened = folder.open()
    assert opened.class_names == ("cat", "dog", "bottle") and len(opened.notes) == 1 and name in opened.notes[0]
    folder.train["annotations"][0]["category_id"] = 0
    assert folder.open().class_names == (name, "cat", "dog", "bottle")


def test_categories_that_differ(folder):
    folder.val["categories"] = [*CATEGORIES, {"id": 50, "name": "horse"}]
    assert folder.open().class_names == ("cat", "dog", "bottle")
    folder.val["annotations"][0]["category_id"] = 50
    folder.refused("val2017.json", "horse", "cat, dog, bottle")
    folder.val["annotations"][0]["category_id"] = 18
    folder.val["categories"] = CATEGORIES[:2]
    opened = folder.open()
    assert opened.eval.category_ids == (3, 18, None) and any("bottle" in note for note in opened.notes)
    assert any("1 annotation whose category is not listed" in note for note in opened.notes)


@pytest.mark.parametrize(
    "categories, word",
    [
        ([{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}], "the id 3"),
        ([{"id": 3, "name": "cat"}, {"id": 4, "name": "cat"}], "called cat"),
        ([{"id": 3}], "id and a name"),
        ([], "no category"),
    ],
)
def test_broken_categories(folder, categories, word):
    folder.train["categories"] = categories
    folder.refused("train2017.json", word)


# Annotations


def test_annotations_of_what_is_not_listed_are_left_out_and_counted(folder):
    folder.train["annotations"] += [annotation(5, 99, 3, [1, 1, 9, 9]), annotation(6, 10, 99, [1, 1, 9, 9])]
    folder.train["annotations"] += [annotation(7, None, 3, [1, 1, 9, 9]), annotation(8, [1], 3, [1, 1, 9, 9])]
    opened = folder.open()
    assert boxes(opened.train) == boxes(folder.open().eval)
    (note,) = opened.notes
    assert "3 annotations whose image" in note and "1 annotation whose category" in note
    folder.train["annotations"] = folder.train["annotations"][4:]
    folder.refused("train2017.json", "no annotation")


@pytest.mark.parametrize("listed", [str, int, float])
@pytest.mark.parametrize("named", [str, int, float])
def test_ids_may_be_text_on_one_side_and_numbers_on_the_other(folder, listed, named):
    expected = boxes(folder.open().train)
    for content in (folder.train, folder.val):
        for entry in content["images"] + content["categories"]:
            entry["id"] = listed(entry["id"])
        for entry in content["annotations"]:
            entry.update(image_id=named(entry["image_id"]), category_id=named(entry["category_id"]))
        content["annotations"][0].pop("id")
    opened = folder.open()
    assert boxes(opened.train) == boxes(opened.eval) == expected and not opened.notes
    ids = str if listed is str else int
    assert opened.train.image_ids == [ids(10 * i) for i in (1, 2, 3)]
    assert opened.train.category_ids == tuple(ids(i) for i in (3, 18, 44))


def test_text_and_numbers_that_are_both_ids_stay_apart(folder):
    folder.train["images"][1]["id"] = "10"  # beside 10
    for entry in folder.train["annotations"]:
        entry["image_id"] = "10" if entry["image_id"] == 20 else entry["image_id"]
    opened = folder.open()
    assert opened.train.image_ids == [10, 30, "10"] and not opened.notes
    assert [len(found) for found in boxes(opened.train)] == [1, 1, 2]


def test_a_category_that_is_no_id_is_not_listed(folder):
    folder.train["annotations"][0]["category_id"] = [18]
    assert "1 annotation whose category" in " ".join(folder.open().notes)


def test_objects_without_an_outline(folder):
    del folder.train["annotations"][0]["segmentation"]
    folder.train["annotations"][1]["segmentation"] = []
    folder.val["annotations"][0]["segmentation"] = []
    opened = folder.open()
    assert boxes(opened.train) == [[], [[30, 20, 80, 60]], [[0, 0, 80, 60]]]
    assert len(opened.notes) == 1 and "2 objects without an outline" in opened.notes[0]
    assert opened.eval.truth(1).rles[0] is None and opened.eval.truth(1).rles[1] is not None
    opened = folder.open(masks=False)
    assert len(boxes(opened.train)[1]) == 2 and not opened.notes
    assert next(opened.train.read([1])).rles is None and opened.eval.truth(1).rles is None
    for entry in folder.train["annotations"]:
        entry["segmentation"] = []
    folder.refused("train2017.json", "data.masks=False")


def test_boxes_areas_and_crowds_that_are_missing(folder):
    expected = folder.open()
    for content in (folder.train, folder.val):
        for entry, key in zip(content["annotations"], ("bbox", "area", "iscrowd", "area"), strict=True):
            del entry[key]
        content["annotations"][3].update(segmentation=[[0, 0, 80, 0, 80, 30, 0, 30]], iscrowd=False)
    opened = folder.open()
    assert boxes(opened.train) == boxes(expected.train) and not opened.notes
    assert opened.eval.truth(0).areas.tolist() == [130]  # as many pixels have the mask of 10 x 12.5
    assert opened.eval.truth(2).areas.tolist() == [80 * 30]
    assert folder.open(masks=False).eval.truth(2).areas.tolist() == [80 * 60]
    folder.train["annotations"][3]["iscrowd"] = True
    assert boxes(folder.open().train)[2] == []
    del folder.train["annotations"][0]["segmentation"]
    opened = folder.open()
    assert "1 annotation with neither a box nor an outline" in opened.notes[0]


def test_objects_without_width_or_height(folder):
    for content in (folder.train, folder.val):
        content["annotations"] += [annotation(5, 10, 3, [5, 5, 0, 9]), annotation(6, 10, 3, [5, 5, 9, -1])]
    opened = folder.open()
    assert len(boxes(opened.train)[0]) == 1 and len(opened.eval.truth(0).boxes) == 1
    assert [note for note in opened.notes if "2 annotations of zero width or height" in note and "val2017" in note]


def test_ids_of_annotations_may_be_missing_or_equal(folder):
    expected = folder.open()
    for entry in folder.train["annotations"]:
        entry["id"] = 7
    del folder.train["annotations"][0]["id"]
    assert boxes(folder.open().train) == boxes(expected.train)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"bbox": [1, 2, 3]}, "unlike [1, 2, 3]"),
        ({"bbox": [1, 2, 3, None]}, "annotation 2 of image 10"),
        ({"bbox": [1, 2, float("nan"), 4]}, "its bbox"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "x1, y1, x2, y2"),
        ({"segmentation": {"size": [60, 80], "counts": [100]}}, "add up to 4800"),
        ({"segmentation": {"size": [30, 40], "counts": [1200]}}, "[60, 80]"),
        ({"segmentation": {"size": 60, "counts": [100]}}, "the size 60"),
        ({"segmentation": {"counts": [100]}, "bbox": None}, "the size None"),
        ({"segmentation": "polygon"}, "x1, y1, x2, y2"),
        ({"segmentation": 5}, "x1, y1, x2, y2"),
        ({"segmentation": [[[1, 2], [3, 4], [5, 6]]]}, "x1, y1, x2, y2"),
        ({"segmentation": [{"x": 1, "y": 2}] * 3}, "x1, y1, x2, y2"),
        ({"bbox": {"x": 1}}, "[x, y, width, height]"),
        ({"bbox": [1, 2, 3, 10**400]}, "annotation 2 of image 10"),
        ({"area": "large"}, "annotation 2 of image 10"),
    ],
)
def test_annotations_that_are_not_as_cocos(folder, change, word):
    folder.train["annotations"][1].update(change)
    folder.refused("train2017.json", word)


# Images


@pytest.mark.parametrize(
    "change, word",
    [
        ({"width": 160, "height": 120}, "2.jpg (160x120, the file 80x60)"),
        ({"id": 10}, "stand twice: 10"),
        ({"id": None}, "id and a file_name"),
        ({"file_name": "x.jpg"}, "lacks 1 image that"),
    ],
)
def test_broken_images(folder, change, word):
    folder.train["images"][1].update(change)
    folder.refused("train2017", word)


def test_unreadable_and_missing_images(folder):
    (folder.path / "val2017" / "2.jpg").write_bytes(b"no image")
    folder.refused("val2017", "1 file", "2.jpg")
    for i in range(1, 4):
        (folder.path / "train2017" / f"{i}.jpg").rename(folder.path / "train2017" / f"{i}.jpeg")
    folder.refused("lacks 3 images", "1.jpg, 2.jpg, 3.jpg")


def test_names_with_folders_and_backslashes(folder):
    names = ("images%2F1.jpg", "C:\\data\\images\\2.jpg", "/home/someone/coco/part/3.jpg")
    for entry, name in zip(folder.train["images"], names, strict=True):
        entry["file_name"] = name
    folder.image("train2017/part/3.jpg", WIDTH, HEIGHT)
    opened = folder.open()
    assert opened.train.names == ["1.jpg", "2.jpg", "part/3.jpg"]
    assert len(opened.notes) == 1 and "3.jpg" in opened.notes[0]  # train2017/3.jpg is not listed


def test_ids_of_images_may_be_strings(folder):
    for content in (folder.train, folder.val):
        for entry in content["images"]:
            entry["id"] = f"image {entry['id']}"
        for entry in content["annotations"]:
            entry["image_id"] = f"image {entry['image_id']}"
    opened = folder.open()
    assert opened.eval.image_id(1) == "image 20" and len(boxes(opened.train)[1]) == 2


@pytest.mark.parametrize("change", [{"width": 0}, {"width": None, "height": None}, {"height": "60"}])
def test_sizes_that_are_missing(folder, change):
    folder.train["images"][1].update(change)
    opened = folder.open()
    assert opened.train.sizes.tolist() == [[WIDTH, HEIGHT]] * 3
    assert len(opened.notes) == 1 and "1 image: 2.jpg" in opened.notes[0]


def test_sizes_that_are_exchanged_are_those_of_the_file(folder):
    folder.train["images"][0].update(width=HEIGHT, height=WIDTH)
    opened = folder.open()
    assert opened.train.sizes.tolist() == [[WIDTH, HEIGHT]] * 3
    assert len(opened.notes) == 1 and "exchanges width and height of 1 image: 1.jpg" in opened.notes[0]


def test_annotations_of_an_image_turned_by_exif(folder):
    """The file is stored 60x80 and shown 80x60; image 2 has a box that fits only what is shown."""
    folder.image("train2017/2.jpg", HEIGHT, WIDTH, orientation=6)
    folder.refused("1 image: 2.jpg", "data.exif=True")
    opened = folder.open(exif=True)
    assert opened.train.sizes.tolist() == [[WIDTH, HEIGHT]] * 3 and not opened.notes
    folder.train["images"][1].update(width=HEIGHT, height=WIDTH)  # as stored; the boxes still say otherwise
    folder.refused("1 image: 2.jpg", "data.exif=True")

    folder.train["annotations"][2]["bbox"] = [20, 30, 40, 50]  # now a box that fits only what is stored
    folder.train["annotations"][2]["segmentation"] = [[20, 30, 60, 30, 60, 80]]
    opened = folder.open()
    assert opened.train.sizes[1].tolist() == [HEIGHT, WIDTH]
    assert len(opened.notes) == 1 and "data.exif=True" in opened.notes[0]
    folder.refused("1 image: 2.jpg", "data.exif=False", exif=True)

    folder.image("train2017/2.jpg", WIDTH, HEIGHT)  # turned, and no EXIF that would explain it
    folder.refused("1 image: 2.jpg", "Turn the files")


def test_run_length_masks_tell_how_an_image_was_turned(folder):
    folder.image("train2017/1.jpg", HEIGHT, WIDTH, orientation=8)
    pixels = np.zeros((1, HEIGHT, WIDTH), bool)
    pixels[0, 2:12, 1:11] = True
    (rle,) = segments.encode(pixels)
    rle["counts"] = rle["counts"].decode()
    folder.train["annotations"][1]["segmentation"] = rle
    folder.refused("1 image: 1.jpg", "data.exif=True")
    assert segments.decode(next(folder.open(exif=True).train.read([0])).rles, HEIGHT, WIDTH).sum() == 100


# Files


@pytest.mark.parametrize(
    "text, word",
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "images is missing"),
        ('{"images": []}', "annotations is missing"),
        ("\xff", "no JSON"),
    ],
)
def test_files_that_are_not_cocos(folder, text, word):
    folder.open()
    file = folder.path / "annotations" / "instances_train2017.json"
    file.write_text(text, "latin1")
    with pytest.raises(UserError, match=word):
        coco.open_folder(str(folder.path))


def test_nothing_to_train_on(folder):
    for entry in folder.train["annotations"]:
        entry["iscrowd"] = 1
    folder.refused("train2017", "no object to train on")
    folder.train["images"] = []
    folder.refused("train2017.json", "lists no image")
