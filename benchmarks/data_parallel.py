"""Time the training step on 1, 2, 4 and 8 simulated CPU devices, and list the collectives of its program.

Example:
  python -m benchmarks.data_parallel --model fcvit_tiny --image-size 64 --json data_parallel.json

The batch is the same for any number of devices, and the devices share the cores of one machine. So times show the cost
of partitioning, and say nothing about scaling. The groups of BatchNorm and mixing lie inside a device ("inside"), or
are the whole batch ("whole"). Bytes are the payload of each collective in the compiled program, on one device in one
step. With groups inside, the goal is one all-reduce, of the gradients, the running statistics and the loss.
"""

import math
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from benchmarks.measure import ITEM_BYTES, Step, about, make_parser, milliseconds, report
from fcvit_jax.devices.cpu import compiler_options
from fcvit_jax.devices.sharding import bytes_per_device, make_mesh
from fcvit_jax.networks.fcvit import VARIANTS

DEVICES = (1, 2, 4, 8)
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)\("
)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


def collectives(text):
    """The collectives of a compiled program: [{"op", "bytes", "arrays", "in_loop"}]."""
    found, entry = [], False
    for line in text.splitlines():
        if line.startswith(("ENTRY", "%", "}")):
            entry = line.startswith("ENTRY")
        elif match := COLLECTIVE.search(line):
            arrays = [(dtype, [int(d) for d in dims.split(",") if d]) for dtype, dims in ARRAY.findall(match[1])]
            size = sum(ITEM_BYTES[dtype] * math.prod(dims) for dtype, dims in arrays)
            found.append({"op": match[2], "bytes": size, "arrays": len(arrays), "in_loop": not entry})
    return found


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=VARIANTS, default="fcvit_tiny")
    parser.add_argument("--batch-size", type=int, default=32, help="over all devices, a multiple of 16 (default: 32)")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=10, help="per contestant, which takes at least three turns")
    parser.add_argument("--quick", action="store_true", help="1 and 8 devices, groups inside them, 32x32 images")
    args = parser.parse_args()
    if args.quick:
        args.image_size, args.seconds = 32, 0

    rows, contestants = [], {}
    for devices in (1, 8) if args.quick else DEVICES:
        for groups in ("inside",) if args.quick else ("inside", "whole"):
            group_size = args.batch_size // DEVICES[-1] if groups == "inside" else None
            mesh = make_mesh(data=devices)
            step = Step(args.model, args.batch_size, args.image_size, args.dtype, mesh, group_size)
            compiled = step.lower().compile(compiler_options(mesh))
            gradient_bytes = bytes_per_device(step.abstract_state().variables["params"])
            ops = collectives(compiled.as_text())
            rows.append({"devices": devices, "groups": groups, "gradient_bytes": gradient_bytes, "collectives": ops})
            contestants[devices, groups] = step.runner(compiled)
    times = milliseconds(contestants, args.seconds)

    print(f"{args.model}, {args.batch_size} images of {args.image_size} x {args.image_size}, {args.dtype}")
    print("devices  groups   ms, best    median  collectives  in loops        MB  MB of gradients")
    for row in rows:
        best, median = row["ms"] = times[row["devices"], row["groups"]]
        ops = row["collectives"]
        megabytes, in_loops = sum(op["bytes"] for op in ops) / 1e6, sum(op["in_loop"] for op in ops)
        cells = f"{row['devices']:7}  {row['groups']:6}{best:11.1f}{median:10.1f}{len(ops):13}{in_loops:10}"
        print(f"{cells}{megabytes:10.3f}{row['gradient_bytes'] / 1e6:17.3f}")
    report(args, rows, **about())


if __name__ == "__main__":
    main()
