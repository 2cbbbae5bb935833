"""Kill a run at random moments, restart it each time, and compare its result with that of an undisturbed run.

    python -m benchmarks.kill_resume --kills 20

Every feature is on: asynchronous saves every few steps, evaluation, averages, drop-path, mixing, erasing, worker
processes. The exit status is 1 if the results differ in any bit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from fcvit_jax.run.saved import find_step, load_metadata

ROOT = Path(__file__).parent.parent
CLOCKS = ("train/images_per_second", "train/data_wait")
FLAGS = """--config=configs/digits.py --config.data.workers=2 --config.train.log_every=1 --config.train.eval_every=1
--config.model.dims=(8,8,16,16) --config.model.bn_group_size=16 --config.data.batch_size=16
--config.data.train_split=train[:400] --config.data.eval_split=validation[:100]
--config.checkpoint.save_every=4 --config.train.ema_decay=0.99 --config.model.drop_path_rate=0.1
--config.mixing.mixup_alpha=0.8 --config.mixing.cutmix_alpha=1.0""".split()


def record(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the figures that depend on time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def arrays(step: Path) -> dict:
    """All arrays of a checkpoint: variables, optimiser and, if there are any, averages."""
    items = [item for item in ("variables", "optimizer", "ema") if (step / item).is_dir()]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return {item: reader.restore(step / item) for item in items}


def assert_same_end(a: Path, b: Path) -> None:
    """Asserts that two runs are bitwise equal: final and best state, best metric, and record (every step once)."""
    for folder in ("checkpoints", "best"):
        jax.tree.map(np.testing.assert_array_equal, *(arrays(find_step(workdir / folder)) for workdir in (a, b)))
    assert load_metadata(a / "best") == load_metadata(b / "best")
    assert record(a) == record(b)
    steps = [line["step"] for line in record(a) if "train/loss" in line]
    assert steps == list(range(1, steps[-1] + 1))


def start(workdir: Path, flags: list[str]) -> subprocess.Popen:
    """Starts main.py; what it prints goes to WORKDIR.log."""
    with open(f"{workdir}.log", "a") as log:
        command = [sys.executable, "main.py", f"--workdir={workdir}", *flags]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, workdir: Path) -> None:
    assert process.wait(timeout=3600) == 0, Path(f"{workdir}.log").read_text()


def last_step(workdir: Path) -> int:
    """The last step in the record, which may be from before a kill."""
    try:
        return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def kill_and_resume(workdir: Path, flags: list[str], steps: int, kills: int, seed: int = 0) -> list[int]:
    """Kills a run again and again, then lets it finish.

    Args:
      workdir: a new folder for the run.
      flags: of main.py, including the number of steps.
      steps: the number of steps.
      kills: how often to kill it: every fourth time while it starts, otherwise up to 0.1 s after a random step.
      seed: of the moments of the kills.

    Returns:
      The last step in the record at each kill.
    """
    rng = np.random.default_rng(seed)
    targets = np.linspace(1, 0.75 * steps, kills + 1)  # well before the end
    killed = []
    for number in range(kills):
        process = start(workdir, flags)
        if number % 4 == 3:
            time.sleep(rng.uniform(0, 10))
        else:
            target = rng.integers(targets[number], targets[number + 1], endpoint=True)
            target = max(target, last_step(workdir) + 1)  # not before it has made progress
            while last_step(workdir) < target and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
        killed.append(last_step(workdir))
        process.kill()
        assert process.wait(timeout=60) < 0, Path(f"{workdir}.log").read_text()
    finish(start(workdir, flags), workdir)
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how often to kill the run")
    parser.add_argument("--steps", type=int, default=300, help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("flags", nargs="*", help="further flags of main.py, after --")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    flags = [*FLAGS, "--config.compilation_cache=False", f"--config.train.steps={args.steps}", *args.flags]
    begin = time.monotonic()
    finish(start(folder / "undisturbed", flags), folder / "undisturbed")
    print(f"undisturbed: {args.steps} steps in {time.monotonic() - begin:.0f} s", flush=True)
    killed = kill_and_resume(folder / "killed", flags, args.steps, args.kills, args.seed)
    log = (folder / "killed.log").read_text()
    print(f"killed {len(killed)} times, with the record at steps {killed}")
    print(
        f"unfinished saves found: {log.count('a save that was not finished')}, damaged: {log.count('cannot be read')}"
    )
    assert_same_end(folder / "killed", folder / "undisturbed")
    print(f"the results are the same, bit for bit; {time.monotonic() - begin:.0f} s in {folder}")


if __name__ == "__main__":
    main()
