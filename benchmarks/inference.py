"""Time the forward pass on a CPU beside PyTorch, onnxruntime and OpenVINO, whichever are installed.

Example:
  python -m benchmarks.inference --json inference.json
  python -m benchmarks.inference --cores 1 --models fcvit_tiny --seconds 5

All have the same weights, in float32. Ours is what `predict` runs: constants folded into the weights
(`fcvit_jax.networks.folded`); "not folded" is the network as it is trained. PyTorch runs the tests' reference with
channels last (NHWC) and first (NCHW); onnxruntime and OpenVINO run what `torch.onnx.export` makes of that.

Contestants take turns of a quarter of a second, whose first call is not counted: threads of the one before may still
wait for work in a loop. The rates are of the best and of the median call. Processor time is that of all threads, in
milliseconds per image, at best: other programs on the machine change it less than the rate. With several cores it
includes waiting in a loop; with `--cores 1` there is none. The last column is the largest difference from PyTorch's
logits, as a share of the largest value.
"""

import copy
import importlib.util
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import about, make_parser, report
from fcvit_jax import convert
from fcvit_jax.devices.cpu import compiler_options
from fcvit_jax.networks.fcvit import VARIANTS, create_model
from fcvit_jax.networks.folded import fold

OTHERS = ("torch", "onnxruntime", "openvino")
TURN = 0.25  # seconds


def reference(name):
    """The network in PyTorch, whose layer scales are 1: at their start, blocks would hardly change the logits."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import torch_reference

    torch.manual_seed(0)
    network = torch_reference.FCViT(**VARIANTS[name]).eval()
    with torch.no_grad():
        for key, x in network.named_parameters():
            if "layer_scale" in key:
                x.fill_(1)
    return network


def ours(name, network, images):
    """{contestant: a function that returns the logits} of FCViT here; network: in PyTorch, or None."""
    model = create_model(name)
    if network is None:
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    else:
        variables = convert.from_torch({key: x.numpy() for key, x in network.state_dict().items()}, model)
    images = jnp.asarray(images)

    def contestant(model, variables):
        variables = jax.device_put(variables)
        forward = jax.jit(model.apply).lower(variables, images).compile(compiler_options())
        return lambda: np.asarray(forward(variables, images))

    return {"fcvit_jax": contestant(*fold(model, variables)), "not folded": contestant(model, variables)}


def torch_contestants(network, images):
    import torch

    images = torch.tensor(images).permute(0, 3, 1, 2)

    def contestant(layout):
        placed = copy.deepcopy(network).to(memory_format=layout)
        x = images.contiguous(memory_format=layout)

        @torch.inference_mode()
        def run():
            return placed(x).numpy()

        return run

    return {"torch NHWC": contestant(torch.channels_last), "torch NCHW": contestant(torch.contiguous_format)}


def onnx_contestants(network, images, installed):
    """onnxruntime and OpenVINO, those that are installed, on the ONNX graph of the PyTorch network."""
    import torch

    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    contestants = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter without onnxscript is deprecated
        path = f"{folder}/model.onnx"
        torch.onnx.export(network, (torch.tensor(images),), path, dynamo=False, input_names=["images"])
        if "onnxruntime" in installed:
            import onnxruntime

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            contestants["onnxruntime"] = lambda: session.run(None, {"images": images})[0]
        if "openvino" in installed:
            import openvino

            # Without a hint it computes in bfloat16 where the processor has it.
            options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
            compiled = openvino.Core().compile_model(path, "CPU", options)
            request = compiled.create_infer_request()
            contestants["OpenVINO"] = lambda: request.infer({"images": images})[compiled.output(0)]
    return contestants


def seconds_of_calls(contestants, seconds):
    """For each contestant an array (calls, 2): wall-clock and processor time of its calls, which are made in turns."""
    calls = {name: [] for name in contestants}
    for _ in range(max(3, round(seconds / TURN))):
        for name, run in contestants.items():
            run()
            end = time.perf_counter() + TURN
            while not calls[name] or time.perf_counter() < end:
                wall, processor = time.perf_counter(), time.process_time()
                run()
                calls[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: np.array(times) for name, times in calls.items()}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=["fcvit_tiny", "fcvit_s12"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--cores", type=int, help="use no more than this many cores (Linux; default: all)")
    parser.add_argument("--seconds", type=float, default=10, help="per contestant, which takes at least three turns")
    parser.add_argument("--quick", action="store_true", help="fcvit_tiny with images of 64 x 64, three turns")
    args = parser.parse_args()
    if args.quick:
        args.models, args.image_size, args.seconds = ["fcvit_tiny"], 64, 0
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # before any library starts threads
    installed = {name for name in OTHERS if importlib.util.find_spec(name)}
    for name in (name for name in OTHERS if name not in installed):
        print(f"{name} is not installed and left out")
    if "torch" not in installed:
        installed = set()  # the others run what PyTorch exports

    print(f"{'model':12}{'batch':>5}  {'by':12}images/s, best  median  processor ms per image  difference")
    rows = []
    for name in args.models:
        network = reference(name) if "torch" in installed else None
        for batch in args.batch_sizes:
            images = np.random.default_rng(0).standard_normal((batch, args.image_size, args.image_size, 3), np.float32)
            contestants = ours(name, network, images)
            if network is not None:
                contestants |= torch_contestants(network, images) | onnx_contestants(network, images, installed)
            expected = contestants["torch NHWC" if network is not None else "not folded"]()
            for by, times in seconds_of_calls(contestants, args.seconds).items():
                error = np.abs(contestants[by]() - expected).max() / np.abs(expected).max()
                best, median = batch / times[:, 0].min(), batch / np.median(times[:, 0])
                processor = 1e3 * times[:, 1].min() / batch
                row = {"model": name, "batch": batch, "by": by, "best": best, "median": median}
                rows.append(row | {"processor_ms": processor, "difference": float(error)})
                print(f"{name:12}{batch:5}  {by:12}{best:14.1f}{median:8.1f}{processor:24.2f}{error:12.1e}")
    report(args, rows, **about())


if __name__ == "__main__":
    main()
