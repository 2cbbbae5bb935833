"""The tools on a small detector: boxes and masks as the network gives them, pictures, programs and counts."""

import itertools
import json

import jax
import jax.export
import numpy as np
import pytest
import torch
from helpers import exit_of
from PIL import Image

from fcvit_jax import convert, export, predict, summary, visualize
from fcvit_jax.augment import objects, paired
from fcvit_jax.data import palettes, scenes, segments
from fcvit_jax.figures import detection as figures
from fcvit_jax.figures import overlay
from fcvit_jax.networks.fcvit import abstract_variables
from fcvit_jax.networks.masks import paste_masks
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.run import saved
from fcvit_jax.run.checkpoint import save_variables
from fcvit_jax.summary import summarize
from fcvit_jax.tasks import detection
from fcvit_jax.tasks import detection_prediction as prediction

MODEL = {
    "name": "fcvit_tiny",
    "num_classes": 3,
    "depths": [1, 0, 0, 0],
    "dims": [8, 8, 16, 16],
    "mlp_ratios": [2, 1, 1, 1],
    "kernel_sizes": [3],
    "neck_channels": 8,
    "box_channels": 16,
    "nms_pre": 40,
    "proposals": 30,
    "max_detections": 12,
    "roi_chunk": 30,
}
NAMES = ["ant", "bee", "c_t"]
ABOUT = {"class_names": NAMES, "category_ids": [3, 1, 7], "long": 96, "short": 64, "exif": False}
METADATA = {"task": "detection", "model": MODEL, **ABOUT}
MATRICES = palettes.PROTANOPIA, palettes.DEUTERANOPIA
SIZES = ((50, 70), (48, 48))  # height and width of the images: a wide one, and a square one


def random_variables(model):
    """Of which scales and variances are near 1, boxes are moved little, and every class has its turn."""
    rng = np.random.default_rng(3)

    def values(path, leaf):
        names = [key.key for key in path]
        x = rng.normal(0, 0.1 if names[-1] in ("bias", "mean") else 0.3, leaf.shape)
        if names[-1] == "var" or "scale" in names[-1]:
            return (np.exp(x) if names[-1] == "var" else x + 1).astype(np.float32)
        return (x * (0.1 if "deltas" in names else 0.4 if "logits" in names else 1)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, abstract_variables(model))


@pytest.fixture(scope="module")
def variables():
    return random_variables(detection.create_model(**MODEL))


@pytest.fixture(scope="module")
def folder(variables, tmp_path_factory):
    """A run's folder with a checkpoint, two images, and what the network finds in each alone."""
    path = tmp_path_factory.mktemp("detector")
    save_variables(path / "run/best", variables, METADATA)
    data = {"dataset": "digit_scenes", "batch_size": 2, "long": 96, "short": 64}
    (path / "run/config.json").write_text(json.dumps({"task": "detection", "data": data}))
    (path / "photos").mkdir()
    model, rng, expected = detection.create_model(**MODEL), np.random.default_rng(1), []
    apply = jax.jit(model.apply)
    for i, (height, width) in enumerate(SIZES):
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
        small.resize((width, height), Image.BICUBIC).save(path / f"photos/{i}.png")
        image = np.asarray(Image.open(path / f"photos/{i}.png"))
        size = paired.rescaled_size(width, height, 96, 64)
        pixels = normalize(paired.resize(image, size))
        rows, columns = -size[1] % 32, -size[0] % 32
        alone = np.pad(pixels, ((0, rows), (0, columns), (0, 0)))[None]
        scale = np.array([[size[0] / width, size[1] / height] * 2], np.float32)
        found = jax.device_get(apply(variables, alone, np.array([size[::-1]], np.int32), scale))
        expected.append(jax.tree.map(lambda x, used: x[used], found, type(found)(*[found.valid] * 5)))
    return path, expected


def predictions(capsys, folder, *options):
    assert exit_of(predict.main, "--checkpoint", folder / "run/best", folder / "photos", "--json", *options) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_objects_are_those_that_the_network_finds_in_each_image_alone(folder, capsys):
    path, expected = folder
    lines = predictions(capsys, path, "--threshold", 0, "--rle")
    for i, (line, found, size) in enumerate(zip(lines, expected, SIZES, strict=True)):
        rows = line["predictions"]
        assert line["image"] == str(path / f"photos/{i}.png") and len(rows) > 3
        assert [row["index"] for row in rows] == found.labels.tolist()
        assert [row["class"] for row in rows] == [NAMES[label] for label in found.labels]
        np.testing.assert_allclose([row["score"] for row in rows], found.scores, atol=1e-5)
        np.testing.assert_allclose([row["box"] for row in rows], found.boxes, atol=1e-3)
        assert np.max(found.boxes, 0)[2] > 0.6 * size[1]  # in pixels of the image
        for row, mask in zip(rows, paste_masks(found.masks, found.boxes, size), strict=True):
            rle = row["mask"] | {"counts": row["mask"]["counts"].encode()}
            assert (segments.decode([rle], *size)[0] != mask).sum() <= 2
    assert len({row["index"] for line in lines for row in line["predictions"]}) > 1


def test_objects_below_the_threshold_are_left_out(folder, capsys):
    path, expected = folder
    threshold = float(np.median(np.concatenate([found.scores for found in expected])))
    scores = [[row["score"] for row in line["predictions"]] for line in predictions(capsys, path, "--threshold", 0)]
    lines = predictions(capsys, path, "--threshold", threshold)
    for row, line in zip(scores, lines, strict=True):
        assert [found["score"] for found in line["predictions"]] == [score for score in row if score >= threshold]
    assert sum(map(len, scores)) > sum(len(line["predictions"]) for line in lines) > 0
    assert all("mask" not in row for line in lines for row in line["predictions"])
    args = "--checkpoint", path / "run/best", path / "photos"
    assert exit_of(predict.main, *args, "--threshold", threshold) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["image", "class", "score", "box"]
    assert len(table) == 1 + sum(max(len(line["predictions"]), 1) for line in lines)
    first = lines[0]["predictions"][0]
    box = [f"{x:.0f}" for x in first["box"]]
    assert table[1].split() == [lines[0]["image"], first["class"], f"{first['score']:.2%}", *box]
    assert exit_of(predict.main, *args, "--threshold", 1) == 0
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()] == [["nothing", "found"]] * 2


def test_few_programs_serve_all_sizes(variables, folder):
    canvases = {}
    for height, width in itertools.product(range(1, 140, 3), repeat=2):
        new = paired.rescaled_size(width, height, 96, 64)[::-1]
        canvases.setdefault(prediction._canvas(new, 64, 96), []).append(new)
    assert canvases.keys() == {(64, 64), (64, 96), (96, 64)}
    assert all((np.max(sizes, 0) <= canvas).all() for canvas, sizes in canvases.items())
    assert prediction._canvas((700, 700), 700, 1000) == (704, 704)
    model, before = detection.create_model(**MODEL), prediction._detect.jitted()._cache_size()
    for size in ((20, 60), (63, 64), (50, 50), (7, 7)):
        list(detection.predict(model, variables, [np.zeros((*size, 3), np.uint8)], METADATA))
    assert prediction._detect.jitted()._cache_size() - before <= 2


def test_pictures(folder, tmp_path, capsys):
    path, expected = folder
    lines = predictions(capsys, path, "--threshold", 0, "--rle", "--masks", tmp_path / "out", "--overlay")
    for i, (line, size) in enumerate(zip(lines, SIZES, strict=True)):
        assert (line["mask"], line["overlay"]) == tuple(str(tmp_path / f"out/{i}{x}.png") for x in ("", "_overlay"))
        numbers = np.asarray(Image.open(line["mask"]))
        assert numbers.shape == size and Image.open(line["mask"]).mode == "P"
        rles = [row["mask"] | {"counts": row["mask"]["counts"].encode()} for row in line["predictions"]]
        masks = segments.decode(rles, *size)
        assert np.array_equal(numbers, np.where(masks.any(0), masks.argmax(0) + 1, 0)) and numbers.max() > 1
        image, overlay = (np.asarray(Image.open(path).convert("RGB")) for path in (line["image"], line["overlay"]))
        factor = -(-480 // max(size))
        assert overlay.shape == (factor * size[0], factor * size[1], 3)
        changed = np.abs(overlay - np.float32(Image.fromarray(image).resize(overlay.shape[1::-1], Image.BICUBIC))) > 0
        inside = numbers.repeat(factor, 0).repeat(factor, 1) > 0
        assert changed[inside].any(-1).mean() > 0.99


def test_a_box_is_drawn_where_it_is_and_its_name_is_beside_it():
    image, names = np.full((600, 500, 3), 90, np.uint8), ["a", "b"]
    boxes = np.array([[100, 200, 300, 450]])
    picture = overlay.draw_objects(image, boxes, np.array([1]), names, np.array([0.5]))
    colour = overlay.colours(2)[1]
    assert picture.shape == image.shape and (picture[200, 150:300] == colour).all()  # beside the name
    assert (picture[449, 100:300] == colour).all() and (picture[200:450, 299] == colour).all()
    assert (picture[210:440, 110:290] == 90).all() and (picture[460:] == 90).all() and (picture[:, 310:] == 90).all()
    rows, columns = np.nonzero((picture[:200] != 90).any(-1))
    assert rows.min() > 170 and columns.min() == 100  # the name is above the box
    at_the_edge = overlay.draw_objects(image, np.array([[490, 0, 500, 9]]), np.array([0]), ["a long name"])
    assert (at_the_edge[:40, 350:] != 90).any()  # moved inside
    (rle,) = segments.encode(np.arange(600 * 500).reshape(1, 600, 500) < 500)
    masked = overlay.draw_objects(image, boxes, np.array([1]), names, rles=[rle])
    assert (masked[0] == (90 + colour.astype(int) + 1) // 2).all() and (masked[1] == 90).all()


def test_the_colours_of_classes_differ_to_every_sight():
    shown = overlay.colours(20)
    lab = [palettes._lab(palettes._linear(shown) @ np.transpose(m)) for m in (np.eye(3), *MATRICES)]
    apart = [np.linalg.norm(x[:, None] - x, axis=-1)[np.triu_indices(20, 1)].min() for x in lab]
    assert min(apart) > 12
    assert shown[:2].tolist() == [[0, 114, 178], [213, 94, 0]] and overlay.colours(1203).shape == (1203, 3)


def test_what_does_not_fit_a_detector_is_refused(folder, tmp_path, capsys):
    path, _ = folder
    args = "--checkpoint", path / "run/best", path / "photos"
    assert "has no --top" in exit_of(predict.main, *args, "--top", 2)
    assert "--threshold=30.0 must be from 0 to 1" in exit_of(predict.main, *args, "--threshold", 30)
    assert "--overlay needs --masks" in exit_of(predict.main, *args, "--overlay")
    model = detection.create_model(**MODEL | {"masks": False})
    variables = random_variables(model)
    save_variables(tmp_path / "boxes", variables, METADATA | {"model": MODEL | {"masks": False}})
    args = "--checkpoint", tmp_path / "boxes", path / "photos/0.png"
    assert "has no masks" in exit_of(predict.main, *args, "--rle")
    assert "has no masks" in exit_of(predict.main, *args, "--masks", tmp_path / "out")
    assert exit_of(predict.main, *args, "--masks", tmp_path / "out", "--overlay", "--threshold", 0) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["0_overlay.png"]


def test_a_picture_shows_truth_beside_prediction(folder, tmp_path, monkeypatch):
    path, _ = folder
    drawn, draw = [], figures.draw_detections
    monkeypatch.setattr(figures, "draw_detections", lambda *args: drawn.append(args) or draw(*args))
    args = "detections", "--checkpoint", path / "run/best", "--output", tmp_path / "a.png", "--threshold", 0
    assert "has 10 classes, the checkpoint 3" in exit_of(visualize.main, *args)
    names = [str(i) for i in range(10)]
    model = MODEL | {"num_classes": 10}
    metadata = METADATA | {"model": model, "class_names": names, "category_ids": list(range(10))}
    save_variables(path / "run/checkpoints/1", random_variables(detection.create_model(**model)), metadata)
    args = args[:2] + (path / "run/checkpoints/1",) + args[3:]
    visualize.main([str(arg) for arg in (*args, "--first", 3, "--count", 2)])
    assert Image.open(tmp_path / "a.png").size[0] > 500
    images, truths, found, class_names, titles = drawn[0]
    for i in range(2):
        scene = scenes.make_scene("validation", 3 + i)
        assert np.array_equal(images[i], scene.image) and np.array_equal(truths[i].classes, scene.classes)
    assert list(class_names) == names and "scene 3" in titles[0] and len(found[0].boxes)
    assert "not among the 400" in exit_of(visualize.main, *args, "--first", 399)
    assert "a segmenter is needed" in exit_of(visualize.main, "segmentation", *args[1:5])


def test_a_program_finds_what_predict_finds(folder, tmp_path):
    path, expected = folder
    args = "--checkpoint", path / "run/best"
    assert "multiples of 32" in exit_of(export.main, *args, tmp_path / "out", "--size", 64, 100)
    export.main([str(arg) for arg in (*args, tmp_path / "out", "--size", 96, 96)])
    about = json.loads((tmp_path / "out/model.json").read_text())
    assert about["canvas"] == [96, 96] and about["task"] == "detection"
    assert {key: about[key] for key in ABOUT} == ABOUT
    program = jax.export.deserialize((tmp_path / "out/model.jax_export").read_bytes())
    for i, found in enumerate(expected):
        image = np.asarray(Image.open(path / f"photos/{i}.png"))
        pixels, scale = objects.fit_image(image, about["long"], about["short"])
        size = np.array(pixels.shape[:2], np.int32)
        result = jax.device_get(program.call(objects.on_canvas(pixels, about["canvas"]), size))
        used = result["scores"] > 0
        assert used.sum() == len(found.scores) and result["labels"][used].tolist() == found.labels.tolist()
        np.testing.assert_allclose(result["scores"][used], found.scores, atol=1e-5)
        np.testing.assert_allclose(result["boxes"][used] / scale, found.boxes, atol=1e-3)
        np.testing.assert_allclose(result["masks"][used], found.masks, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "size", "parameters", "total", "parts"),
    [
        ("fcvit_s12", (800, 1280), 34_357_264, "224.0", None),
        ("fcvit_s12", (800, 1344), 34_357_264, "231.9", ("56.7", "54.8", "53.1", "14.3", "53.0")),
        ("fcvit_s24", (800, 1344), 46_615_664, "283.6", None),
    ],
)
def test_costs_are_those_of_the_specification(name, size, parameters, total, parts):
    costs = summarize(detection.create_model(name), size)
    assert costs["total"].parameters == parameters and f"{costs['total'].multiply_adds / 1e9:.1f}" == total
    heads = [2_623_488, 593_935, 14_306_705, 2_643_280]
    assert [part.parameters for part in costs.values()] == [parameters - sum(heads), *heads, parameters]
    if parts:
        assert tuple(f"{part.multiply_adds / 1e9:.1f}" for part in list(costs.values())[:-1]) == parts


def test_a_detector_is_summarised(folder, capsys):
    summary.main(["--checkpoint", str(folder[0] / "run/best")])
    out = capsys.readouterr().out
    assert "3 classes, float32, one image of 64 x 96" in out
    assert [line[:9].strip() for line in out.splitlines()[3:9]] == [
        *("backbone", "neck", "rpn", "box head", "mask head", "total")
    ]
    summary.main(["fcvit_tiny", "--task", "detection", "--image-size", "64x96"])
    assert "80 classes, float32, one image of 64 x 96" in capsys.readouterr().out


def test_metadata_that_a_checkpoint_lacks(folder, caplog):
    model = detection.create_model(**MODEL)
    metadata = detection.complete_metadata("x.pth", model, {})
    assert metadata["class_names"] == ["0", "1", "2"] and metadata["category_ids"] == [1, 2, 3]
    assert (metadata["long"], metadata["short"], metadata["exif"]) == (1333, 800, False)
    assert metadata["image_size"] == (800, 1344)
    assert "x.pth says nothing of category_ids, class_names, exif, long, short" in caplog.text
    metadata = detection.complete_metadata("x.pth", model.clone(num_classes=80), {"short": 640})
    assert (metadata["class_names"][0], metadata["category_ids"][-1], metadata["short"]) == ("person", 90, 640)


def test_mmdets_checkpoint_has_all_that_the_tools_need(tmp_path, caplog):
    model = detection.create_model(**MODEL | {"depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]})
    fresh = jax.device_get(detection.init_variables(model, jax.random.key(0)))
    state_dict = {name: torch.from_numpy(x) for name, x in convert.to_torch(fresh, model).items()}
    torch.save({"meta": {}, "state_dict": state_dict, "optimizer": {}}, tmp_path / "latest.pth")
    task, loaded, variables, metadata = saved.load(tmp_path / "latest.pth")
    assert task is detection and (loaded.num_classes, loaded.neck_channels, loaded.proposals) == (3, 8, 1000)
    assert (metadata["long"], metadata["short"], metadata["class_names"]) == (1333, 800, ["0", "1", "2"])
    jax.tree.map(np.testing.assert_array_equal, variables, fresh)
    assert "says nothing of category_ids, class_names, exif, long, short;" in caplog.text
