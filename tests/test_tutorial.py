"""The tutorial as Jupyter runs it, but for fewer epochs and blocks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
from conftest import QUICKLY
from helpers import ELSEWHERE
from nbclient import NotebookClient

from fcvit_jax.augment import eval_transform

FOLDER = Path(__file__).parent.parent / "docs"


def test_the_tutorial_keeps_its_promises(monkeypatch, tmp_path):
    # One device. Without any optimisation it would train for longer than compiling takes less.
    monkeypatch.setenv("XLA_FLAGS", QUICKLY.replace("level=0", "level=1"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(FOLDER / "tutorial.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs do not belong in the repository"
    source = notebook.cells[1].source
    for setting, quick in (("EPOCHS = 10", "EPOCHS = 5"), ("(1, 1, 1, 1)", "(1, 0, 0, 0)"), ("(11, 11)", "(3,)")):
        assert source.count(setting) == 1
        source = source.replace(setting, quick)
    notebook.cells[1].source = source
    # Raises where a cell does.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2 and min(map(len, pictures)) > 50_000  # the curves and the similarity
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    ten, two = (float(number) for number in re.findall(r"done: final top-1 ([\d.]+)%", text))
    assert ten > 75 and two > 75
    assert re.search(
        r"^block .* head_correlation .*\n(stages_\d_block_0/context1 +0\.\d+ ± 0\.\d+ .*\n)+", text, re.MULTILINE
    )
    assert "has 10 classes, the model 2: the head starts afresh" in text

    (folder,) = tmp_path.glob("fcvit-*")
    said = re.findall(r"^(\d) is (even|odd)", text, re.MULTILINE)
    assert [digit for digit, _ in said] == ["2", "5", "8"]
    paths = sorted((folder / "samples").iterdir(), key=lambda path: int(path.stem))
    np.save(folder / "images.npy", [eval_transform(path.read_bytes(), 32, 1.0) for path in paths])
    subprocess.run([sys.executable, "-I", "-c", "import jax.export" + ELSEWHERE], cwd=folder, check=True, timeout=100)
    names = json.loads((folder / "out/model.json").read_text())["class_names"]
    predicted = [names[i] for i in np.load(folder / "logits.npz")["all"].argmax(1)]
    assert sorted(predicted) == sorted(name for _, name in said)
