"""Loading checkpoints for the tools, what they say of wrong ones, and prediction."""

import json
import os
import subprocess
import sys

import chex
import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from helpers import METADATA, TINY, exit_of, expected_logits, save_images, save_tiny, tiny_variables
from PIL import Image

from fcvit_jax import convert, export, predict, summary, tasks, visualize
from fcvit_jax.augment import eval_transform
from fcvit_jax.errors import UserError, exit_on_error
from fcvit_jax.networks.fcvit import create_model
from fcvit_jax.run.checkpoint import Checkpointer, save_variables
from fcvit_jax.run.state import TrainState


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("predict") / "tiny")


def test_predictions_equal_the_model_whatever_the_batches(checkpoint, tmp_path, capsys):
    save_images(tmp_path / "elsewhere", 3)
    for name in ("photos/README.txt", "photos/._0.png", "photos/.thumbs/0.png", "photos/folder.png/README.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no image")
    (tmp_path / "photos/deep").symlink_to(tmp_path / "elsewhere")
    paths = [tmp_path / f"photos/deep/{i}.png" for i in range(3)] + save_images(tmp_path / "other", 2, seed=1)
    args = "--checkpoint", checkpoint, tmp_path / "photos", *paths[3:], "--json", "--top", 2, "--batch-size", 2
    assert exit_of(predict.main, *args) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == list(map(str, paths))
    seen = set()
    images = np.stack([eval_transform(path.read_bytes(), image_size=40, crop_pct=0.8) for path in paths])
    for row, line in zip(expected_logits(images), lines, strict=True):
        expected = np.exp(row) / np.exp(row).sum()
        assert [p["index"] for p in line["predictions"]] == np.argsort(-expected)[:2].tolist()
        assert [p["class"] for p in line["predictions"]] == [
            METADATA["class_names"][i] for i in np.argsort(-expected)[:2]
        ]
        np.testing.assert_allclose([p["probability"] for p in line["predictions"]], np.sort(expected)[:0:-1], rtol=1e-4)
        seen.add(line["predictions"][0]["probability"])
    assert len(seen) == 5  # or the network would be deaf to its input


def test_the_tool_makes_programs_fast_on_cpus(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert "No checkpoint" in exit_of(predict.main, "--checkpoint", tmp_path, *save_images(tmp_path, 1))
    assert "--xla_cpu_prefer_vector_width" in os.environ["XLA_FLAGS"]  # before anything ran


def test_a_folder_is_read_whole_and_what_is_left_out_is_named(tmp_path, caplog):
    """Once each, also where links lead round in a circle."""
    paths = save_images(tmp_path / "in", 1) + save_images(tmp_path / "in/deep", 1)
    image = Image.open(paths[0])
    for suffix in (".bmp", ".tif", ".gif", ".JFIF", ".jpe", ".webp"):
        paths.append(tmp_path / f"in/a{suffix}")
        image.save(paths[-1], None if suffix not in (".JFIF", ".jpe") else "JPEG")
    (tmp_path / "in/link.png").symlink_to(paths[0])
    (tmp_path / "in/deep/round").symlink_to(tmp_path / "in")
    (tmp_path / "in/gone.png").symlink_to("nothing")
    os.mkfifo(tmp_path / "in/pipe.png")
    for name in ("notes.txt", ".hidden.png", ".DS_Store"):
        (tmp_path / "in" / name).touch()
    found = predict.find_images([tmp_path / "in", paths[0], tmp_path / "in/deep/round/deep/0.png"])
    assert sorted(found) == sorted([*paths, tmp_path / "in/link.png"])
    left_out, twice = (record.getMessage() for record in caplog.records)
    assert left_out.endswith("not the 5 other entries: .hidden.png, deep/round/ (again), gone.png, notes.txt, pipe.png")
    assert twice == f"2 images given twice, taken once: {paths[0]}, {tmp_path / 'in/deep/round/deep/0.png'}"


def test_bad_images_are_named_and_the_rest_go_on(checkpoint, tmp_path, capsys):
    good = save_images(tmp_path, 2)
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 broken")
    args = "--checkpoint", checkpoint, tmp_path / "bad.jpg", good[0], tmp_path / "missing.png", good[1], "--top", 1
    args += "--batch-size", 2
    assert exit_of(predict.main, *args) == 1
    out, err = capsys.readouterr()
    table = out.splitlines()
    assert [line.split()[0] for line in table[1:]] == list(map(str, good))
    assert table[1].split()[1] in METADATA["class_names"] and table[1].endswith("%")
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and "bad.jpg" in errors[0] and "missing.png: No such file" in errors[1]


def test_the_averages_are_taken_where_the_run_kept_them(tmp_path):
    plain, averages = tiny_variables(0), tiny_variables(1)
    checkpointer = Checkpointer(tmp_path)
    opt_state = optax.sgd(0.1).init(plain["params"])
    as_jax = jax.tree.map(jax.numpy.asarray, {"plain": plain, "averages": averages})
    state = TrainState(step=jax.numpy.int32(7), variables=as_jax["plain"], opt_state=opt_state, ema=as_jax["averages"])
    checkpointer.save(state, METADATA)
    checkpointer.wait()
    checkpointer.close()
    model, variables, metadata = predict.load(tmp_path)
    chex.assert_trees_all_equal(variables, averages)
    assert model == create_model(**TINY) and metadata["class_names"] == METADATA["class_names"]
    convert.convert(tmp_path, tmp_path / "run.npz")  # with stages without blocks, which shapes alone do not tell
    for loaded, expected in (
        (convert.load_pretrained(tmp_path, model), averages),
        (convert.load_pretrained(tmp_path / "run.npz", model), averages),
        (convert.load_pretrained(tmp_path, model, ema=False), plain),
    ):
        chex.assert_trees_all_equal(loaded, expected)


def test_load_says_what_it_assumes(tmp_path, capsys):
    save_variables(tmp_path / "bare", tiny_variables(), {"model": TINY, "image_size": 48})
    _, _, metadata = predict.load(tmp_path / "bare")
    said = {"model": TINY, "image_size": 48, "crop_pct": 0.9, "class_names": ["0", "1", "2"]}
    assert metadata == said | {"exif": False}
    assert "says nothing of class_names, crop_pct;" in capsys.readouterr().err
    for name in ("fcvit_s24", "fcvit_b48"):  # the original evaluates these with another crop
        save_variables(tmp_path / name, tiny_variables(), {"model": TINY | {"name": name}, "image_size": 48})
        assert predict.load(tmp_path / name)[2]["crop_pct"] == 0.95
        assert "and crop_pct 0.95" in capsys.readouterr().err


TOOLS = {
    predict: ["--checkpoint", "{}", "image.png"],
    summary: ["--checkpoint", "{}"],
    export: ["--checkpoint", "{}", "dest"],
    visualize: ["similarity", "--checkpoint", "{}", "image.png", "--output", "out.png"],
}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_wrong_checkpoints_end_in_one_clear_line(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"PK")
    save_variables(tmp_path / "other", tiny_variables(), METADATA | {"model": TINY | {"dims": [16, 16, 16, 64]}})
    save_variables(tmp_path / "nameless", tiny_variables(), {"class_names": ["ant", "bee", "cat"]})
    variables = tiny_variables()
    variables["params"]["norm_0"] = variables["params"].pop("norm")
    save_variables(tmp_path / "pyramid", variables, METADATA)
    messages = {
        "missing": "no such folder",
        "empty": "No checkpoint in",
        "weights.pth": "damaged, or no file of PyTorch's",
        "other": "weights of another network",
        "nameless": "does not say which network",
        "pyramid": "holds a feature pyramid",
    }
    for name, message in messages.items():
        code = exit_of(tool.main, *(arg.format(name) for arg in TOOLS[tool]))
        assert code.startswith("error: ") and name in code and message in code and "\n" not in code


ARGUMENTS = {tool: "--checkpoint" for tool in TOOLS}


@pytest.mark.parametrize("tool", ARGUMENTS, ids=lambda tool: tool.__name__)
def test_help_shows_the_arguments_and_an_example(tool, capsys):
    assert exit_of(tool.main, *[arg for arg in TOOLS.get(tool, ()) if arg == "similarity"], "--help") == 0
    help = capsys.readouterr().out
    assert ARGUMENTS[tool] in help and f"example: python -m {tool.__name__}" in " ".join(help.split())
    assert exit_of(tool.main, "--help") == 0 and f"example: python -m {tool.__name__}" in capsys.readouterr().out


def test_what_cannot_be_predicted_is_an_error(checkpoint, tmp_path):
    image = save_images(tmp_path, 1)[0]
    assert "--top" in exit_of(predict.main, "--checkpoint", checkpoint, image, "--top", 0)
    (tmp_path / "none").mkdir()
    assert "has no image" in exit_of(predict.main, "--checkpoint", checkpoint, tmp_path / "none")
    with pytest.raises(UserError, match="2.png: unknown or broken"):
        (tmp_path / "2.png").write_bytes(b"")
        predict.read_image(tmp_path / "2.png", METADATA)


def test_weights_that_are_not_finite_predict_nothing_and_are_not_read(tmp_path):
    variables = tiny_variables()
    variables["params"]["head"]["bias"][1] = np.inf
    model = create_model(**TINY)
    with pytest.raises(UserError, match="not finite"):
        tasks.load("classification").predict(model, variables, np.zeros((1, 40, 40, 3), np.uint8), METADATA)
    np.savez(tmp_path / "w.npz", **traverse_util.flatten_dict(variables, sep="/"))
    with pytest.raises(UserError, match=r"w.npz: params/head/bias is not finite, 1 of \d+ tensors"):
        convert.load_pretrained(tmp_path / "w.npz", model)


def test_importing_the_tools_starts_no_backend():
    code = "import fcvit_jax.predict, fcvit_jax.summary, fcvit_jax.export, fcvit_jax.visualize, jax\n"
    code += "assert not jax._src.xla_bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_output_that_nobody_reads_any_more_ends_a_tool_in_silence():
    tool = "from fcvit_jax.errors import exit_on_error\nwith exit_on_error():\n    print('x' * 10**6)"
    with subprocess.Popen([sys.executable, "-c", tool], stdout=-1, stderr=-1) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    with pytest.raises(BrokenPipeError, match="a socket"), exit_on_error():
        raise BrokenPipeError(32, "a socket")


def test_names_that_are_no_utf_8_are_printed():
    tool = r"from fcvit_jax.errors import exit_on_error" "\n" r"with exit_on_error(): print('caf\udce9.jpg')"
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    assert subprocess.check_output([sys.executable, "-c", tool], env=env, timeout=100) == rb"caf\udce9.jpg" b"\n"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("image_size", value) for value in ("x", -5, 10**6, None, 40.5, [40], [40, -5], [40, 40, 3], "ab")),
        *(("crop_pct", value) for value in ("a", 1e-3, None, [1])),
        *(("class_names", value) for value in (["ant"], [1, 2, 3], "ant", None)),
        ("model", TINY | {"depths": [10**7, 0, 0, 0]}),
    ],
)
def test_metadata_that_cannot_be_are_one_line(tmp_path, key, value):
    save_variables(tmp_path / "run", tiny_variables(), METADATA | {key: value})
    with pytest.raises(UserError) as caught:
        predict.load(tmp_path / "run")
    text = str(caught.value)
    assert len(text) < 300 and "\n" not in text and ("depths" if key == "model" else key) in text


def test_commands_to_the_terminal_are_not_printed_raw(tmp_path, capsys):
    names = ["\x1b[31mant", "bee\x07", "c\u202eat"]
    save_variables(tmp_path / "run", tiny_variables(), METADATA | {"class_names": names})
    (image,) = save_images(tmp_path, 1)
    assert exit_of(predict.main, "--checkpoint", tmp_path / "run", image, "--top", 3) == 0
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out) and "\\x1b[31mant" in out
