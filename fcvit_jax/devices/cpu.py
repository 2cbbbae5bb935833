"""Settings of XLA and of the C library that make programs fast on CPUs."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
# What YNNPACK computes: by XLA's default convolutions too, where Eigen's weight gradients take half the time or less.
_YNNPACK = "xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"


def tune_cpu() -> None:
    """Lets XLA use 512-bit vectors and keep its memory from step to step; call it before anything touches a device.

    If XLA_FLAGS sets a vector width, it is kept. On Linux with glibc, programs then run in the thread that calls them:
    on a single CPU device a jitted function returns when it is done. The process keeps all memory that it has used,
    also on a machine with GPUs or TPUs.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_cpu_prefer_vector_width" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512"  # XLA's default is 256

    if keep_memory():
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_memory() -> bool:
    """Lets the main thread keep all memory that it has used; returns False where the C library is not glibc.

    It would return large blocks to Linux after each step, and Linux clears their pages again: a third of a step's time.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return False
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
    return True


def compiler_options(mesh: Mesh | None = None) -> dict[str, str]:
    """Options for `jax.jit`, or for the `compile` of a lowered program, that make dense convolutions fast on CPUs.

    There are none for other devices, where XLA_FLAGS sets the same, and where JAX does not know them.

    Args:
      mesh: the devices; None: the default one.
    """
    name, value = _YNNPACK
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "cpu" or name in os.environ.get("XLA_FLAGS", "") or not _knows(name, value):
        return {}
    return {name: value}


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` with `compiler_options`; unlike it, not to be called while JAX traces another function.

    `.jitted()` of the result is what `jax.jit` makes, at the first call: importing a module must not touch a device.
    """

    @functools.cache
    def jitted() -> Callable[..., Any]:
        return jax.jit(function, compiler_options=compiler_options(), **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return jitted()(*args, **kwargs)

    call.jitted = jitted
    return call


@functools.cache
def _knows(name: str, value: str) -> bool:
    """Whether this version of XLA has an option with this value for CPUs."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
