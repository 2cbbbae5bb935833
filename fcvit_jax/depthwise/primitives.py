"""What the depthwise convolution needs of JAX's internal APIs, and nothing else of the package does."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import PartitionSpec as P

from fcvit_jax.depthwise.loops import lax_conv, lax_taps
from fcvit_jax.depthwise.spread import per_device, summed_over_devices


def vary_alike(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Marks both, inside `jax.shard_map`, as varying over all axes that either varies over.

    The rules of a custom_vjp need that; the transpose then sums a gradient over the devices that share what it is of.
    """
    own, other = (jax.typeof(array).manual_axis_type.varying for array in (x, kernel))
    return lax.pcast(x, tuple(other - own), to="varying"), lax.pcast(kernel, tuple(own - other), to="varying")


# A primitive, so that only the lowering decides, which alone knows the device and whether the program is exported.
_pallas_p = Primitive("depthwise_pallas")


@_pallas_p.def_abstract_eval
def _pallas_shape(x, other, *, window):
    """`other` is the kernel, or the incoming gradient if `window` says which taps its sum is for."""
    shape, dtype = ((*window, x.shape[3]), jnp.float32) if window else (x.shape, x.dtype)
    sharding = x.sharding.update(spec=P(*[None] * len(shape)))  # of what each device holds in a `jax.shard_map`
    return ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=x.manual_axis_type)


@_pallas_p.def_impl  # for `jax.disable_jit`
def _pallas_by_lax(x, other, *, window):
    return lax_taps(x, other, window) if window else lax_conv(x, other)


def _has_kernels(shape: tuple[int, ...], window: tuple[int, int]) -> bool:
    """Whether the GPUs, this version of JAX and maps of this shape go with the kernels."""
    try:
        from fcvit_jax.depthwise import kernels  # here, since JAX has announced to remove what it is written in

        gpus = jax.local_devices(backend="cuda")
    except (ImportError, RuntimeError):  # RuntimeError: no GPU, where a program is only compiled for one
        return False
    default = jax.config.jax_default_device or jax.local_devices()[0]  # whose kernels Pallas makes
    modern = default in (*gpus, "gpu", "cuda") and all(float(gpu.compute_capability) >= 8 for gpu in gpus)
    return modern and all(isinstance(size, int) for size in shape) and kernels.supports(shape, window)


def _is_whole(context: Any) -> bool:
    """Whether nothing of a program in this axis context is left for XLA to split between devices."""
    if hasattr(context, "num_devices"):
        return context.num_devices == 1
    manual = context.manual_axes | set(context.mesh.manual_axes)
    return all(size == 1 for axis, size in context.mesh.shape.items() if axis not in manual)


def _pallas_lowering(ctx, x, other, *, window):
    module, (maps, second) = ctx.module_context, ctx.avals_in
    # XLA cannot split a kernel between devices, and an exported program must outlive this version of JAX.
    whole, exported = _is_whole(module.axis_context), module.lowering_parameters.for_export
    if whole and not exported and _has_kernels(maps.shape, window or second.shape[:2]):
        from fcvit_jax.depthwise.kernels import forward, weight_grad

        run = partial(weight_grad, window=window) if window else forward
    else:
        run = partial(_pallas_by_lax, window=window)
        if not exported:
            spread = "the program is for several devices, without their mesh in context (jax.set_mesh)"
            reason = "this GPU, this version of JAX or maps of such sizes do not go with them" if whole else spread
            warnings.warn(f"Depthwise convolutions by cuDNN, much slower than the kernels: {reason}", stacklevel=2)
    return mlir.lower_fun(run, multiple_results=False)(ctx, x, other)


def _pallas_batch(args, dims, *, window):
    """Makes the mapped axis part of the channels, of which each is convolved by itself anyway."""
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    args = [batching.bdim_at_front(arg, dim, size) for arg, dim in zip(args, dims, strict=True)]
    out = _pallas_p.bind(*(jnp.moveaxis(arg, 0, -2).reshape(*arg.shape[1:-1], -1) for arg in args), window=window)
    return out.reshape(*out.shape[:-1], size, -1), out.ndim - 1


mlir.register_lowering(_pallas_p, _pallas_lowering, platform="cuda")
mlir.register_lowering(_pallas_p, mlir.lower_fun(_pallas_by_lax, multiple_results=False))
batching.primitive_batchers[_pallas_p] = _pallas_batch


@jax.jit
def pallas_forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """By the kernels of `kernels` where a GPU runs it, else as `_lax`."""
    return per_device(partial(_pallas_p.bind, window=None), x, kernel)


@partial(jax.jit, static_argnames="window")
def pallas_weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    return summed_over_devices(partial(_pallas_p.bind, window=window), x, g)
