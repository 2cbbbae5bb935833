"""Measure the memory of a training run as it goes on, with workers, evaluation and asynchronous saves.

Example:
  python -m benchmarks.memory --json memory.json
  python -m benchmarks.memory -- --config.data.dataset=synthetic --config.model.num_classes=1000

The figures are the resident memory of the training process and of all its workers. Pages of files are not counted,
since the kernel can drop them and read them again.
"""

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.kill_resume import FLAGS, finish, last_step, start
from benchmarks.measure import about, make_parser, report


def resident_mib(pid):
    """MiB of a process, and of its children together; 0 for a process that has ended."""

    def one(pid):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024
        except OSError:
            return 0

    children = [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return one(pid), sum(map(one, children))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 500, 1000, 1500, 2000], help="when to measure")
    parser.add_argument("flags", nargs="*", help="further flags of main.py, after --")
    args = parser.parse_args()
    if sys.platform != "linux":
        parser.error("this reads /proc, which Linux has")

    workdir = Path(tempfile.mkdtemp()) / "run"
    seldom = ["--config.checkpoint.save_every=200", "--config.train.eval_every=8"]  # every 200 steps
    length = f"--config.train.steps={args.steps[-1] + 1}"
    process = start(workdir, [*FLAGS, *seldom, length, *args.flags])
    print("   step  process, MiB  workers, MiB", flush=True)
    rows = []
    for step in args.steps:
        while last_step(workdir) < step and process.poll() is None:
            time.sleep(0.1)
        own, workers = resident_mib(process.pid)
        rows.append({"step": step, "process_mib": own, "workers_mib": workers})
        print(f"{step:7}{own:14.1f}{workers:14.1f}", flush=True)
    finish(process, workdir)
    report(args, rows, **about())


if __name__ == "__main__":
    main()
