"""Time every implementation of the depthwise convolution, pass by pass, beside PyTorch's where it is installed.

Example:
  python -m benchmarks.depthwise --quick --json depthwise.json
  python -m benchmarks.depthwise --batch-size 128 --dtype bfloat16 --sizes fcvit_s12 --peak 67 3350

The contestants take turns, so that a busy machine slows all of them equally. The table has the best turn in
milliseconds, and the time of PyTorch's faster layout divided by the default's (above 1: we are faster). The JSON has
the medians too. The error is the default's largest difference from `lax` in float32, as a share of the largest value.
The floor is the longer of two times at the device's peak rates: of the multiply-adds in float32, including those with
the padding, and of reading and writing a map once. The last column is the floor as a share of the default's time.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import about, make_parser, milliseconds, repeated, report
from fcvit_jax.depthwise import IMPLS, depthwise_conv

try:
    import torch
except ImportError:
    LAYOUTS = {}
else:
    torch.backends.cudnn.benchmark = True  # choose the fastest algorithm by trial, as XLA does
    LAYOUTS = {"torch NHWC": torch.channels_last, "torch NCHW": torch.contiguous_format}

PASSES = ("forward", "input gradient", "weight gradient")
# (N, H, W, C, k) at 224 x 224; the digits net's own images are 32 x 32.
SIZES = {
    "fcvit_tiny": [(8, 56, 56, 32, 11), (8, 28, 28, 64, 11), (8, 14, 14, 160, 11), (8, 7, 7, 320, 11)],
    "fcvit_s12": [(8, 56, 56, 64, 11), (8, 28, 28, 128, 11), (8, 14, 14, 320, 11), (8, 7, 7, 512, 11)],
    "channel_mixers": [(8, 56, 56, 256, 3), (8, 28, 28, 512, 3), (8, 14, 14, 1280, 3), (8, 7, 7, 1280, 3)],
    "digits": [(64, 8, 8, 16, 11), (64, 4, 4, 32, 11), (64, 2, 2, 64, 11), (64, 1, 1, 64, 11), (64, 8, 8, 64, 3)],
}
WORTHWHILE = {"cpu": ("lax", "shift", "banded"), "gpu": ("lax", "pallas", "cuda"), "tpu": ("lax", "toeplitz")}


def jax_pass(impl, which):
    """A function of x, kernel and g that computes pass number `which` of PASSES."""

    def run(x, kernel, g):
        if which == 0:
            return depthwise_conv(x, kernel, impl)
        return jax.vjp(lambda x, kernel: depthwise_conv(x, kernel, impl), x, kernel)[1](g)[which - 1]

    return run


def jax_contestant(impl, which, sets):
    run = jax.jit(jax_pass(impl, which))
    return jax.jit(lambda sets: [run(*inputs) for inputs in sets]).lower(sets)


def difference(result, which, inputs):
    """The largest difference from the pass by `lax` in float32, as a share of the largest value."""
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax_pass("lax", which))(*(array.astype(jnp.float32) for array in inputs))
    return float(jnp.abs(result - expected).max() / jnp.abs(expected).max())


def torch_device():
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def torch_repeated(call):
    """Like `repeated`, for a call of PyTorch."""
    return repeated(call, lambda _: torch.cuda.synchronize() if torch_device() == "cuda" else None)


def torch_sets(sets, layout):
    def tensor(array):
        dtype, array = getattr(torch, array.dtype.name), np.asarray(array, np.float32)
        array = torch.tensor(array, device=torch_device()).permute(0, 3, 1, 2)
        return array.to(dtype).contiguous(memory_format=layout)

    return [(tensor(x), tensor(kernel[None]).permute(1, 0, 2, 3).contiguous(), tensor(g)) for x, kernel, g in sets]


def torch_contestant(which, sets):
    def run(x, kernel, g):
        channels, _, k, _ = kernel.shape
        if which == 0:
            return torch.nn.functional.conv2d(x, kernel, padding=k // 2, groups=channels)
        mask = [which == 1, which == 2, False]
        sizes = [k // 2] * 2
        return torch.ops.aten.convolution_backward(
            g, x, kernel, [0], [1, 1], sizes, [1, 1], False, [0, 0], channels, mask
        )

    return torch_repeated(lambda: [run(*tensors) for tensors in sets])


def draw(size, dtype):
    n, height, width, channels, k = size
    # On an accelerator, several sets of inputs: more than its cache holds, and enough to hide the start of a program.
    for key in jax.random.split(jax.random.key(0), 1 if jax.default_backend() == "cpu" else 4):
        keys = jax.random.split(key, 3)
        x, g = (jax.random.normal(key, (n, height, width, channels), dtype) for key in keys[:2])
        yield x, jax.random.normal(keys[2], (k, k, channels), dtype), g


def measure(size, dtype, impls, seconds):
    """{contestant: [best, median]} in milliseconds and the default's error, of every pass."""
    sets = list(draw(size, dtype))
    # Its loop is over the positions: on a map of 56 x 56 fifty times as long as `shift` takes.
    impls = [impl for impl in impls if impl != "banded" or size[1] * size[2] <= 64]
    lowered = {(which, impl): jax_contestant(impl, which, sets) for which in range(3) for impl in impls}
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values()), strict=True))
    tensors = {name: torch_sets(sets, layout) for name, layout in LAYOUTS.items()}
    for which in range(3):
        contestants = {impl or "default": repeated(partial(compiled[which, impl], sets)) for impl in impls}
        contestants |= {name: torch_contestant(which, tensors[name]) for name in LAYOUTS}
        times = milliseconds(contestants, seconds)
        times = {by: [ms / len(sets) for ms in values] for by, values in times.items()}
        yield times, difference(compiled[which, None](sets)[0], which, sets[0])


def floor_ms(size, dtype, peak):
    n, height, width, channels, k = size
    values = n * height * width * channels
    return max(2 * values * k * k / (1e9 * peak[0]), 2 * values * dtype.itemsize / (1e6 * peak[1]))


def main():
    impls = WORTHWHILE[jax.default_backend()]
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fcvit_tiny's token mixers only, less time each")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch-size", type=int, help="instead of 8, and of the digits net's 64")
    parser.add_argument(
        "--impls", nargs="+", choices=IMPLS, default=impls, help="beside the default; here: %(default)s"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=0.5, help="per contestant, which takes at least three turns")
    parser.add_argument("--peak", nargs=2, type=float, metavar=("TFLOPS", "GB/S"), help="for the floor")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.seconds = ["fcvit_tiny"], min(args.seconds, 0.3)

    dtype = jnp.dtype(args.dtype)
    columns = ("default", *args.impls, *LAYOUTS)
    heads = "".join(f"{name:>11}" for name in columns)
    print(f"{'N, H, W, C, k':24}{'pass':16}{heads}  torch / default    error  floor")
    rows = []
    for n, *shape in (size for name in args.sizes for size in SIZES[name]):
        size = (args.batch_size or n, *shape)
        passes = measure(size, dtype, (None, *args.impls), args.seconds)
        for name, (times, error) in zip(PASSES, passes, strict=True):
            row = {"size": size, "pass": name, "ms": times, "error": error}
            cells = "".join(f"{times[by][0]:11.3f}" if by in times else f"{'-':>11}" for by in columns)
            theirs = [times[by][0] for by in LAYOUTS]
            ratio = f"{min(theirs) / times['default'][0]:17.2f}" if theirs else f"{'-':>17}"
            if args.peak:
                row["floor_ms"] = floor_ms(size, dtype, args.peak)
            share = f"{row['floor_ms'] / times['default'][0]:7.0%}" if args.peak else f"{'-':>7}"
            print(f"{str(size):24}{name:16}{cells}{ratio}{error:9.1e}{share}", flush=True)
            rows.append(row)
    report(args, rows, **about())


if __name__ == "__main__":
    main()
