"""The exported program in a process that has JAX and nothing of ours."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.export
import numpy as np
import pytest
from equality import assert_close
from flax import traverse_util
from helpers import ELSEWHERE, METADATA, TINY, exit_of, expected_logits, save_tiny, tiny_variables
from safetensors.numpy import load_file

from fcvit_jax import export
from fcvit_jax.errors import UserError

ABOUT = METADATA | {"exif": False}  # which checkpoints that do not say it are completed with


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    export.main(["--checkpoint", str(save_tiny(folder / "tiny")), str(folder / "out")])
    return folder


def test_a_process_with_jax_alone_gets_the_same_logits(folder):
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), np.uint8)
    np.save(folder / "images.npy", images)
    subprocess.run([sys.executable, "-I", "-c", "import jax.export" + ELSEWHERE], cwd=folder, check=True, timeout=100)
    expected = expected_logits(images)
    found = np.load(folder / "logits.npz")
    assert_close(found["all"], expected, "logits")
    assert_close(found["one"], expected[:1], "logits of one image")
    assert np.ptp(expected, axis=0).min() > 1e-2  # the logits tell the images apart


def test_the_program_is_for_every_platform_and_batch_size(folder):
    program = jax.export.deserialize((folder / "out/model.jax_export").read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert str(program.in_avals[0].shape[0]) == "n" and program.in_avals[0].dtype == np.uint8


def test_batch_norms_are_folded_into_the_convolutions(folder):
    program = jax.export.deserialize((folder / "out/model.jax_export").read_bytes())
    norms = 2 * sum(TINY["depths"]) + 1  # of the blocks, and the last; the stem and the downsamplings have none
    assert program.mlir_module().count("stablehlo.rsqrt") == norms


def test_labels_and_weights_lie_beside_it(folder):
    assert json.loads((folder / "out/model.json").read_text()) == ABOUT
    weights = load_file(folder / "out/model.safetensors")
    expected = traverse_util.flatten_dict(tiny_variables(), sep="/")
    assert weights.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(weights[name], x)


def test_the_program_does_not_tell_where_it_was_made(folder):
    """JAX writes the paths of source files into programs."""
    package = Path(export.__file__).parent
    for path in (folder / "out").iterdir():
        content = path.read_bytes()
        for place in (package, package.parent, sys.prefix, Path.home(), folder):
            assert str(place).encode() not in content, path.name
        assert b".py" not in content, path.name
    assert jax.config.jax_traceback_in_locations_limit != 0  # tracebacks are as they were


def test_load_gives_the_program_and_refuses_changed_files(folder, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    function, metadata = export.load(folder / "out")
    assert metadata == ABOUT
    np.testing.assert_allclose(function(images), expected_logits(images), rtol=1e-4, atol=1e-5)
    sums = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder / "out", capture_output=True, text=True)
    assert sums.stdout.count(": OK") == 3 and sums.returncode == 0
    for name in ("model.jax_export", "model.json", "SHA256SUMS"):
        shutil.copytree(folder / "out", tmp_path / name)
        content = bytearray((tmp_path / name / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / name / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            export.load(tmp_path / name)
    (tmp_path / "model.json/SHA256SUMS").write_bytes(b"")
    with pytest.raises(UserError, match="SHA256SUMS is damaged"):
        export.load(tmp_path / "model.json")
    (tmp_path / "model.json/SHA256SUMS").unlink()
    with pytest.raises(UserError, match="No such file"):
        export.load(tmp_path / "model.json")
    with pytest.raises(UserError, match="has no model.jax_export"):
        export.load(folder)


def test_nothing_is_overwritten(folder, tmp_path):
    before = (folder / "out/model.json").stat().st_mtime_ns
    args = "--checkpoint", folder / "tiny"
    assert "not an empty folder" in exit_of(export.main, *args, folder / "out")
    assert (folder / "out/model.json").stat().st_mtime_ns == before
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in exit_of(export.main, *args, tmp_path / "file" / "out")


def test_a_full_disk_leaves_no_half_export(folder, tmp_path, monkeypatch):
    def write(path, content, _original=Path.write_bytes):
        _original(path, content[:100])
        if path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write)
    assert "No space left" in exit_of(export.main, "--checkpoint", folder / "tiny", tmp_path / "out")
    monkeypatch.undo()
    export.main(["--checkpoint", str(folder / "tiny"), str(tmp_path / "out")])
