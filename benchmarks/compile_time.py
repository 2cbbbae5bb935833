"""Time what a run waits for at its start: the initial weights, and tracing, lowering and compiling the training step.

Example:
  python -m benchmarks.compile_time --batch-size 8 --json compile_time.json

Each variant runs in a new process without the persistent compilation cache. The initial weights are traced, compiled
and drawn. Seconds are wall-clock time; in brackets is processor time, which a busy machine disturbs less. XLA compiles
with several threads.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import jax

from benchmarks.measure import Step, about, make_parser, report
from fcvit_jax.devices.cpu import compiler_options
from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.networks.fcvit import VARIANTS


def measure(name, args):
    """The figures of one variant, and the machine they were measured on."""
    jax.config.update("jax_enable_compilation_cache", False)
    step = Step(name, args.batch_size, args.image_size, args.dtype, make_mesh(data=1))
    jax.devices()

    def seconds(run):
        clock, processor = time.perf_counter(), time.process_time()
        result = run()
        return result, [time.perf_counter() - clock, time.process_time() - processor]

    _, weights = seconds(lambda: jax.block_until_ready(step.create_state()))
    lowered, lower = seconds(step.lower)
    options = compiler_options(step.mesh)
    compiled, compile_ = seconds(lambda: lowered.compile(options))
    lines = len(compiled.as_text().splitlines())
    return {"model": name, "weights": weights, "lower": lower, "compile": compile_, "program_lines": lines}, about()


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch-size", type=int, default=8, help="even (default: 8)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=1, help="how often to compile every variant, in turns")
    parser.add_argument("--quick", action="store_true", help="fcvit_tiny at 64 x 64 only")
    args = parser.parse_args()
    if args.quick:
        args.models, args.image_size = ["fcvit_tiny"], 64

    print(f"{args.batch_size} images of {args.image_size} x {args.image_size}, {args.dtype}")
    print(f"{'model':12}{'initial weights, s':>20}{'trace and lower, s':>20}{'compile, s':>20}{'lines':>10}")
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for name in args.models * args.rounds:
            row, machine = processes.submit(measure, name, args).result()
            rows.append(row)
            figures = (row["weights"], row["lower"], row["compile"])
            cells = "".join(f"{f'{clock:.1f} ({processor:.1f})':>20}" for clock, processor in figures)
            print(f"{name:12}{cells}{row['program_lines']:10}", flush=True)
    report(args, rows, **machine)


if __name__ == "__main__":
    main()
