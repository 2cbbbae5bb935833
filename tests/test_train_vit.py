"""A ViT trains like an FCViT: it goes on where it was killed, is the same on four devices, and is evaluated."""

import shutil

import numpy as np
import pytest
import tiny_config
from ml_collections import ConfigDict

from benchmarks.kill_resume import assert_same_end, record
from fcvit_jax.configs import digits_vit
from fcvit_jax.evaluate import evaluate_checkpoint
from fcvit_jax.train import train_and_evaluate

pytestmark = [
    pytest.mark.usefixtures("shared_programs"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]


@pytest.fixture(scope="module")
def config(digits_dir):
    """Twenty steps with averages, mixing and erasing, of a ViT with drop-path."""
    config = tiny_config.get_config()
    config.data.data_dir = digits_dir
    with config.unlocked():
        config.model = ConfigDict(digits_vit.get_config().model.to_dict())
        config.model.update(dim=16, depth=2, heads=2, patch_size=8, drop_path_rate=0.2)
    return config


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vit")
    return workdir, train_and_evaluate(config, workdir)


def losses(workdir):
    return [line["train/loss"] for line in record(workdir) if "train/loss" in line]


def test_a_run_that_lost_its_end_ends_the_same(undisturbed, config, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/20")
    train_and_evaluate(config, workdir)
    assert_same_end(workdir, undisturbed[0])


def test_four_devices_are_one_run(undisturbed, config, tmp_path):
    config = config.copy_and_resolve_references()
    config.mesh.data = 4
    train_and_evaluate(config, tmp_path)
    found, expected = losses(tmp_path), losses(undisturbed[0])
    assert len(expected) == 20 and np.std(expected) > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_its_checkpoint_is_evaluated_and_the_run_says_nothing_of_batch_statistics(
    undisturbed, config, capsys, tmp_path
):
    workdir, result = undisturbed
    assert evaluate_checkpoint(config, workdir) == pytest.approx(result, rel=1e-5)
    config = config.copy_and_resolve_references()
    config.train.steps = 1
    train_and_evaluate(config, tmp_path)
    out = capsys.readouterr().out
    assert "batch 16, 80 training" in out and "BatchNorm" not in out
