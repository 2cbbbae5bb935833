"""The commands of the README as a user types them, on small data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fcvit_jax

ROOT = Path(__file__).parent.parent

# Runs main.py, then fails where TensorFlow was imported along the way.
WITHOUT_TENSORFLOW = """
import runpy, sys
try:
    runpy.run_path("main.py", run_name="__main__")
finally:
    assert "tensorflow" not in sys.modules
"""


def run(*args, code=None, devices=2):
    command = [sys.executable, *(["-c", code] if code else ["main.py"]), *args]
    # Without LLVM's optimiser, which takes longer than these few steps.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


def test_the_imagenet_config_trains_on_miniature_imagenet_without_tensorflow(imagenet_mini, tmp_path):
    done = run(
        "--config=configs/fcvit_s12.py",
        f"--workdir={tmp_path}",
        f"--config.data.data_dir={imagenet_mini}",
        "--config.data.batch_size=8",
        "--config.data.image_size=32",
        "--config.model.bn_group_size=4",
        "--config.train.steps=3",
        code=WITHOUT_TENSORFLOW,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14,701,832 parameters in bfloat16" in done.stdout
    assert "over 21 examples" in done.stdout
    assert "learning rate 7.81e-06 (optim.lr 0.001 x batch 8 / 1024), at most 1e-06 in this run" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 3]
    assert lines[1]["eval/count"] == 21
    metadata = json.loads((tmp_path / "checkpoints/3/metadata/metadata").read_text())
    assert metadata["class_names"][0] == "n01440764"


def test_the_python_of_the_readme_runs(monkeypatch):
    monkeypatch.setitem(fcvit_jax.VARIANTS["fcvit_tiny"], "depths", (1, 1, 1, 2))  # fewer blocks to compile
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 10)
