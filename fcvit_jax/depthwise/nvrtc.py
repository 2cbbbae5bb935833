"""Compiles CUDA C++ to PTX by NVRTC, NVIDIA's compiler library, which `jax[cuda12]` and `jax[cuda13]` install."""

import ctypes
import functools
import importlib.util
import re
from pathlib import Path

from fcvit_jax.errors import UserError

_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")  # of the wheels of CUDA 13 and 12, in the package `nvidia`
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
# PTX is compiled by the driver, which may be older than NVRTC. Every driver that JAX supports knows this version.
_PTX_VERSION = "8.0"


@functools.cache
def find() -> ctypes.CDLL | None:
    """The library: the one of NVIDIA's wheels, else the one that the system's linker finds; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(path) for path in spec.submodule_search_locations] if spec else []
    paths = [package / folder / name for package in packages for folder in _FOLDERS for name in _NAMES]
    wheels = [path for path in paths if path.exists()]
    try:
        for path in wheels:
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # some versions look for it by name alone
                ctypes.CDLL(str(builtins))
    except OSError:
        pass  # those that need it say so
    for library in [*map(str, wheels), *_NAMES]:
        try:
            return ctypes.CDLL(library)
        except OSError:
            continue
    return None


def compile_to_ptx(source: str, name: str, macros: dict[str, int]) -> str:
    """Compiles a program for compute capability 8.0, which later GPUs run as well.

    Args:
      source: CUDA C++.
      name: of the source, in messages.
      macros: integers that the source uses, by name.

    Returns:
      The text of the PTX.

    Raises:
      UserError: NVRTC is not installed.
      RuntimeError: the program does not compile, with the compiler's messages.
    """
    library = find()
    if library is None:
        wheels = "nvidia-cuda-nvrtc for CUDA 13, nvidia-cuda-nvrtc-cu12 for CUDA 12"
        raise UserError(f"impl='cuda' needs NVRTC, which was not found: pip install {wheels}.")
    program = ctypes.c_void_p()
    options = ["--gpu-architecture=compute_80", "--std=c++17", *(f"-D{key}={value}" for key, value in macros.items())]
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    created = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    if created:
        raise RuntimeError(f"NVRTC cannot make a program of {name}: error {created}")
    try:
        if library.nvrtcCompileProgram(program, len(options), arguments):
            raise RuntimeError(f"{name} does not compile:\n{_text(library, 'ProgramLog', program)}")
        ptx = _text(library, "PTX", program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return re.sub(r"^\.version \S+", f".version {_PTX_VERSION}", ptx, flags=re.MULTILINE)


def _text(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode()
