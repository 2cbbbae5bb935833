"""Time the forward pass and the training step of every variant, beside PyTorch's where it is installed.

Example:
  python -m benchmarks.train_step --models fcvit_tiny fcvit_s12 --batch-size 8 --json train_step.json
  python -m benchmarks.train_step --task segmentation --models fcvit_s12 --batch-size 2
  python -m benchmarks.train_step --task detection --models fcvit_s12 --batch-size 2 --image-size 320 320
  python -m benchmarks.train_step --batch-size 128 --dtype bfloat16 --peak-tflops 989 --json train_step.json

All contestants take turns, so that a busy machine slows them equally; on a GPU a turn is ten steps and one wait. They
are FCViT here, FCViT in PyTorch (the tests' reference) with channels last (NHWC) and first (NCHW), and timm's
convnext_tiny and poolformer_s12 if timm is installed; for segmentation, Semantic FPN over FCViT. The last column
compares with PyTorch's faster layout. Our step is `fcvit_jax.run.step.train_step`: it takes uint8 images and includes
mixing, erasing, drop-path and AdamW. PyTorch's step takes normalised images and includes only AdamW. With bfloat16
PyTorch runs under autocast, on a GPU with torch.compile.

Utilisation is the rate of useful operations, divided by the rate of a large matrix product in the same dtype (measured,
or --peak-tflops). Useful operations are two for each multiply-add of the forward pass as `fcvit_jax.summary` counts
them, and three times that for a step. (XLA's count includes a loop's body only once.) MiB are the arguments, results
and temporaries of the compiled program, or the most that PyTorch allocated on a GPU. Compile seconds are those of
tracing and compiling our program.

For detection they are Mask R-CNN with COCO's numbers on images of one size, from uint8 images to detections without
pasted masks, or to updated weights; and torchvision's Mask R-CNN over the same pyramid, from normalised images, if
torchvision is installed. In the forward pass both find about as many objects as may be (`detection.spread`). Useful
operations are known of the forward pass alone.
"""

import contextlib
import importlib.util
import os
import sys
import time
from functools import partial
from pathlib import Path

# PyTorch uses the same GPU, so JAX must not reserve its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import detection
from benchmarks.depthwise import LAYOUTS, torch_device, torch_repeated
from benchmarks.measure import Step, about, make_parser, milliseconds, repeated, report
from fcvit_jax import tasks
from fcvit_jax.devices.cpu import compiler_options
from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.networks.fcvit import VARIANTS
from fcvit_jax.summary import summarize

try:
    import torch
except ImportError:
    torch = None
else:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import torch_reference
    import torch_segmenter


def program_mib(compiled):
    """The most memory that a program holds. Results that reuse the memory of arguments count once."""
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (size + memory.temp_size_in_bytes) / 2**20


def compiled_contestant(lower, make_run, mesh):
    """(run, MiB, seconds of tracing and compiling) of a program."""
    start = time.perf_counter()
    program = lower().compile(compiler_options(mesh))
    seconds = time.perf_counter() - start
    return make_run(program), program_mib(program), seconds


def jax_contestants(name, args):
    """{pass: (run, MiB, compile seconds)} of FCViT, or of the segmenter or the detector over it."""
    mesh = make_mesh(data=1)
    if args.task == "detection":
        step = detection.DetectionStep(name, args, mesh)
        forward, inputs = step.detect, step.inputs()
    else:
        step = Step(name, args.batch_size, args.image_size[0], args.dtype, mesh, task=tasks.load(args.task))
        forward, inputs = step.model.apply, (step.create_state().eval_variables, jnp.asarray(normal_images(args)))
    contestants = {}
    if "forward" in args.passes:

        def make_run(program):
            return repeated(lambda: program(*inputs))

        contestants["forward"] = compiled_contestant(lambda: jax.jit(forward).lower(*inputs), make_run, mesh)
    if "step" in args.passes:
        contestants["step"] = compiled_contestant(step.lower, step.runner, mesh)
    return contestants


def torch_contestants(make_network, args, layout):
    """{pass: (run, MiB, None)} of a PyTorch network for classification or segmentation."""
    device = torch_device()
    network = make_network().to(device, memory_format=layout)
    images = torch.tensor(normal_images(args), device=device).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    if args.task == "segmentation":
        targets = torch.randint(150, (args.batch_size, *args.image_size), device=device)
    else:
        targets = torch.softmax(torch.randn(args.batch_size, 1000, device=device), 1)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05, fused=device == "cuda")
    apply = torch.compile(network) if device == "cuda" else network

    def autocast():
        return torch.autocast(device, torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext()

    def forward():
        network.eval()
        with torch.inference_mode(), autocast():
            apply(images)

    def step():
        network.train()
        optimizer.zero_grad()
        with autocast():
            logits = apply(images)
        if args.task == "segmentation":
            logits = torch.nn.functional.interpolate(logits.float(), targets.shape[1:], mode="bilinear")
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return with_memory(forward, step, args)


def torch_detector_contestants(name, args):
    return with_memory(*detection.torch_calls(name, args, torch_device()), args)


def with_memory(forward, step, args):
    """{pass: (run, MiB, None)} of two functions of PyTorch; MiB is None on a CPU."""

    def contestant(call):
        run = torch_repeated(call)
        if torch_device() == "cpu":
            return run, None, None
        run(1)
        torch.cuda.reset_peak_memory_stats()
        run(1)
        return run, torch.cuda.max_memory_allocated() / 2**20, None

    calls = {"forward": forward, "step": step}
    return {which: contestant(calls[which]) for which in args.passes}


def normal_images(args):
    shape = (args.batch_size, *args.image_size, 3)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def matmul_contestant(dtype):
    """A product of two square matrices, and its floating-point operations."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    multiply = jax.jit(jnp.matmul).lower(a, a).compile()
    return repeated(lambda: multiply(a, a)), 2 * n**3


def parse_arguments():
    others = [*LAYOUTS, *(["timm"] if LAYOUTS and importlib.util.find_spec("timm") else [])]
    parser = make_parser(__doc__)
    parser.add_argument("--task", choices=tasks.NAMES, default="classification")
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch-size", type=int, default=8, help="even (default: 8)")
    size = "side, or of detection height and width (default: 224, segmentation: 512, detection: 800 1344)"
    parser.add_argument("--image-size", nargs="+", type=int, help=size)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--beside", nargs="*", choices=others, default=others, help="others to time (default: all)")
    parser.add_argument("--passes", nargs="+", choices=("forward", "step"), default=["forward", "step"])
    parser.add_argument("--seconds", type=float, default=20, help="per contestant, which takes at least three turns")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak; default: measured by a matrix product")
    parser.add_argument("--quick", action="store_true", help="fcvit_tiny with few images of 64 x 64, three turns")
    args = parser.parse_args()
    if args.quick:
        args.models, args.image_size, args.seconds = ["fcvit_tiny"], [64], 0
        args.batch_size = 1 if args.task == "detection" else 4
    size = args.image_size or {"classification": [224], "segmentation": [512], "detection": [800, 1344]}[args.task]
    if len(size) > (2 if args.task == "detection" else 1):
        parser.error("--image-size takes one number, for detection also two.")
    args.image_size = size[0], size[-1]
    return args


def make_makers(args):
    """{(model, by): a function that makes its contestants}, and {model: multiply-adds of the forward pass}."""
    references = {"classification": torch_reference.FCViT, "segmentation": torch_segmenter.SemanticFPN} if torch else {}
    makers, multiply_adds = {}, {}
    for name in args.models:
        makers[name, "fcvit_jax"] = partial(jax_contestants, name, args)
        network = tasks.load(args.task).create_model(name)
        multiply_adds[name] = args.batch_size * summarize(network, args.image_size)["total"].multiply_adds
        if args.task == "detection":
            if detection.torchvision and args.beside:
                makers[name, "torch NCHW"] = partial(torch_detector_contestants, name, args)
            continue
        for by in (layout for layout in LAYOUTS if layout in args.beside):
            make_network = partial(references[args.task], **VARIANTS[name])
            makers[name, by] = partial(torch_contestants, make_network, args, LAYOUTS[by])
    if "timm" in args.beside and args.task == "classification":
        import timm

        for name in ("convnext_tiny", "poolformer_s12"):
            make_network = partial(timm.create_model, name)
            makers[name, "timm NHWC"] = partial(torch_contestants, make_network, args, torch.channels_last)
    return makers, multiply_adds


def main():
    args = parse_arguments()
    makers, multiply_adds = make_makers(args)
    contestants = {}
    for key in (bar := tqdm(makers, unit="network")):
        bar.set_description(", ".join(key))
        contestants[key] = makers[key]()
    matmul, matmul_flops = matmul_contestant(args.dtype)
    runs = {(*key, which): run for key, passes in contestants.items() for which, (run, *_) in passes.items()}
    times = milliseconds({"matmul": matmul, **runs}, args.seconds)
    peak = 1e12 * args.peak_tflops if args.peak_tflops else matmul_flops / (1e-3 * times["matmul"][0])

    batch = "{} images of {} x {}".format(args.batch_size, *args.image_size)
    print(f"{batch}, {args.dtype}, peak {peak / 1e12:.3f} TFLOP/s")
    print(f"{'model':15}{'by':11}{'pass':9}images/s, best  median{'MiB':>9}  utilisation  torch / ours  compile, s")
    rows = []
    for (name, by, which), run_ms in ((key, times[key]) for key in runs):
        _, mib, compile_s = contestants[name, by][which]
        row = {"model": name, "by": by, "pass": which, "ms": run_ms, "mib": mib, "compile_s": compile_s}
        row["utilisation"] = None
        if name in multiply_adds and (which == "forward" or args.task != "detection"):
            flops = 2 * multiply_adds[name] * (3 if which == "step" else 1)
            row["utilisation"] = flops / (1e-3 * run_ms[0]) / peak
        rows.append(row)
        best, median = (1e3 * args.batch_size / ms for ms in run_ms)
        theirs = [times[key][0] for key in runs if key[::2] == (name, which) and key[1].startswith("torch")]
        print(
            f"{name:15}{by:11}{which:9}{best:14.2f}{median:8.2f}"
            f"{f'{mib:.0f}' if mib else '-':>9}"
            f"{format(row['utilisation'], '13.1%') if row['utilisation'] else '-':>13}"
            f"{f'{min(theirs) / run_ms[0]:.2f}' if theirs and by == 'fcvit_jax' else '-':>14}"
            f"{f'{compile_s:.1f}' if compile_s else '-':>12}"
        )
    report(args, rows, **about(), peak_flops=peak)


if __name__ == "__main__":
    main()
