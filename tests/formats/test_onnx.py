"""Networks as ONNX models, in onnxruntime, beside our own results."""

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
from fcvit_jax.formats import onnx
from fcvit_jax.run.checkpoint import save_variables


@pytest.fixture
def packages():
    """The packages onnx and onnxruntime."""
    reason = "needs requirements/onnx.txt and onnxruntime"
    return tuple(pytest.importorskip(name, reason=reason) for name in ("onnx", "onnxruntime"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    save_variables(folder, tiny_variables(), METADATA | {"model": TINY | {"dtype": "bfloat16"}})
    return folder


@pytest.mark.parametrize("name", networks.NAMES)
def test_results_are_equal_for_any_batch_size(packages, name):
    function, shape = networks.program(name)
    model = onnx.convert(function, shape)
    packages[0].checker.check_model(packages[0].load_from_string(model), full_check=True)
    session = packages[1].InferenceSession(model)
    function = jax.jit(function)
    for count in (1, 3):
        images = networks.images_of(shape, count)
        (found,) = session.run(["output"], {"images": images})
        expected = np.asarray(function(images))
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


def test_the_tool_writes_a_float32_model_without_local_paths(packages, checkpoint, tmp_path):
    """Of a run in bfloat16, too."""
    export.main(["--checkpoint", str(checkpoint), str(tmp_path / "out"), "--format", "onnx"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["SHA256SUMS", "model.json", "model.onnx"]
    assert json.loads((tmp_path / "out/model.json").read_text())["class_names"] == METADATA["class_names"]
    content = (tmp_path / "out/model.onnx").read_bytes()
    assert b".py" not in content and str(tmp_path.parent).encode() not in content
    session = packages[1].InferenceSession(content)
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    (found,) = session.run(None, {"images": images})
    np.testing.assert_allclose(found, expected_logits(images), rtol=1e-4, atol=1e-5)


def test_what_it_does_not_know_is_said(packages):
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), 4, 4, 3), jnp.uint8)
    for function, words in networks.UNKNOWN:
        with pytest.raises(UserError, match=words):
            onnx.convert(function, shape)


def test_without_the_package_a_line_says_what_to_install(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = exit_of(export.main, "--checkpoint", checkpoint, tmp_path / "out", "--format", "onnx")
    assert 'pip install "fcvit-jax[onnx]"' in message and not (tmp_path / "out").exists()
