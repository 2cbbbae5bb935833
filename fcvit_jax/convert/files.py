"""The files that hold weights: what is in them, whoever wrote them, and writing them whole."""

import argparse
import contextlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from flax import traverse_util

from fcvit_jax.errors import UserError, log

# Where a .npz keeps what it says of itself, as JSON.
METADATA = "__metadata__"


def read(path: Path, ema: bool | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights, by the original's names or by our paths, and what the file says of itself.

    Raises:
      UserError: the file cannot be read, or a weight is not finite.
    """
    weights, metadata = _read(path.expanduser(), ema)
    broken = [name for name, x in weights.items() if not np.isfinite(x).all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} is not finite, {len(broken)} of {len(weights)} tensors are not.")
    return weights, metadata


def _read(path: Path, ema: bool | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if path.is_dir():
        from fcvit_jax.run import saved

        return traverse_util.flatten_dict(saved.load_variables(path, ema=ema), sep="/"), read_metadata(path)
    if not path.is_file():
        raise UserError(f"There is no file or folder {path}.")
    ending = path.suffix.lower()
    if ending not in (".npz", ".safetensors"):
        return _read_torch(path, ema), {}
    if ema:
        raise UserError(f"{path} is a {ending}: it holds one set of weights, no moving averages.")
    if ending == ".safetensors":
        with _open_safetensors(path) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
        # NumPy alone does not know bfloat16, and float32 holds all its values.
        weights = {name: x.astype(np.float32) if x.dtype.name == "bfloat16" else x for name, x in weights.items()}
        return weights, read_metadata(path)
    with _open_npz(path) as file:
        weights = {name: file[name] for name in file if name != METADATA}
    return weights, read_metadata(path)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads what a file that `load_pretrained` takes says of itself: "model", "class_names", ...; {} if nothing.

    Raises:
      UserError: it cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
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
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
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


def _read_torch(path: Path, ema: bool | None) -> dict[str, np.ndarray]:
    """The state dict of a file of the original, which may hold it bare or with timm's other entries around it."""
    torch = import_torch()
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror}.") from error
    try:
        # timm's files hold their command line, which can do no harm; nothing else may be built, let alone run.
        with file, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler stumbles over; what it says advises to run such code
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"Refused to read {path}: it wants to run code when read ({code[1]}).") from error
        raise UserError(f"Could not read {path}: it is damaged, or no file of PyTorch's.") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict.")
    keys = ("state_dict_ema",) if ema else ("state_dict", "model", "state_dict_ema")
    key = next((key for key in keys if isinstance(content.get(key), Mapping)), None)
    if ema and key is None:
        raise UserError(f"{path} holds no exponential moving averages (state_dict_ema).")
    if key == "state_dict_ema" and not ema:
        if ema is False:
            raise UserError(f"{path} holds exponential moving averages alone (state_dict_ema), no plain weights.")
        log.warning("%s holds exponential moving averages alone: they are used.", path)
    state_dict = content if key is None else content[key]
    arrays = {}
    for name, x in state_dict.items():
        if not isinstance(x, torch.Tensor):
            raise UserError(f"{path}: {name} is a {type(x).__name__}, not a tensor.")
        arrays[name.removeprefix("module.")] = as_numpy(x)
    return arrays


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
