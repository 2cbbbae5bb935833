"""The files that hold weights: what is in them, whoever wrote them, and writing them whole."""

import argparse
import codecs
import contextlib
import datetime
import json
import os
import pathlib
import re
import types
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from flax import traverse_util

from fcvit_jax.convert.wrappings import is_array, unwrap
from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError
from fcvit_jax.formats import hub

# Where a .npz keeps what it says of itself, as JSON.
METADATA = "__metadata__"


def read(path: Path, ema: bool | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights, by the original's names or by our paths, and what the file says of itself.

    Raises:
      UserError: the file cannot be read, or a weight is not finite.
    """
    weights, metadata = _read(storage.as_path(hub.local(path)), ema)
    broken = [name for name, x in weights.items() if not np.isfinite(x).all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} is not finite, {len(broken)} of {len(weights)} tensors are not.")
    return weights, metadata


def _read(path: Path, ema: bool | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if hub.is_layout(path):
        hub.check(path)
        weights, metadata = _read(path / hub.WEIGHTS, ema)
        return weights, hub.read_metadata(path) or metadata
    if storage.is_folder(path):
        from fcvit_jax.run import saved

        return traverse_util.flatten_dict(saved.load_variables(path, ema=ema), sep="/"), read_metadata(path)
    if not storage.is_file(path):
        raise UserError(f"There is no file or folder {path}.")
    path = storage.local_path(path)  # what reads files of weights knows no buckets
    ending = path.suffix.lower()
    if ending not in (".npz", ".safetensors"):
        return _read_torch(path, ema)
    if ending == ".safetensors":
        with _open_safetensors(path) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
        # NumPy alone does not know bfloat16, and float32 holds all its values.
        weights = {name: x.astype(np.float32) if x.dtype.name == "bfloat16" else x for name, x in weights.items()}
    else:
        with _open_npz(path) as file:
            weights = {name: file[name] for name in file if name != METADATA}
    if is_ours(weights) and ema:
        raise UserError(f"{path} is a {ending}: it holds one set of weights, no moving averages.")
    if not is_ours(weights):
        weights = unwrap(path, weights, ema, is_array)
    return weights, read_metadata(path)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads what a file that `load_pretrained` takes says of itself: "model", "class_names", ...; {} if nothing.

    Raises:
      UserError: it cannot be read.
    """
    path = storage.as_path(hub.local(path))
    if hub.is_layout(path):
        return hub.read_metadata(path) or read_metadata(path / hub.WEIGHTS)
    if storage.is_folder(path):
        from fcvit_jax.run import saved

        return saved.load_metadata(path)
    if path.suffix.lower() == ".safetensors":
        with _open_safetensors(path) as file:
            return json.loads((file.metadata() or {}).get("about", "{}"))
    if path.suffix.lower() != ".npz":
        return {}
    with _open_npz(path) as file:
        return json.loads(str(file[METADATA])) if METADATA in file else {}


def write_whole(dest: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file whole or not at all."""
    unfinished = dest.with_name(f".{dest.name}.{os.getpid()}")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            write(file)
        os.replace(unfinished, dest)
    except OSError as error:
        raise UserError(f"Could not write {dest}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _open_npz(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Opens a .npz, whose arrays are read when they are taken out; what goes wrong inside becomes a UserError."""
    try:
        with np.load(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror}.") from error
    # Not with what NumPy says, which may advise to run code.
    except (ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"Could not read {path}: it is damaged, or no .npz.") from error


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    """Opens a .safetensors, whose tensors are read when they are taken out; what goes wrong becomes a UserError."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"To read {path}: pip install safetensors") from error
    try:
        with safe_open(path, "np") as file:
            yield file
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror or error}.") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"Could not read {path}: it is damaged, or no .safetensors.") from error


def _read_torch(path: Path, ema: bool | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The state dict of a file of the original, which may hold it bare or with other entries around it; and names."""
    torch = import_torch()
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror}.") from error
    try:
        with file, torch.serialization.safe_globals(_harmless(torch)):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler stumbles over; what it says advises to run such code
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"Refused to read {path}: it wants to run code when read ({code[1]}). Where it was made, save its "
                "weights alone: torch.save(model.state_dict(), FILE)."
            ) from error
        raise UserError(f"Could not read {path}: it is damaged, or no file of PyTorch's.") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict.")
    tensors = unwrap(path, content, ema, lambda x: isinstance(x, torch.Tensor | np.ndarray))
    return {name: as_numpy(x) for name, x in tensors.items()}, _class_names(content)


def _class_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """What MMDetection and MMSegmentation (with MMEngine too) keep as the names of classes, as "class_names"."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return {}
    of_data = meta.get("dataset_meta")
    names = of_data.get("classes") if isinstance(of_data, Mapping) else meta.get("CLASSES")
    are_names = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return {"class_names": list(names)} if are_names else {}


def _harmless(torch: ModuleType) -> list[Any]:
    """What training scripts keep beside weights, and what can do no harm when it is read: values, arrays and paths."""
    values = [argparse.Namespace, types.SimpleNamespace, dict, list, set, frozenset, codecs.encode]
    values += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    values += [(_plain_dict, "collections.defaultdict")]
    dtypes = [np.dtype, *(x for x in vars(np.dtypes).values() if isinstance(x, type))]
    # Files name them as they are called where these were written: by NumPy 1 and on Windows too.
    arrays = [(np.ndarray, "numpy.ndarray")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        arrays += [(getattr(np._core.multiarray, name), f"{module}.{name}") for name in ("scalar", "_reconstruct")]
    paths = [
        (getattr(pathlib, f"Pure{system}Path"), f"{module}.{kind}{system}Path")
        for module in ("pathlib", "pathlib._local")
        for system in ("Posix", "Windows")
        for kind in ("", "Pure")
    ]
    return [*values, *dtypes, *arrays, *paths]


def _plain_dict(*_) -> dict:
    return {}  # to be filled by PyTorch, which fills no other kind


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise UserError("Files of the original (.pth) need PyTorch: pip install torch") from error
    return torch


def as_numpy(x: Any) -> np.ndarray:
    if hasattr(x, "detach"):  # PyTorch's; NumPy has no bfloat16 of its own
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x
    return np.asarray(x)


def is_ours(names: Iterable[str]) -> bool:
    """Whether these are our paths, not the original's names."""
    return any(name.startswith("params/") for name in names)
