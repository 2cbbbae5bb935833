"""Time non-maximum suppression and RoIAlign, beside torchvision's where it is installed.

Example:
  python -m benchmarks.boxes --image-size 800 1344 --json boxes.json

They are the suppression of 2,000 boxes of one image (by overlaps above 0.7, as for proposals), and the features of
7 x 7 cells of 512 boxes from a pyramid of four maps with 256 channels, and these with the gradient of the maps. Boxes
are random: sides from 16 to 512 pixels, all sizes as likely on a logarithmic scale.
"""

from collections import OrderedDict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.depthwise import torch_device, torch_repeated
from benchmarks.detection import torchvision
from benchmarks.measure import about, make_parser, milliseconds, repeated, report
from fcvit_jax.devices.cpu import compiler_options
from fcvit_jax.networks.boxes import STRIDES, map_sizes, nms
from fcvit_jax.networks.roi_align import pyramid_roi_align


def random_boxes(rng, number, size):
    """(number, 4) within an image of size (height, width)."""
    sides = np.exp(rng.uniform(np.log(16), np.log(512), (number, 2)))
    centres = rng.uniform(0, size[::-1], (number, 2))
    corners = np.concatenate([centres - sides / 2, centres + sides / 2], 1)
    return corners.clip(0, np.tile(size[::-1], 2)).astype(np.float32)


def jax_contestants(boxes, scores, maps, rois):
    def pool(maps):
        return pyramid_roi_align(maps, rois[None], size=7)

    def squares(maps):
        return jnp.square(pool(maps)).sum()

    calls = {
        "NMS of 2,000": (partial(nms, threshold=0.7), boxes, scores),
        "RoIAlign of 512": (pool, maps),
        "RoIAlign of 512, gradient": (jax.grad(squares), maps),
    }
    compiled = {
        name: (jax.jit(call).lower(*args).compile(compiler_options()), args) for name, (call, *args) in calls.items()
    }
    return {name: repeated(partial(program, *args)) for name, (program, args) in compiled.items()}


def torch_contestants(boxes, scores, maps, rois, size):
    import torch

    device = torch_device()
    boxes, scores, rois = (torch.tensor(x, device=device) for x in (boxes, scores, rois))
    maps = [torch.tensor(np.moveaxis(x, -1, 1).copy(), device=device) for x in maps]
    pooler = torchvision.ops.MultiScaleRoIAlign([str(i) for i in range(4)], 7, 0)

    def pool(maps):
        return pooler(OrderedDict((str(i), x) for i, x in enumerate(maps)), [rois], [size])

    def gradient():
        own = [x.detach().requires_grad_() for x in maps]
        pool(own).square().sum().backward()

    calls = {
        "NMS of 2,000": lambda: torchvision.ops.nms(boxes, scores, 0.7),
        "RoIAlign of 512": lambda: pool(maps),
        "RoIAlign of 512, gradient": gradient,
    }
    return {name: torch_repeated(call) for name, call in calls.items()}


def main():
    parser = make_parser(__doc__)
    parser.add_argument(
        "--image-size", nargs=2, type=int, default=[800, 1344], help="height, width (default: 800 1344)"
    )
    parser.add_argument("--seconds", type=float, default=5, help="per contestant, which takes at least three turns")
    args = parser.parse_args()
    rng, size = np.random.default_rng(0), tuple(args.image_size)
    boxes, scores, rois = random_boxes(rng, 2000, size), rng.random(2000, np.float32), random_boxes(rng, 512, size)
    maps = [rng.standard_normal((1, *cells, 256), np.float32) for cells in map_sizes(*size, STRIDES[:4])]
    contestants = {"fcvit_jax": jax_contestants(boxes, scores, maps, rois)}
    if torchvision:
        contestants["torchvision"] = torch_contestants(boxes, scores, maps, rois, size)
    times = milliseconds(
        {(what, by): run for by, runs in contestants.items() for what, run in runs.items()}, args.seconds
    )
    rows = [{"what": what, "by": by, "ms": ms} for (what, by), ms in times.items()]
    print(f"{'':27}{'by':12}ms, best  median")
    for row in rows:
        best, median = row["ms"]
        print(f"{row['what']:27}{row['by']:12}{best:8.2f}{median:8.2f}")
    report(args, rows, **about())


if __name__ == "__main__":
    main()
