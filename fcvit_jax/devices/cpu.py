"""What XLA and the C library must be told to be fast on CPUs."""

import ctypes
import os
import sys

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def tune_cpu() -> None:
    """Lets XLA use 512-bit vectors and keep its memory from step to step; call before anything touches a device.

    A vector width in XLA_FLAGS is kept. Programs then run in the thread that calls them: on a single CPU device a
    jitted function returns when it is done. Memory once used stays with the process, also on a host of GPUs or TPUs.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_cpu_prefer_vector_width" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_prefer_vector_width=512"  # XLA's own default is 256

    # glibc gives large blocks back to Linux, which clears their pages anew: a third of a step. It can be told to keep
    # them, but in the heap of the main thread alone.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        jax.config.update("jax_cpu_enable_async_dispatch", False)
