"""The kernels of CUDA C++: their source compiled for the host, run thread by thread, and by NVRTC. No GPU is needed."""

import ctypes
import functools
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracle import assert_close, draw, oracle, ours, value_and_gradients

from fcvit_jax.depthwise import cuda, nvrtc
from fcvit_jax.errors import UserError

HERE = Path(__file__).parent
WHEELS = ("cu13", "cuda_nvcc")  # folders of those that bring ptxas
BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile them for the host")
needs_nvrtc = pytest.mark.skipif(nvrtc.find() is None, reason="NVRTC (pip install nvidia-cuda-nvrtc) is not installed")


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """A function that runs one kernel on the host: (macros, launch, inputs, output's shape and dtype) to its output."""
    folder = tmp_path_factory.mktemp("host")

    @functools.cache
    def build(macros, shared):
        library = folder / f"{len(list(folder.iterdir()))}.so"
        source = HERE / "cuda_on_host.h"
        defines = [f"-D{name}={value}" for name, value in (*macros, ("SHARED", shared))]
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{cuda._SOURCE.parent}", *defines]
        subprocess.run(["g++", *options, "-x", "c++", source, "-o", library], check=True, timeout=120)
        run = ctypes.CDLL(library).run
        run.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_bool, *[ctypes.c_void_p, ctypes.c_size_t] * 3]
        return run

    def run(macros, launch, inputs, shape, dtype):
        blocks, threads, shared = launch
        inputs = [np.asarray(array) for array in inputs]
        inputs += [np.zeros(0, np.float32)] * (2 - len(inputs))
        results = [np.zeros(shape, dtype) for _ in range(2)]
        for backwards, result in enumerate(results):
            sized = [part for array in (*inputs, result) for part in (ctypes.c_void_p(array.ctypes.data), array.nbytes)]
            assert build(tuple(macros.items()), shared)(blocks, threads, bool(backwards), *sized) == 0
        np.testing.assert_array_equal(*results)
        return results[0]

    return run


@pytest.fixture
def calls_on_host(on_host, monkeypatch):
    """Makes the module's calls run on the host; returns the list of the plans that they had."""
    plans = []
    monkeypatch.setattr(cuda, "_BLOCKS", 3)  # so that blocks of the weight gradient have several tiles
    cuda._plan.cache_clear()

    def call(name, plan, launch, out, *arrays):
        plans.append(plan)
        second = {"SECOND_STAGE": 1} if name == "depthwise_sum" else {}
        return jnp.asarray(on_host(plan.macros | second, launch, arrays, *out))

    monkeypatch.setattr(cuda, "_call", call)
    yield plans
    cuda._plan.cache_clear()


# What they are for: several tiles of each kind, rows of odd length, channels that are no multiple of a vector or of a
# tile, whole rows without margins, several maps to a tile and one beyond the last, filters larger than the map.
SIZES = [
    ((2, 19, 42, 24, 11), FLOAT32),
    ((1, 9, 67, 20, 3), BFLOAT16),
    ((3, 14, 14, 40, 11), BFLOAT16),
    ((5, 7, 7, 36, 11), FLOAT32),
    ((5, 7, 7, 16, 3), BFLOAT16),
    ((2, 31, 5, 6, 5), BFLOAT16),
    ((1, 3, 33, 3, 7), FLOAT32),
    ((3, 1, 1, 5, 1), FLOAT32),
]


@needs_compiler
@pytest.mark.parametrize(("size", "dtype"), SIZES, ids=str)
def test_the_kernels_on_the_host_equal_the_oracle(size, dtype, calls_on_host):
    x, kernel, g = draw(size, dtype)
    window = kernel.shape[:2]
    assert cuda.supports(x.shape, window, dtype)
    y, _, taps = value_and_gradients(oracle)(*(a.astype(jnp.float32) for a in (x, kernel, g)))
    tolerance = 1e-5 if dtype == FLOAT32 else 4e-3
    assert_close([cuda.forward(x, kernel)], [y.astype(dtype)], tolerance)
    assert_close([cuda.weight_grad(x, g, window)], [taps], 1e-5)
    assert len(calls_on_host) == 3


def lowered(impl, args, platform="cuda"):
    return jax.jit(value_and_gradients(ours(impl))).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def names(text):
    return set(re.findall(r'custom_call @__gpu\$xla\.gpu\.ptx.*? name = "(\w+)"', text))


# The gradient of the maps is a forward pass with the filter turned round.
ALL_PASSES = {"depthwise_forward", "depthwise_sum", "depthwise_weight_grad"}


@needs_nvrtc
@pytest.mark.parametrize("k", [3, 11])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_all_passes_of_a_program_for_a_gpu_are_the_kernels(k, dtype):
    text = lowered("cuda", draw((2, 13, 18, 20, k), dtype))
    assert names(text) == ALL_PASSES and "stablehlo.convolution" not in text
    for attribute in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem_bytes"):
        assert re.search(rf"{attribute} = \d+ : i32", text)
    # Drivers are often older than NVRTC, and take no PTX that is newer than they are.
    assert ".version 8.0" in text and ".target sm_80" in text


@needs_nvrtc
def test_a_program_for_several_devices_has_them_if_its_mesh_is_in_context():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    batch, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    run = jax.jit(value_and_gradients(ours("cuda")), in_shardings=(batch, everywhere, batch))
    args = draw((8, 9, 10, 20, 5))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert names(run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()) == ALL_PASSES
    with pytest.warns(UserWarning, match="by cuDNN.*: the program is for several devices"):
        assert names(run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()) == set()


@needs_nvrtc
def test_an_export_has_none():
    args = draw((2, 9, 10, 20, 5))
    exported = jax.export.export(jax.jit(value_and_gradients(ours("cuda"))), platforms=("cuda",))(*args)
    assert "stablehlo.convolution" in exported.mlir_module() and names(exported.mlir_module()) == set()


def ptxas():
    """The assembler of NVIDIA's wheel or of a toolkit; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [f"{path}/{name}/bin" for path in spec.submodule_search_locations for name in WHEELS] if spec else []
    return shutil.which("ptxas", path=os.pathsep.join([*folders, os.environ["PATH"], "/usr/local/cuda/bin"]))


@needs_nvrtc
@pytest.mark.skipif(ptxas() is None, reason="ptxas (pip install nvidia-cuda-nvcc) is not installed")
@pytest.mark.parametrize("grad", [False, True])
def test_registers_suffice_on_every_kind_of_gpu(grad, tmp_path):
    plan = cuda.plan((128, 14, 14, 320), (11, 11), BFLOAT16, grad)
    (tmp_path / "kernel.ptx").write_text(cuda._compile(tuple(plan.macros.items())))
    for architecture in ("sm_80", "sm_90", "sm_100"):
        command = [ptxas(), "-v", f"-arch={architecture}", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
        assert "Used" in done.stderr and set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}


@needs_nvrtc
def test_where_jax_has_no_triton_backend_the_kernels_take_its_place(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcvit_jax.depthwise.kernels", None)
    monkeypatch.delattr("fcvit_jax.depthwise.kernels", raising=False)
    args = draw((2, 12, 18, 20, 11))
    with pytest.warns(UserWarning, match="no Pallas for Triton"):
        assert names(lowered(None, args)) == names(lowered("pallas", args)) == ALL_PASSES


def test_without_nvrtc_users_are_told_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "find", lambda: None)
    cuda._compile.cache_clear()
    args = draw((2, 12, 18, 24, 11))
    with pytest.raises(UserError, match="pip install nvidia-cuda-nvrtc"):
        lowered("cuda", args)
    assert names(lowered("cuda", args, "cpu")) == set()
    monkeypatch.setitem(sys.modules, "fcvit_jax.depthwise.kernels", None)
    monkeypatch.delattr("fcvit_jax.depthwise.kernels", raising=False)
    with pytest.warns(UserWarning, match="by cuDNN"):
        assert names(lowered("pallas", args)) == set()


@needs_nvrtc
def test_a_source_that_does_not_compile_says_where():
    with pytest.raises(RuntimeError, match=r"broken.cu\(1\): error"):
        nvrtc.compile_to_ptx("int f( {", "broken.cu", {})


@pytest.mark.parametrize("shape", [(0, 8, 8, 16), (2, 1 << 16, 1 << 15, 16)], ids=str)
def test_empty_maps_and_those_beyond_32_bits_are_left_to_lax(shape):
    assert not cuda.supports(shape, (3, 3), FLOAT32)


def test_other_dtypes_are_left_to_lax():
    assert not cuda.supports((2, 8, 8, 16), (3, 3), jnp.float16) and cuda.supports((2, 8, 8, 16), (3, 3), jnp.float32)


@pytest.mark.parametrize("k", [1, 3, 11, 21])
def test_maps_of_every_width_have_a_plan_within_the_limits_of_a_block(k):
    rng = np.random.default_rng(k)
    for _ in range(4):
        n, height, width, channels = rng.integers(1, (9, 350, 350, 600))
        for dtype in (FLOAT32, BFLOAT16):
            for grad in (False, True):
                plan = cuda.plan((n, height, width, channels), (k, k), dtype, grad)
                assert plan.shared <= 48 << 10 and plan.threads <= 384 and plan.threads % 32 == 0
                tiles = [-(-size // plan.macros[rows]) for size, rows in ((n, "IMAGES"), (height, "ROWS"))]
                tiles += [-(-width // (plan.macros["COLS"] * plan.macros["STRIPS"]))]
                tiles += [-(-channels // (plan.macros["VECTOR"] * plan.macros["GROUPS"]))]
                assert plan.blocks <= math.prod(tiles) and (grad or plan.blocks == math.prod(tiles))
