"""The commands and examples of the README and of docs/, as a user types them, on small data."""

import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import QUICKLY

import fcvit_jax
from fcvit_jax import __main__ as main
from fcvit_jax import tasks
from fcvit_jax.run.config import check_config, complete

ROOT = Path(__file__).parent.parent
README, RUNNING, MODULES = (
    (ROOT / name).read_text().replace("\\\n", "") for name in ("README.md", "docs/running.md", "docs/modules.md")
)
TEXT = README + RUNNING + MODULES
SHELL = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL))
MAIN = [shlex.split(line, comments=True) for line in re.findall(r"python main\.py([^\"\n]*)", SHELL)]
MAIN += [line.split() for line in re.findall(r"`python -m fcvit_jax (--.*?)`", TEXT)]
# Flags in the text go with any config.
INLINE = re.findall(r"`(--(?:config\.|mode=).*?)`", TEXT)
MAIN += [["--config=configs/imagenet.py", "--workdir=runs/a", *shlex.split(text)] for text in INLINE]
TOOLS = [shlex.split(line, comments=True) for line in re.findall(r"python -m (fcvit_jax\.[^`\n]*)", TEXT)]

# Runs main.py, then fails where TensorFlow or PyTorch was imported along the way.
WITHOUT_OTHERS = """
import runpy, sys
try:
    runpy.run_path("main.py", run_name="__main__")
finally:
    assert not {"tensorflow", "torch"} & set(sys.modules)
"""


def run(*args, code=None, devices=2):
    command = [sys.executable, *(["-c", code] if code else ["main.py"]), *args]
    flags = f"{QUICKLY} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


def test_the_imagenet_config_trains_on_miniature_imagenet_without_other_frameworks(imagenet_mini, tmp_path):
    done = run(
        "--config=tests/imagenet_config.py",
        f"--workdir={tmp_path}",
        f"--config.data.data_dir={imagenet_mini}",
        "--config.data.batch_size=8",
        "--config.data.image_size=32",
        "--config.model.bn_group_size=4",
        "--config.train.steps=3",
        code=WITHOUT_OTHERS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"2,538,184 parameters.*bfloat16.*optim\.lr 0\.001 x batch 8 / 1024.*1e-06", done.stdout)
    assert "over 21 examples" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 3]
    assert lines[1]["eval/count"] == 21
    metadata = json.loads((tmp_path / "checkpoints/3/metadata/metadata").read_text())
    assert metadata["class_names"][0] == "n01440764"


@pytest.mark.usefixtures("shared_programs")
def test_the_python_of_the_readme_runs(monkeypatch):
    monkeypatch.setitem(fcvit_jax.VARIANTS["fcvit_tiny"], "depths", (0, 0, 0, 2))  # fewer blocks to compile
    names = {}
    for file, text in (("README.md", README), ("docs/modules.md", MODULES)):  # the second goes on from the first
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(block, file, "exec"), names)
    assert names["logits"].shape == (1, 10)
    assert [x.shape for x in names["boxes"]] == [(1, 16, 16, 4), (1, 8, 8, 4), (1, 4, 4, 4), (1, 2, 2, 4)]
    assert names["wrapped"] and jnp.isfinite(names["slope"])


def test_what_the_documents_call_is_there():
    text = README + "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for first, *rest in {tuple(name.split(".")[1:]) for name in re.findall(r"\bfcvit_jax(?:\.\w+)+(?=\()", text)}:
        functools.reduce(getattr, rest, getattr(fcvit_jax, first))


@pytest.mark.parametrize("arguments", MAIN, ids=" ".join)
def test_the_flags_of_the_readme_are_those_of_main(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])  # where ml_collections looks for what to override
    with flagsaver.flagsaver():
        assert main.parse_flags(sys.argv) == ["main.py"]
        config = complete(main._CONFIG.value)
        task = tasks.load(config.task)
        check_config(config, task)
        assert task.create_model(**config.model).num_classes == config.model.num_classes
    flags.FLAGS.mark_as_parsed()


@pytest.mark.parametrize("arguments", TOOLS, ids=" ".join)
def test_the_arguments_of_the_readme_are_those_of_the_tools(arguments, monkeypatch):
    class Parsed(Exception):
        pass

    def work(*args, **kwargs):
        """Stands in for what the tool would do."""
        raise Parsed

    is_folder = importlib.util.find_spec(arguments[0]).submodule_search_locations
    tool = importlib.import_module(f"{arguments[0]}.__main__" if is_folder else arguments[0])
    for name in vars(tool).keys() & {
        "_predict",
        "_attention",
        "_similarity",
        "_curves",
        "_summary",
        "_report",
        "export",
        "convert",
    }:
        monkeypatch.setattr(tool, name, work)
    for figure in ("segmentation", "detection"):
        monkeypatch.setattr(f"fcvit_jax.figures.{figure}.from_arguments", work)
    with pytest.raises(Parsed):
        tool.main(arguments[1:])


def test_what_the_documents_point_to_is_there():
    assert len(MAIN) > 10 and len(TOOLS) > 6
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text()
        links = re.findall(r"\]\((?!http)([^)#]+)", text)
        assert [link for link in links if not (path.parent / link).exists()] == [], path.name
        for link, heading in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text):
            assert heading in headings(path.parent / link if link else path), f"{path.name}: {link}#{heading}"
    named = [f"benchmarks/{name}.py" for name in re.findall(r"benchmarks\.(\w+)", TEXT)]
    named += re.findall(r"\btests/[\w/.]+\w", README)
    assert [path for path in named if not (ROOT / path).exists()] == []


def headings(path):
    """The anchors that GitHub gives to the headings of a page."""
    texts = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    names = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in texts]
    return {name if not names[:i].count(name) else f"{name}-{names[:i].count(name)}" for i, name in enumerate(names)}


def test_the_lines_of_the_documents_fit_a_window():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        lines = path.read_text().splitlines()
        # Rows of tables cannot be broken; README has none that long.
        long = [line for line in lines if len(line) > 120 and (path.name == "README.md" or "|" not in line)]
        assert long == [], path.name
