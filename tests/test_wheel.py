"""The wheel, in environments that hold nothing but it and what it says that it needs."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fcvit_jax

ROOT = Path(__file__).parent.parent
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "*.npz", "build", "dist", "docs", "runs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, since setuptools leaves files beside what it builds.
    source = shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, f"--wheel-dir={folder}", source], check=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


def link(requirement, extras, packages, done):
    """Links the distribution that a requirement names, and all that it requires, from this environment to another."""
    key = requirement.name.lower().replace("_", "-")
    if (key, *sorted(extras)) in done:
        return
    done.add((key, *sorted(extras)))
    found = distribution(requirement.name)
    for top in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}:
        if not (packages / top).exists():
            (packages / top).symlink_to(found.locate_file(top))
    link_all(found, extras, packages, done)


def link_all(found, extras, packages, done):
    for requirement in map(Requirement, found.requires or ()):
        if any(requirement.marker is None or requirement.marker.evaluate({"extra": e}) for e in {"", *extras}):
            link(requirement, requirement.extras, packages, done)


def install(wheel, folder, *extras):
    """A function that runs a program of a new environment with the wheel; it returns the finished process."""
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    command = [sys.executable, "-m", "pip", f"--python={folder}", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, wheel], check=True, timeout=120)
    (about,) = packages.glob("fcvit_jax-*.dist-info")
    link_all(PathDistribution(about), extras, packages, set())

    def run(program, *arguments):
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [folder / "bin" / program, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("base"))


def test_the_wheel_brings_one_package_with_its_recipes_and_its_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fcvit_jax", f"fcvit_jax-{fcvit_jax.__version__}.dist-info"}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fcvit_jax").rglob("*.py")}
    here |= {"fcvit_jax/py.typed", "fcvit_jax/depthwise/kernels.cu"}
    assert here == {name for name in names if name.startswith("fcvit_jax/")}


def test_networks_and_their_weights_need_jax_and_flax_alone(base, tmp_path):
    program = """
import sys, jax, jax.numpy as jnp, numpy as np
import fcvit_jax
for name in ("deit_tiny_patch16_224", "convnext_tiny", "fcvit_tiny"):
    model = fcvit_jax.create_model(name)
    images = jnp.zeros((2, 224, 224, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    print(jax.eval_shape(model.apply, variables, images).shape)
weights = fcvit_jax.convert.to_torch(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables), model)
np.savez(sys.argv[1], **weights)
fcvit_jax.load_pretrained(sys.argv[1], model)
import PIL
"""
    done = base("python", "-c", program, tmp_path / "weights.npz")
    assert done.stdout == "(2, 1000)\n" * 3
    assert done.stderr.endswith("No module named 'PIL'\n")  # else the environment would have proved nothing


def test_the_tools_explain_themselves_and_what_else_they_need(base):
    done = base("python", "-m", "fcvit_jax.predict", "--help")
    assert (done.returncode, done.stderr) == (0, "") and "--checkpoint" in done.stdout
    assert 'pip install "fcvit-jax[train]"' in done.stdout and "--top N" not in done.stdout
    done = base("fcvit-jax", "--config=digits", "--workdir=run")
    assert done.returncode == 1 and 'pip install "fcvit-jax[train]"' in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("train"), "train")


@pytest.mark.parametrize("program", [("python", "-m", "fcvit_jax"), ("fcvit-jax",)])
def test_recipes_are_found_by_name(trained, program):
    done = trained(*program, "--config=digits", "--workdir=run", "--config.optim.lrr=1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no such config key: 'lrr'")


def test_training_needs_no_more_than_its_extra(trained):
    done = trained("fcvit-jax", "--config=imagenet:fcvit_s24", "--workdir=run", "--config.train.log_every=0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: train.log_every=0 ")
    done = trained("python", "-m", "fcvit_jax.predict", "--help")
    assert (done.returncode, done.stderr) == (0, "") and "--top N" in done.stdout
