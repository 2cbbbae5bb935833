"""What the tools do with a segmenter: masks and shares, pictures, programs, counts, and mmseg's checkpoints."""

import json

import jax
import jax.export
import numpy as np
import pytest
import torch
from helpers import exit_of, save_images
from PIL import Image

from fcvit_jax import convert, export, predict, summary, visualize
from fcvit_jax.data import scenes
from fcvit_jax.figures import segmentation as figures
from fcvit_jax.networks.fcvit import abstract_variables
from fcvit_jax.run import saved
from fcvit_jax.run.checkpoint import save_variables
from fcvit_jax.summary import summarize
from fcvit_jax.tasks import segmentation

MODEL = {
    "name": "fcvit_tiny",
    "num_classes": 11,
    "depths": [1, 0, 0, 0],
    "dims": [8, 8, 16, 16],
    "mlp_ratios": [2, 1, 1, 1],
    "kernel_sizes": [3],
    "neck_channels": 8,
    "head_channels": 8,
}
NAMES = ["background", *"0123456789"]
PALETTE = [[i, 20 * i, 255 - i] for i in range(11)]
ABOUT = {"class_names": NAMES, "palette": PALETTE, "long": 128, "short": 64, "exif": False}
METADATA = {"task": "segmentation", "model": MODEL, **ABOUT}


@pytest.fixture(scope="module")
def variables():
    """Random, of which scales and variances are near 1, and every class has its turn."""
    rng = np.random.default_rng(0)

    def values(path, leaf):
        name = path[-1].key
        x = rng.normal(0, 0.1 if name in ("bias", "mean") else 0.3, leaf.shape)
        return (np.exp(x) if name == "var" else x + 1 if "scale" in name else x).astype(np.float32)

    model = segmentation.create_model(**MODEL)
    variables = jax.tree_util.tree_map_with_path(values, abstract_variables(model))
    noise = rng.normal(0, 1, (1, 64, 96, 3)).astype(np.float32)
    logits = np.asarray(jax.jit(model.apply)(variables, noise))
    variables["params"]["head"]["classifier"]["bias"] -= logits.mean((0, 1, 2))  # else one class would win everywhere
    return variables


@pytest.fixture(scope="module")
def folder(variables, tmp_path_factory):
    """A run's folder with a checkpoint, two images of different sizes, and the masks that are right for them."""
    path = tmp_path_factory.mktemp("segmenter")
    save_variables(path / "run/best", variables, METADATA)
    data = {"dataset": "digit_scenes", "batch_size": 2, "crop_size": 96, "long": 128, "short": 64}
    (path / "run/config.json").write_text(json.dumps({"task": "segmentation", "data": data}))
    save_images(path / "photos", 2)
    model = segmentation.create_model(**MODEL)
    apply = jax.jit(model.apply)
    masks = []
    for i in range(2):
        encoded = (path / f"photos/{i}.png").read_bytes()
        size = np.asarray(Image.open(path / f"photos/{i}.png")).shape[:2]
        images = segmentation.eval_image(encoded, 128, 64)[None]
        logits = apply(variables, (images / 255 - model.mean) / np.float32(model.std))
        logits = segmentation.resize_logits(segmentation.resize_logits(logits, images.shape[1:3]), size)
        masks.append(np.asarray(logits[0].argmax(-1)))
    return path, masks


def test_masks_and_shares_are_those_of_the_network(folder, tmp_path, capsys):
    path, masks = folder
    args = "--checkpoint", path / "run/best", path / "photos"
    assert exit_of(predict.main, *args, "--json", "--masks", tmp_path / "out", "--overlay") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for i, (line, mask) in enumerate(zip(lines, masks, strict=True)):
        assert (line["image"], line["mask"]) == (str(path / f"photos/{i}.png"), str(tmp_path / f"out/{i}.png"))
        image = Image.open(line["mask"])
        assert image.mode == "P" and (np.asarray(image) != mask).sum() <= 2
        assert np.reshape(image.getpalette(), (-1, 3))[:11].tolist() == PALETTE
        counts = np.bincount(np.asarray(image).ravel(), minlength=11)
        assert len(np.unique(mask)) > 1
        found = line["predictions"]
        assert {row["index"]: row["share"] for row in found} == {
            c: counts[c] / mask.size for c in np.flatnonzero(counts)
        }
        assert [row["share"] for row in found] == sorted((row["share"] for row in found), reverse=True)
        assert [row["class"] for row in found] == [NAMES[row["index"]] for row in found]
        mixed = np.asarray(Image.open(path / f"photos/{i}.png").convert("RGB")) / 2 + np.array(PALETTE)[image] / 2
        assert np.abs(np.asarray(Image.open(line["overlay"])) - mixed).max() <= 0.5
    assert exit_of(predict.main, *args) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["image", "class", "share"]
    assert table[1].split()[:2] == [lines[0]["image"], lines[0]["predictions"][0]["class"]]
    assert len(table) == 1 + sum(len(line["predictions"]) for line in lines)


def test_what_does_not_fit_a_segmenter_is_refused(folder, tmp_path):
    path, _ = folder
    args = "--checkpoint", path / "run/best", path / "photos"
    assert "has no --top" in exit_of(predict.main, *args, "--top", 2)
    assert "--overlay needs --masks" in exit_of(predict.main, *args, "--overlay")
    save_images(tmp_path / "0", 1)
    assert "of another image of that name" in exit_of(predict.main, *args, tmp_path / "0", "--masks", tmp_path / "out")
    (tmp_path / "file").touch()
    assert "cannot be written" in exit_of(predict.main, *args, "--masks", tmp_path / "file/out")


def test_a_picture_shows_images_labels_predictions_and_errors(folder, tmp_path, monkeypatch):
    path, _ = folder
    drawn, draw = [], figures.draw_segmentation
    monkeypatch.setattr(figures, "draw_segmentation", lambda *args: drawn.append(args) or draw(*args))
    args = "segmentation", "--checkpoint", path / "run/best", "--output", tmp_path / "a.png"
    visualize.main([str(arg) for arg in (*args, "--first", 3, "--count", 2)])
    assert Image.open(tmp_path / "a.png").size[0] > 500
    images, labels, predictions, names, palette, titles = drawn[0]
    for i in range(2):
        scene = scenes.make_scene("validation", 3 + i)
        assert np.array_equal(images[i], scene.image) and np.array_equal(labels[i], scene.labels)
        assert predictions[i].shape == (96, 96)
    assert (list(names), palette.tolist()) == (NAMES, PALETTE) and "scene 3" in titles[0]
    figure = draw(images, [np.full((96, 96), 255), labels[1]], [labels[0], labels[1]], names, palette, titles)
    errors = [row.images[0].get_array() for row in figure.axes[3::4]]
    assert (errors[0] == 150).all() and (errors[1] == 255).all()  # ignored; right
    assert "not among the 400" in exit_of(visualize.main, *args, "--first", 399)
    assert "--count=17" in exit_of(visualize.main, *args, "--count", 17)


def test_a_program_has_both_resizes_in_it(folder, variables, tmp_path):
    path, masks = folder
    height, width = masks[0].shape
    args = "--checkpoint", path / "run/best", tmp_path / "out", "--size", height, width
    export.main([str(arg) for arg in args])
    program = jax.export.deserialize((tmp_path / "out/model.jax_export").read_bytes())
    images = segmentation.eval_image((path / "photos/0.png").read_bytes(), 128, 64)[None]
    logits = np.asarray(program.call(images))
    assert logits.shape == (1, height, width, 11) and (logits[0].argmax(-1) != masks[0]).sum() <= 2
    about = json.loads((tmp_path / "out/model.json").read_text())
    assert about["size"] == [height, width] and about["palette"] == PALETTE and about["task"] == "segmentation"


@pytest.mark.parametrize(
    "name, backbone, neck, head",
    [
        ("fcvit_tiny", (4_464_264, "4.707"), (2_508_800, "13.099"), (1_643_158, "8.091")),
        ("fcvit_s12", (14_189_856, "13.815"), (2_623_488, "13.355"), (1_643_158, "8.091")),
        ("fcvit_s24", (26_448_256, "26.419"), (2_623_488, "13.355"), (1_643_158, "8.091")),
        ("fcvit_s48", (50_965_056, "51.626"), (2_623_488, "13.355"), (1_643_158, "8.091")),
    ],
)
def test_costs_are_those_of_the_specification(name, backbone, neck, head):
    parts = summarize(segmentation.create_model(name), 512)
    expected = dict(zip(("backbone", "neck", "head"), (backbone, neck, head), strict=True))
    for part, costs in expected.items():
        assert (parts[part].parameters, f"{parts[part].multiply_adds / 1e9:.3f}") == costs
    assert parts["total"].parameters == sum(parameters for parameters, _ in expected.values())


def test_a_segmenter_is_summarised(folder, capsys):
    summary.main(["--checkpoint", str(folder[0] / "run/best")])
    out = capsys.readouterr().out
    assert "11 classes, float32, one image of 64 x 64" in out
    assert [line.split()[0] for line in out.splitlines()[3:7]] == ["backbone", "neck", "head", "total"]
    summary.main(["fcvit_s12", "--task", "segmentation", "--image-size", "512"])
    assert "150 classes" in (out := capsys.readouterr().out) and "18,456,502" in out


def test_mmsegs_checkpoint_becomes_a_folder_that_predicts(folder, tmp_path, capsys):
    model = segmentation.create_model(**MODEL | {"depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]})
    fresh = jax.device_get(segmentation.init_variables(model, jax.random.key(0)))
    state_dict = {name: torch.from_numpy(x) for name, x in convert.to_torch(fresh, model).items()}
    torch.save({"meta": {}, "state_dict": state_dict, "optimizer": {}}, tmp_path / "latest.pth")
    convert.convert(tmp_path / "latest.pth", tmp_path / "converted")
    task, loaded, variables, metadata = saved.load(tmp_path / "converted")
    assert task is segmentation and loaded == model and metadata["task"] == "segmentation"
    assert (metadata["long"], metadata["short"], metadata["class_names"][3]) == (2048, 512, "3")
    jax.tree.map(np.testing.assert_array_equal, variables, fresh)
    assert "says nothing of class_names, exif, long, palette, short;" in capsys.readouterr().err
    args = "--checkpoint", tmp_path / "converted", folder[0] / "photos/0.png", "--json"
    assert exit_of(predict.main, *args) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["share"] > 0
