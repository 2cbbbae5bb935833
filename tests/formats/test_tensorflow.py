"""Networks as SavedModels, in TensorFlow, beside our own results."""

import json
import sys

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from helpers import METADATA, TINY, exit_of, expected_logits, tiny_variables

from fcvit_jax import export
from fcvit_jax.errors import UserError
from fcvit_jax.formats import tensorflow
from fcvit_jax.run.checkpoint import save_variables


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow", reason="needs requirements/tf.txt")


@pytest.mark.parametrize("name", ["fcvit", "deit", "segmenter"])  # ConvNeXt has no operation of its own
def test_results_are_equal_for_any_batch_size(tf, name, tmp_path):
    function, shape = networks.program(name)
    for file, content in tensorflow.convert(function, shape).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    model, function = tf.saved_model.load(tmp_path), jax.jit(function)
    for count in (1, 3):
        images = networks.images_of(shape, count)
        found = model.signatures["serving_default"](images=tf.constant(images))["output"].numpy()
        expected = np.asarray(function(images))
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


def test_the_tool_writes_a_float32_model_without_local_paths(tf, tmp_path):
    """Of a run in bfloat16, too."""
    save_variables(tmp_path / "run", tiny_variables(), METADATA | {"model": TINY | {"dtype": "bfloat16"}})
    export.main(["--checkpoint", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "tf"])
    assert json.loads((tmp_path / "out/model.json").read_text())["class_names"] == METADATA["class_names"]
    for path in (tmp_path / "out").rglob("*.pb"):
        content = path.read_bytes()
        assert b".py" not in content and str(tmp_path.parent).encode() not in content
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    model = tf.saved_model.load(tmp_path / "out")
    found = model.signatures["serving_default"](images=tf.constant(images))["output"].numpy()
    np.testing.assert_allclose(found, expected_logits(images), rtol=1e-4, atol=1e-5)


def test_what_it_does_not_know_is_said(tf):
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), 4, 4, 3), jnp.uint8)
    for function, words in networks.UNKNOWN:
        with pytest.raises(UserError, match=words):
            tensorflow.convert(function, shape)


def test_without_the_package_a_line_says_what_to_install(tmp_path, monkeypatch):
    save_variables(tmp_path / "run", tiny_variables(), METADATA)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    message = exit_of(export.main, "--checkpoint", tmp_path / "run", tmp_path / "out", "--format", "tf")
    assert 'pip install "fcvit-jax[tf]"' in message and not (tmp_path / "out").exists()
