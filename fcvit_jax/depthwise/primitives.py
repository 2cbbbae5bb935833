"""The only file of the package that uses semi-public or unstable APIs of JAX, but for those of the kernels.

| API | used for | JAX |
|---|---|---|
| `jax.extend.core.Primitive` | operations of our own | 0.10 to 0.12 |
| `jax.interpreters.ad.defbilinear` | derivatives in both modes | 0.10 to 0.12 |
| `jax.interpreters.batching.primitive_batchers` | `jax.vmap` | 0.10 to 0.12 |
| `jax.interpreters.mlir.lower_fun`, `register_lowering` | programs for every platform | 0.10 to 0.12 |
| `update` of an array's type, `manual_axis_type` | types, inside `jax.shard_map` too | from 0.10 (`vma` before) |
| `module_context.axis_context`, `.lowering_parameters.for_export` | when to use the kernels | 0.10 to 0.12 |

The last row has no public alternative. Where JAX moves it, programs lose the kernels and a warning says so.
"""

import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P

from fcvit_jax.depthwise import cuda, nvrtc
from fcvit_jax.depthwise.loops import lax_conv, lax_taps
from fcvit_jax.depthwise.spread import per_device, summed_over_devices


def match_manual_axes(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inside `jax.shard_map`, marks both arrays as varying over the union of their manual axes.

    An operation of ours needs inputs of equal types there. The transpose of the mark sums a gradient over the devices
    that shared the input.
    """
    own, other = (jax.typeof(array).manual_axis_type.varying for array in (x, y))
    return lax.pcast(x, tuple(other - own), to="varying"), lax.pcast(y, tuple(own - other), to="varying")


def array_type(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of an array that is computed from one of type x: inside `jax.shard_map` both vary over the same axes."""
    sharding = x.sharding.update(spec=P(*[None] * len(shape)))
    return x.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


# The operations of our own, and the functions that compute them by operations of JAX.
COMPUTE: dict[Primitive, Callable] = {}


def bilinear(
    name: str, compute: Callable, result: Callable, to_first: Callable, to_second: Callable, batch: Callable
) -> Callable[..., jax.Array]:
    """Makes an operation of JAX from a function that is linear in each of two arrays.

    `jax.custom_vjp` would allow reverse mode alone, and `jax.custom_derivatives.linear_call` no `jax.vmap`. All
    functions take the static parameters of the operation as keywords, which must be hashable.

    Args:
      name: of the operation, in jaxprs.
      compute: (x, y) to the array, by operations of JAX, which are not differentiated; already jitted.
      result: types of x and y to the type of the result, as `array_type` makes it.
      to_first: (g, x, y) to the gradient of x; x has only `aval`.
      to_second: (g, x, y) to the gradient of y; y has only `aval`.
      batch: (x, y, x_axis, y_axis) to the result for arrays that have a mapped axis more, and that axis in the result;
        an axis is None where an array has none.

    Returns:
      A function (x, y, **parameters) to the array. Gradients of every order work in both modes if `to_first`,
      `to_second` and `batch` are made of operations that can be differentiated.
    """
    primitive = Primitive(name)
    COMPUTE[primitive] = compute
    primitive.def_impl(compute)
    primitive.def_abstract_eval(result)
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    ad.defbilinear(primitive, to_first, to_second)

    def batched(args, axes, **parameters):
        return batch(*args, *axes, **parameters)

    batching.primitive_batchers[primitive] = batched
    return lambda x, y, **parameters: primitive.bind(*match_manual_axes(x, y), **parameters)


# The choice needs a primitive: only its lowering knows the device and whether the program is exported. It is called
# only while a bilinear primitive is lowered, so it needs no rules for derivatives and `jax.vmap`.
_kernels_p = Primitive("depthwise_kernels")


@_kernels_p.def_abstract_eval
def _kernels_type(x, other, *, window, impl):
    """`other` is the kernel, or the incoming gradient if `window` says which taps its sum is for."""
    return array_type(x, (*window, x.shape[3]), jnp.float32) if window else x


@_kernels_p.def_impl  # for `jax.disable_jit`
def _by_lax(x, other, *, window, impl):
    return lax_taps(x, other, window) if window else lax_conv(x, other)


def _cuda_gpus() -> list[jax.Device]:
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:  # no GPU: the program is only compiled for one
        return []


def _are_modern(gpus: list[jax.Device]) -> bool:
    return all(float(gpu.compute_capability) >= 8 for gpu in gpus)


def _gpus_run_pallas() -> bool:
    """Whether there are CUDA GPUs that all are modern enough, and Pallas makes its kernels for them."""
    gpus = _cuda_gpus()
    default = jax.config.jax_default_device or jax.local_devices()[0]  # whose kernels Pallas makes
    return bool(gpus) and default in (*gpus, "gpu", "cuda") and _are_modern(gpus)


def _find_kernels(maps: Any, window: tuple[int, int], impl: str) -> ModuleType | None:
    """The kernels that go with these GPUs, this version of JAX and maps of this type; None if there are none."""
    if not all(isinstance(size, int) for size in maps.shape):
        return None
    if impl == "pallas":
        try:
            from fcvit_jax.depthwise import kernels  # here, since JAX will remove the Triton backend of Pallas
        except ImportError:
            if nvrtc.find() is None:
                return None
            text = "This JAX has no Pallas for Triton: depthwise convolutions by kernels that were not run on a GPU"
            warnings.warn(text, stacklevel=2)
        else:
            return kernels if kernels.supports(maps.shape, window) and _gpus_run_pallas() else None
    return cuda if cuda.supports(maps.shape, window, maps.dtype) and _are_modern(_cuda_gpus()) else None


def _is_whole(context: Any) -> bool:
    """Whether XLA has nothing to partition between devices in a program with this axis context."""
    if hasattr(context, "num_devices"):
        return context.num_devices == 1
    manual = context.manual_axes | set(context.mesh.manual_axes)
    return all(size == 1 for axis, size in context.mesh.shape.items() if axis not in manual)


def _hindrance(ctx: Any) -> str | None:
    """Why the program that is being lowered cannot have kernels; "" needs no warning, None if it can have them."""
    try:
        whole = _is_whole(ctx.module_context.axis_context)
        exported = ctx.module_context.lowering_parameters.for_export
    except AttributeError:
        return "this version of JAX does not say what the program is for"
    if exported:  # an exported program must work with later versions of JAX
        return ""
    # XLA cannot partition a kernel between devices.
    return None if whole else "the program is for several devices, without their mesh in context (jax.set_mesh)"


def _kernels_lowering(ctx, x, other, *, window, impl):
    hindrance, (maps, second) = _hindrance(ctx), ctx.avals_in
    found = None
    if hindrance is None:
        found = _find_kernels(maps, window or second.shape[:2], impl)
        hindrance = "this GPU, this version of JAX or maps of such sizes do not go with them"
    if found:
        run = partial(found.weight_grad, window=window) if window else found.forward
    else:
        run = partial(_by_lax, window=window, impl=impl)
        if hindrance:
            warnings.warn(f"Depthwise convolutions by cuDNN, much slower than the kernels: {hindrance}", stacklevel=2)
    with warnings.catch_warnings():  # users can do nothing about it; tests tell us when the backend is gone
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return mlir.lower_fun(run, multiple_results=False)(ctx, x, other)


mlir.register_lowering(_kernels_p, _kernels_lowering, platform="cuda")
mlir.register_lowering(_kernels_p, mlir.lower_fun(_by_lax, multiple_results=False))


@partial(jax.jit, static_argnames="impl")
def kernel_forward(x: jax.Array, kernel: jax.Array, impl: str) -> jax.Array:
    """Uses kernels on a CUDA GPU, and on other devices the same operation as `lax_forward`.

    `impl` is "pallas" for those of `kernels`, or of `cuda` where JAX has no Triton backend; or "cuda".
    """
    return per_device(partial(_kernels_p.bind, window=None, impl=impl), x, kernel)


@partial(jax.jit, static_argnames=("window", "impl"))
def kernel_weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int], impl: str) -> jax.Array:
    return summed_over_devices(partial(_kernels_p.bind, window=window, impl=impl), x, g)
