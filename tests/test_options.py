"""The options that the README lists for data and runs of one's own, all at once, given as it writes them."""

import functools
import itertools
import json
import os
import re
import shlex
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from benchmarks.kill_resume import assert_same_end, record
from fcvit_jax import __main__ as main
from fcvit_jax import (
    augment,
    export,
    predict,
    summary,
    train,  # noqa: F401 its imports define flags, which flagsaver would forget otherwise
    visualize,
)
from fcvit_jax.evaluate import evaluate_checkpoint
from fcvit_jax.freezing import frozen
from fcvit_jax.predict import read_image
from fcvit_jax.run.saved import load, load_metadata, load_variables
from fcvit_jax.train import train_and_evaluate

ROOT = Path(__file__).parent.parent
STEPS = 6
pytestmark = [
    pytest.mark.usefixtures("shared_programs"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]


def readme_options():
    """What the table of the README has in its first column, as a shell splits it."""
    table = (ROOT / "README.md").read_text().split("| option | what it does |")[1].split("\n\n")[0]
    return [word for row in re.findall(r"^\| `(--.*?)` \|", table, re.MULTILINE) for word in shlex.split(row)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten classes of two training images, some of them stored on their side, and one of them broken."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "val"), range(10), range(2)):
        path, exif = folder / split / str(label) / f"{number}.jpg", Image.Exif()
        path.parent.mkdir(parents=True, exist_ok=True)
        exif[0x0112] = 1 + 5 * number
        Image.fromarray(rng.integers(0, 256, (48, 40, 3), np.uint8)).save(path, exif=exif.tobytes())
    (folder / "train/3/1.jpg").write_text("some text")
    return folder


@pytest.fixture
def config(images, monkeypatch):
    """A function that gives the smallest config with these options."""

    def parsed(*more):
        fixed = [
            f"--config.data.dataset=folder:{images}",
            "--config.data.batch_size=8",
            f"--config.train.steps={STEPS}",
        ]
        argv = ["main.py", "--config=tests/tiny_config.py", "--workdir=none", *fixed, *readme_options(), *more]
        monkeypatch.chdir(ROOT)
        with flagsaver.flagsaver():
            main.parse_flags(argv)
            return main._CONFIG.value

    return parsed


@pytest.fixture(scope="module")
def run_folder(shared_programs, tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def undisturbed(config, run_folder):
    """The folder of a whole run, which the first test makes, if it is in the same process."""
    if not (run_folder / "checkpoints").exists():
        train_and_evaluate(config(), run_folder)
    return run_folder


def stop_at(stop, step, _):
    if step == stop:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_with_all_options_resumes_bit_for_bit(config, images, run_folder, tmp_path, caplog):
    assert len(readme_options()) == 6
    result = train_and_evaluate(config(), run_folder)
    assert result["count"] == 20
    assert any("train/3/1.jpg: not a readable image" in message for message in caplog.messages)
    for stop in (1, 4):
        train_and_evaluate(config(), tmp_path, on_metrics=functools.partial(stop_at, stop))
        assert record(tmp_path)[-1]["step"] < STEPS
    train_and_evaluate(config(), tmp_path)
    assert_same_end(tmp_path, run_folder)
    assert evaluate_checkpoint(config(), run_folder) == result


def test_the_checkpoint_has_what_was_asked_for(undisturbed, images):
    metadata = load_metadata(undisturbed)
    assert (metadata["exif"], metadata["image_size"]) == (True, [192, 256])
    (path,) = (images / "val/0").glob("1.jpg")
    seen = read_image(path, load(undisturbed).metadata)
    np.testing.assert_array_equal(seen, augment.eval_transform(path.read_bytes(), (192, 256), 1.0, exif=True))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_every_tool_takes_a_checkpoint_of_images_that_are_not_square(undisturbed, images, tmp_path, capsys):
    path = images / "val/0/1.jpg"
    with pytest.raises(SystemExit) as status:
        predict.main(["--checkpoint", str(undisturbed), "--json", str(path)])
    assert status.value.code == 0
    (line,) = capsys.readouterr().out.splitlines()
    shown = json.loads(line)["predictions"][0]

    export.export(undisturbed, tmp_path / "exported")
    program, about = export.load(tmp_path / "exported")
    pixels = read_image(path, about)
    assert pixels.shape == (192, 256, 3)
    expected = jax.nn.softmax(program(pixels[None]))[0]
    assert shown["index"] == int(expected.argmax())
    np.testing.assert_allclose(shown["probability"], expected.max(), rtol=1e-4)

    summary.main(["--checkpoint", str(undisturbed)])
    assert "one image of 192 x 256" in capsys.readouterr().out
    visualize.main(["similarity", "--checkpoint", str(undisturbed), str(path), "--output", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 1000
    export.export(undisturbed, tmp_path / "hub", format="hub")
    assert "192 x 256 pixels" in (tmp_path / "hub/README.md").read_text()


def test_what_is_frozen_is_as_it_was_drawn_and_the_averages_are_near_the_weights(config, undisturbed, tmp_path):
    settings = config()
    settings.train.steps = 1
    train_and_evaluate(settings, tmp_path)
    first, last = load_variables(tmp_path, ema=False), load_variables(undisturbed, ema=False)
    averages = load_variables(undisturbed)
    for collection in ("params", "batch_stats"):
        for tree in (last, averages):
            rows = (frozen(tree[collection], settings.optim.freeze), first[collection], tree[collection])
            same = [bool(np.array_equal(a, b)) for _, a, b in zip(*map(jax.tree.leaves, rows), strict=True)]
            assert same == jax.tree.leaves(rows[0])
    # At 0.9998 they would still be as at the start.
    moved, apart = (
        np.sqrt(sum(np.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, pair), strict=True)))
        for pair in ((averages["params"], first["params"]), (averages["params"], last["params"]))
    )
    assert apart < moved


def test_four_devices_give_the_same_losses(config, undisturbed, tmp_path):
    settings = config("--config.mesh.data=2", "--config.mesh.fsdp=2")
    train_and_evaluate(settings, tmp_path)
    for ours, theirs in zip(record(tmp_path), record(undisturbed), strict=True):
        chex.assert_trees_all_close(ours, theirs, rtol=1e-3)
