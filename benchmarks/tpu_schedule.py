"""Count what the TPU compiler schedules for the depthwise convolution and the training step: no TPU is needed.

Example:
  pip install libtpu
  python -m benchmarks.tpu_schedule --json tpu_schedule.json
  python -m benchmarks.tpu_schedule --models fcvit_s12 --json tpu_step.json

A TPU core runs one bundle of instructions per cycle, in the order that the compiler has fixed. The compiler writes its
schedules to files. An operation takes at least its bundles times its iterations, or the time of its transfers from and
to HBM; a program takes at least the sum of its operations. Waiting for memory or for other cores is not included, nor
is anything else that only a TPU shows. So the figures are lower bounds, not measurements.
"""

import math
import os
import re
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU VM whose metadata could be read

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from benchmarks.depthwise import PASSES, SIZES, jax_pass
from benchmarks.measure import ITEM_BYTES, Step, make_parser, report
from fcvit_jax.depthwise import depthwise_conv
from fcvit_jax.networks import layers
from fcvit_jax.networks.fcvit import VARIANTS

CLOCK, HBM = 1.5e9, 819e9  # of a TPU v5e: cycles and bytes a second
# (H, W, C, k): the token mixers of fcvit_tiny and fcvit_s12, and smaller filters, for where the choice turns.
TOKEN_MIXERS = [size[1:] for name in ("fcvit_tiny", "fcvit_s12") for size in SIZES[name]]
TPU_SIZES = [*TOKEN_MIXERS, (56, 56, 64, 5), (14, 14, 320, 5), (14, 14, 1280, 3)]
INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.-]+) = (.*?) [\w-]+\((.*?)\)")


def hbm_bytes(shape):
    """Bytes of an HLO shape's arrays, except those in VMEM, S(1)."""
    arrays = re.findall(r"(\w+)\[([\d,]+)\](\{[^}]*\})", shape)
    in_hbm = [(dtype, dims.split(",")) for dtype, dims, layout in arrays if "S(1)" not in layout]
    return sum(ITEM_BYTES.get(dtype, 0) * math.prod(map(int, dims)) for dtype, dims in in_hbm)


def milliseconds(lowered, dump):
    """Lower bounds of a program's time: by its bundles alone, and with every operation at most as fast as HBM."""
    for file in dump.iterdir():
        file.unlink()
    text = lowered.compile().as_text()
    bundles = {}
    for file in dump.glob("*schedule-analysis_final_bundles.txt"):
        name = re.fullmatch(r"\d+-(.*)-\d+-schedule-analysis_final_bundles\.txt", file.name)[1]
        bundles["%" + name] = int(re.search(r"total scheduled bundles:\s+(\d+)", file.read_text())[1])

    shapes, by_bundles, with_hbm = {}, 0.0, 0.0
    entry = text[text.index("\nENTRY") :]
    if " while(" in entry:
        raise ValueError("the program has loops, whose turns are not counted here")
    for line in entry.splitlines():
        if " constant(" in line or not (match := INSTRUCTION.match(line)):
            continue
        name, shape, operands = match.groups()
        shapes[name] = shape
        if name in bundles:
            bounds = re.search(r'"iteration_bounds":\[([^\]]*)\]', line)
            iterations = math.prod(int(bound) for bound in re.findall(r"\d+", bounds[1])) if bounds else 1
            seconds = bundles[name] * iterations / CLOCK
            size = hbm_bytes(shape) + sum(hbm_bytes(shapes.get(o, "")) for o in re.findall(r"%[\w.-]+", operands))
            by_bundles += seconds
            with_hbm += max(seconds, size / HBM)
    return [1e3 * by_bundles, 1e3 * with_hbm]


def convolution(size, which, batch_size, dtype, device, dump):
    """{impl: milliseconds} of one pass."""
    height, width, channels, k = size
    sharding = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((batch_size, height, width, channels), dtype, sharding=sharding)
    kernel = jax.ShapeDtypeStruct((k, k, channels), jnp.float32, sharding=sharding)
    return {
        impl: milliseconds(jax.jit(jax_pass(impl, which)).lower(x, kernel, x), dump) for impl in ("lax", "toeplitz")
    }


def step(model, batch_size, dtype, device, dump):
    """{"lax" or "default": milliseconds} of the training step at 224 x 224: convolved by lax alone, and by default."""
    mesh = Mesh(np.array([[device]]), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    times = {}
    for name, impl in (("lax", "lax"), ("default", None)):
        with mock.patch.object(layers, "depthwise_conv", partial(depthwise_conv, impl=impl)):
            jax.clear_caches()
            times[name] = milliseconds(Step(model, batch_size, 224, dtype, mesh).lower(), dump)
    return times


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="*", choices=VARIANTS, help="training steps instead of convolutions (slow)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()

    rows = []

    def show(what, which, ms):
        rows.append({"what": what, "pass": which, "ms": ms})
        cells = "".join(f"{impl:>10}{by_bundles:9.3f}{with_hbm:9.3f}" for impl, (by_bundles, with_hbm) in ms.items())
        lax, ours = (with_hbm for _, with_hbm in ms.values())
        print(f"{str(what):20}{which:16}{cells}{lax / ours:8.2f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
        print(f"{args.batch_size} images, {args.dtype}, {device.device_kind}; milliseconds by bundles, and with HBM")
        for name in args.models or ():
            show(name, "step", step(name, args.batch_size, args.dtype, device, dump))
        for size in () if args.models else TPU_SIZES:
            for which in (0, 2):  # the input gradient is the forward pass of the flipped filter
                show(size, PASSES[which], convolution(size, which, args.batch_size, args.dtype, device, dump))
    report(args, rows, jax=version("jax"), libtpu=version("libtpu"))


if __name__ == "__main__":
    main()
