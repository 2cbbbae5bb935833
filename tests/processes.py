"""Runs of main.py on two processes."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import QUICKLY, free_port

ROOT = Path(__file__).parent.parent


def start_two(workdir, *arguments, slurm=False):
    """Starts a run on two processes with two devices each, which learn of each other by flags or as srun tells them."""
    port = str(free_port())
    command = [sys.executable, "main.py", f"--workdir={workdir}", *arguments, "--config.mesh.data=-1"]
    env = os.environ | {"XLA_FLAGS": f"{QUICKLY} --xla_force_host_platform_device_count=2"}
    if slurm:
        env |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
        env |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "JAX_COORDINATOR_PORT": port}
    else:
        command += [f"--coordinator=localhost:{port}", "--num_processes=2"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen(
            command if slurm else [*command, f"--process_id={number}"],
            env=env | {"SLURM_PROCID": number, "SLURM_LOCALID": number},
            **options,
        )
        for number in "01"
    ]


def finish(processes, code):
    """Waits for both; returns what each has printed."""
    try:
        texts = [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code, code], "\n".join(texts)
    assert "Traceback" not in "".join(texts)
    return texts
