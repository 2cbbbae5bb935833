"""Time every implementation of the depthwise convolution, pass by pass, beside PyTorch's where it is installed.

Example:
  python -m benchmarks.depthwise --quick --json depthwise.json

The contestants take turns, so that a busy machine slows all of them alike; the table gives the best turn in
milliseconds, and PyTorch's divided by the default's (above 1: we are faster); the JSON has the medians too.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import about, make_parser, milliseconds, report
from fcvit_jax.depthwise import IMPLS, depthwise_conv

try:
    import torch
except ImportError:
    torch = None

PASSES = ("forward", "input gradient", "weight gradient")
# (N, H, W, C, k): token mixers of fcvit_tiny and fcvit_s12 at 224 x 224, channel mixers, the digits net.
SIZES = [
    (8, 56, 56, 32, 11),
    (8, 28, 28, 64, 11),
    (8, 14, 14, 160, 11),
    (8, 7, 7, 320, 11),
    (8, 56, 56, 64, 11),
    (8, 28, 28, 128, 11),
    (8, 14, 14, 320, 11),
    (8, 7, 7, 512, 11),
    (8, 56, 56, 256, 3),
    (8, 28, 28, 512, 3),
    (8, 14, 14, 1280, 3),
    (8, 7, 7, 1280, 3),
    (64, 8, 8, 16, 11),
    (64, 4, 4, 32, 11),
    (64, 2, 2, 64, 11),
    (64, 1, 1, 96, 11),
    (64, 8, 8, 128, 3),
]
QUICK = SIZES[:4]


def jax_pass(impl, which):
    """A function of x, kernel and g: the pass of that number in PASSES."""

    def run(x, kernel, g):
        if which == 0:
            return depthwise_conv(x, kernel, impl)
        return jax.vjp(lambda x, kernel: depthwise_conv(x, kernel, impl), x, kernel)[1](g)[which - 1]

    return run


def jax_contestant(impl, which, x, kernel, g):
    compiled = jax.jit(jax_pass(impl, which)).lower(x, kernel, g).compile()
    return lambda: jax.block_until_ready(compiled(x, kernel, g))


def torch_device():
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def torch_contestant(which, x, kernel, g):
    device = torch_device()

    def channels_last(array):
        tensor = torch.tensor(np.asarray(array, np.float32), device=device).permute(0, 3, 1, 2)
        return tensor.to(getattr(torch, x.dtype.name))

    k, _, channels = kernel.shape
    x, g, kernel = channels_last(x), channels_last(g), channels_last(kernel[None]).permute(1, 0, 2, 3).contiguous()

    def run():
        if which == 0:
            torch.nn.functional.conv2d(x, kernel, padding=k // 2, groups=channels)
        else:
            sizes = [k // 2] * 2
            mask = [which == 1, which == 2, False]
            torch.ops.aten.convolution_backward(g, x, kernel, [0], [1, 1], sizes, [1, 1], False, [0, 0], channels, mask)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def measure(size, dtype, seconds):
    n, height, width, channels, k = size
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = (jax.random.normal(key, (n, height, width, channels), dtype) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (k, k, channels), dtype)
    for which, name in enumerate(PASSES):
        contestants = {}
        for impl in (None, *IMPLS):
            # Its loop is over the positions: on a map of 56 x 56 fifty times as long as `shift` takes.
            if impl != "banded" or height * width <= 64:
                contestants[impl or "default"] = jax_contestant(impl, which, x, kernel, g)
        if torch is not None:
            contestants["torch"] = torch_contestant(which, x, kernel, g)
        yield {"size": size, "pass": name, "ms": milliseconds(contestants, seconds)}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fcvit_tiny's token mixers only, less time each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()

    columns = ("default", *IMPLS, *(["torch"] if torch is not None else []))
    print(f"{'N, H, W, C, k':24}{'pass':16}" + "".join(f"{name:>10}" for name in columns) + "  torch / default")
    rows = []
    for size in QUICK if args.quick else SIZES:
        for row in measure(size, jnp.dtype(args.dtype), 0.3 if args.quick else 0.5):
            rows.append(row)
            cells = "".join(f"{row['ms'][name][0]:10.3f}" if name in row["ms"] else f"{'-':>10}" for name in columns)
            ratio = f"{row['ms']['torch'][0] / row['ms']['default'][0]:17.2f}" if torch is not None else ""
            print(f"{str(size):24}{row['pass']:16}{cells}{ratio}", flush=True)
    report(args, rows, **about())


if __name__ == "__main__":
    main()
