"""Settings of XLA and of the C library that make programs fast on CPUs."""

import ctypes
import os
import sys

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def tune_cpu() -> None:
    """Lets XLA use 512-bit vectors and keep its memory from step to step; call it before anything touches a device.

    If XLA_FLAGS sets a vector width, it is kept. On Linux with glibc, programs then run in the thread that calls them:
    on a single CPU device a jitted function returns when it is done. The process keeps all memory that it has used,
    also on a machine with GPUs or TPUs.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_cpu_prefer_vector_width" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512"  # XLA's default is 256

    # glibc returns large blocks to Linux after each step, and Linux clears the pages again: a third of a step's time.
    # mallopt keeps the blocks, but only in the main thread's heap.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        jax.config.update("jax_cpu_enable_async_dispatch", False)
