"""The kernels for GPUs: their arithmetic in interpret mode, and which programs have them. No GPU is needed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracle import assert_close, draw, oracle, ours, value_and_gradients

from fcvit_jax.depthwise import depthwise_conv, kernels, primitives


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((2, 8, 8, 16, 3), jnp.float32),  # even maps
        ((5, 7, 7, 32, 7), jnp.bfloat16),  # whole rows; two programs, the second with one of four
        ((1, 16, 64, 16, 5), jnp.float32),  # two and four parts of a row; rows for two programs of the weight gradient
        ((2, 3, 13, 48, 7), jnp.float32),  # fewer rows than the filter reaches
    ],
    ids=str,
)
def test_the_gpu_kernels_equal_the_oracle_in_interpret_mode(size, dtype):
    x, kernel, g = draw(size, dtype)
    window = kernel.shape[:2]
    assert kernels.supports(x.shape, window)
    found = kernels.forward(x, kernel, interpret=True), kernels.weight_grad(x, g, window, interpret=True)
    y, _, taps = value_and_gradients(oracle)(*(a.astype(jnp.float32) for a in (x, kernel, g)))
    assert_close(found, (y.astype(dtype), taps), 1e-5 if dtype == jnp.float32 else 4e-3)


@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((8, 14, 14, 24), 11),  # no sixteens of channels
        ((8, 14, 31, 16), 11),  # rows that have no parts
        ((8, 14, 14, 16), 23),  # a row of taps longer than the registers hold
        ((70_000, 7, 7, 128), 3),  # more programs than a grid has
        ((1 << 17, 14, 14, 128), 3),  # indices of more than 32 bits
        ((0, 14, 14, 16), 11),
    ],
    ids=str,
)
def test_the_gpu_kernels_leave_what_does_not_fit_to_lax(shape, k):
    assert not kernels.supports(shape, (k, k))


@pytest.mark.parametrize("mesh", [False, True])
def test_only_a_program_that_a_gpu_runs_itself_has_the_kernels(monkeypatch, mesh):
    monkeypatch.setattr(primitives, "_find_kernels", lambda maps, window, impl: kernels)
    monkeypatch.setattr(kernels, "forward", lambda x, kernel: jax.lax.erf_inv(x))
    monkeypatch.setattr(kernels, "weight_grad", lambda x, g, window: jnp.cbrt(g[0, : window[0], : window[1]]))
    args = draw((8, 12, 12, 16, 11))
    run = value_and_gradients(ours(None))

    def count(text):
        return text.count("erf_inv"), text.count("cbrt")

    def lowered(platform, **shardings):
        return count(jax.jit(run, **shardings).trace(*args).lower(lowering_platforms=(platform,)).as_text())

    assert min(lowered("cuda")) > 0
    assert lowered("cpu") == lowered("tpu") == lowered("rocm") == (0, 0)
    assert count(jax.export.export(jax.jit(run), platforms=("cuda",))(*args).mlir_module()) == (0, 0)
    devices = Mesh(np.array(jax.devices()), ("data",))
    batch, everywhere = (NamedSharding(devices, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    in_context = jax.sharding.use_abstract_mesh(devices.abstract_mesh)
    with in_context if mesh else pytest.warns(UserWarning, match="by cuDNN.*: the program is for several devices"):
        assert (min(lowered("cuda", in_shardings=(batch, everywhere, batch))) > 0) == mesh


def test_a_gpu_that_cannot_take_the_kernels_is_said():
    x, kernel, _ = draw((1, 4, 4, 16, 5))
    with pytest.warns(UserWarning, match="by cuDNN.*: this GPU, this version of JAX or maps"):
        jax.jit(depthwise_conv).trace(x, kernel).lower(lowering_platforms=("cuda",))  # no GPU at all is none that can


def test_a_version_of_jax_that_does_not_say_what_a_program_is_for_has_none(monkeypatch):
    monkeypatch.setattr(primitives, "_find_kernels", lambda maps, window, impl: kernels)
    monkeypatch.setattr(primitives, "_is_whole", lambda context: context.another_name)
    x, kernel, _ = draw((1, 4, 5, 16, 5))
    with pytest.warns(UserWarning, match="by cuDNN.*: this version of JAX does not say"):
        text = jax.jit(depthwise_conv).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.convolution" in text


@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("k", [3, 11])
def test_all_passes_of_a_program_for_a_gpu_are_the_kernels(monkeypatch, recwarn, gpu, dtype, k):
    """No GPU is needed to lower it. This fails when a version of JAX no longer has what the kernels are written in."""
    monkeypatch.setattr(primitives, "_gpus_run_pallas", lambda: True)
    device = jax.sharding.AbstractDevice(gpu, None, "cuda")
    auto = (jax.sharding.AxisType.Auto,)
    args = draw((2, 14, 14, 32, k), dtype)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), auto, abstract_device=device)):
        traced = jax.jit(value_and_gradients(ours(None))).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.convolution" not in text
    names = re.findall(r'custom_call @__gpu\$xla\.gpu\.triton.*? name = "(\w+)"', text)
    assert sorted(names) == ["depthwise_forward", "depthwise_forward", "depthwise_weight_grad"]
    assert not list(recwarn)  # Pallas' own, of its end, tells users nothing that they could do
