"""What a user reads who gives main.py something that it cannot use: one message, and exit code 1."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_config
from absl import app, flags, logging
from absl.testing import flagsaver

from fcvit_jax import __main__ as main
from fcvit_jax import train  # its imports define flags, which flagsaver would forget otherwise
from fcvit_jax.run.config import write_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(digits_dir, tmp_path, monkeypatch):
    """Runs main.py in this process, on the smallest config; returns what it exits with, None at the end of a run."""
    monkeypatch.chdir(ROOT)

    def run(*arguments, workdir=tmp_path / "run"):
        fixed = ["--config=tests/tiny_config.py", f"--workdir={workdir}", f"--config.data.data_dir={digits_dir}"]
        argv = ["main.py", *fixed, *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for what to override
        verbosity = logging.get_verbosity()
        with flagsaver.flagsaver():
            try:
                main.main(main.parse_flags(argv))
            except SystemExit as error:
                return error.code
            finally:
                logging.set_verbosity(verbosity)
                flags.FLAGS.mark_as_parsed()

    return run


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143), (1, 129)])
def test_a_run_that_was_stopped_does_not_exit_with_0(run, monkeypatch, number, status):
    monkeypatch.setattr(train, "train_and_evaluate", lambda config, workdir, on_stop: on_stop(number))
    assert run() == status


def test_none_can_be_given_as_a_flag(run, monkeypatch):
    given = []
    monkeypatch.setattr(main, "run", lambda: given.append(main._CONFIG.value))
    for arguments in (
        ["--config.train.ema_decay=None", "--config.train.steps=None", "--config.init_from=None"],
        ["--config.train.steps=None", "--config.train.steps=5"],
        ["--config.train.steps=5", "--config.train.steps=None"],
    ):
        run(*arguments)
    first, second, third = given
    assert (first.train.ema_decay, first.train.steps, first.init_from) == (None, None, None)
    assert (second.train.steps, third.train.steps) == (5, None) and second.train.ema_decay == 0.9
    assert "Did you mean" in run("--config.train.stepz=None")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.optim.lrr=1"], "no such config key: 'lrr'\nDid you mean \"lr\""),
        (["--config.model.spatial_attention=1"], "no such config key: 'spatial_attention'\nFields of the model"),
        (["--config.optm.lr=1"], "no such config key: 'optm'\nDid you mean \"optim\""),
        (
            ["--config=configs/fcvit_s13.py"],
            "--config cannot be read: [^\n]*No such file[^\n]*fcvit_s13.py' .the current folder is /",
        ),
        (["--config.train.log_every=0"], "train.log_every=0 must be at least 1"),
        (["--config.data.image_size=1000000"], "data.image_size=1000000 must be at least 1 and less than 8193"),
        (["--config.data.crop_pct=1e-9"], "crop_pct=1e-09 must be at least 0.1"),
        (["--config.data.workers=100000"], "data.workers=100000 must be at least -1 and less than"),
        (["--config.data.prefetch=100000"], "data.prefetch=100000 must be"),
        (["--config.data.batch_size=1000000000"], "data.batch_size=1000000000 must be"),
        (["--config.train.epochs=1000000000"], "train.epochs=1000000000 must be"),
        (["--config.train.steps=10000000000"], "train.steps=10000000000 must be"),
        (["--config.model.depths=(10000000,0,0,0)"], "model.depths=10000000 must be"),
        (["--config.data.batch_size=12", "--config.mesh.data=8"], "data.batch_size=12 cannot be split evenly .*8 dev"),
        (["--config.mesh.data=16"], "mesh.data=16 x mesh.fsdp=1 needs 16 devices, but there are 8"),
        (
            ["--config.mesh.data=-1", "--config.mesh.fsdp=3"],
            "mesh.data=2 x mesh.fsdp=3 needs 6 devices, but there are 8",
        ),
        (["--config.data.batch_size=20"], "A batch of 20 images .*multiple of model.bn_group_size=8"),
        (["--config.train.accumulate=3"], "cannot be split evenly over train.accumulate=3 parts"),
        (["--config.model.num_classes=9"], "10 classes, the model 9: set --config.model.num_classes=10"),
        (["--config.model.name=fcvit_s13"], "fcvit_s13"),
        (["--config.data.dataset=imagenet2012"], "not prepared in .*\n.*pip install tensorflow-cpu"),
        (["--config.data.dataset=imagenet2021"], "imagenet2021 not found.*similar: "),
        (["--config.data.train_split=trian"], "data.train_split=trian: .*digits has train, validation"),
        (["--config.data.image_size=0"], "data.image_size=0 must be at least 1"),
        (["--config.optim.min_lr=1"], "optim.min_lr=1.0 is above the learning rate, .* for 16 images"),
        (["--config.mixing.group_size=3"], "16 images are not a whole number of groups of mixing.group_size=3"),
        (["--config.init_from=nothing.npz"], "There is no file or folder nothing.npz"),
        (["--config.checkpoint.keep=0"], "checkpoint.keep=0 must be at least 1"),
        (["--config.train.ema_decay=1.5"], "train.ema_decay=1.5 must be at least 0 and less than 1"),
        (["--config.model.drop_path_rate=2"], "model.drop_path_rate=2.0 must be at least 0 and less than 1"),
        (["--config.seed=-1"], "seed=-1 must lie between 0 and 4294967295"),
        (["--config.seed=4294967296"], "seed=4294967296 must lie between"),
        (["--config.optim.eps=0"], "optim.eps=0.0 must be at least 1e-30"),
        (["--config.model.context_heads=0"], "model.context_heads=0 must be at least 1"),
        (["--config.model.dtype=float23"], "model.dtype='float23' is not supported: choose float32 or"),
        (["--config.model.dtype=float16"], "model.dtype='float16' is not supported: choose float32 or"),
        (["--config.model.depths=(1,1)"], "model.depths, model.dims and model.mlp_ratios must have one entry for each"),
        (["--config.model.kernel_sizes=(4,)"], "model.kernel_sizes and model.mlp_kernel_size must be odd, which 4 is"),
        (["--config.data.flip=7"], "data.flip=7.0 must be a probability"),
        (["--config.data.crop_scale=(0.5,)"], "data.crop_scale=.0.5,. must be the smallest and the largest"),
        (["--config.data.crop_ratio=(0.0,1.0)"], "data.crop_ratio=.0.0, 1.0. must be the smallest and"),
        (["--config.data.rand_augment=(2.0,9.0,0.5)"], "data.rand_augment=.2.0, 9.0, 0.5. must be a number of"),
        (["--config.data.data_dir=/proc/data"], "data.data_dir=/proc/data cannot be written: No such file"),
        (["--workdir=s3://bucket/run"], "must be a path"),
        (["--workdir="], "The path of the run's folder is empty"),
        (["--workdir=/proc/run"], "Could not write in /proc/run"),
        (["--coordinator=localhost:1"], "Give all of --coordinator=HOST:PORT, --num_processes=N and --process_id=I"),
        (["--mode=eval"], "No checkpoint at .*run/checkpoints"),
        (["--mode=eval", "--workdir=s3://bucket/run"], "must be a path"),
    ],
)
def test_bad_input_ends_with_one_message_before_anything_compiles(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(train, "init_variables", None)  # the first to compile
    error = run(*arguments)
    assert isinstance(error, str) and error.startswith("error: ")
    assert re.search(f"(?s){message}", error), error
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("mistake, said", [("{}['b']", "KeyError: b"), ("os.nothing", "AttributeError: .*'nothing'")])
def test_a_mistake_in_a_config_file_is_shown(run, tmp_path, mistake, said):
    path = tmp_path / "mistaken.py"
    path.write_text(f"import os\n\ndef get_config():\n    return {mistake}\n")
    assert re.search(rf"error: --config cannot be read: {said} \({path}, line 4\)", run(f"--config={path}"))


def test_a_checkpoint_to_start_from_is_no_flag_of_training(run):
    with pytest.raises(app.UsageError, match="--checkpoint goes with --mode=eval"):
        run("--checkpoint=best")


def test_a_folder_with_another_run_is_refused(run, tmp_path):
    write_config(tiny_config.get_config(), tmp_path / "run")
    (tmp_path / "run/checkpoints/20").mkdir(parents=True)
    assert "optim.lr: 0.001 -> 2.0\nChoose another --workdir" in run("--config.optim.lr=2")


def test_the_exit_code_is_1_and_there_is_no_traceback(tmp_path):
    command = [sys.executable, "main.py", "--config=configs/digits.py", f"--workdir={tmp_path}"]
    done = subprocess.run([*command, "--config.optim.lrr=2"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr == 'error: no such config key: \'lrr\'\nDid you mean "lr" instead of "lrr"?\n'


def test_a_recipe_takes_the_name_of_a_variant(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where there are no configs: the recipe is the package's
    for argument in ("configs/imagenet.py:fcvit_s24", "imagenet:fcvit_s24"):
        monkeypatch.setattr(sys, "argv", ["main.py", f"--config={argument}", "--workdir=run", "--config.seed=5"])
        with flagsaver.flagsaver():
            main.parse_flags(sys.argv)
            config = flags.FLAGS.config
            assert (config.model.name, config.data.crop_pct, config.seed) == ("fcvit_s24", 0.95, 5)
    flags.FLAGS.mark_as_parsed()
