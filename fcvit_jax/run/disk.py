"""What a checkpoint consists of on disk, and which errors mean that one is damaged."""

import contextlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError, log
from fcvit_jax.run.state import TrainState

FORMAT = 1  # of the checkpoints that are written; older ones have no number and are read alike
_PAUSES = (1, 5, 25)  # seconds between two tries to read where a fault may pass
_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# How TensorStore's errors begin or what they contain, whose type is ValueError whatever happened.
_PASSING = re.compile(
    r"^(UNKNOWN|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED)\b"
    r"|Input/output error|Stale file handle|timed out|Connection (refused|reset)|Too many open files"
)
_STORAGE = re.compile(r"^[A-Z_]+: |OS error|TensorStore|OCDBT")
# What to do where the storage itself is well.
_ADVICE = {
    "Too many open files": "Raise the limit of open files (ulimit -n 4096), then run the same command again.",
    "File name too long": "Choose a folder with a shorter path.",
}
# What Orbax may raise about damage that it does not notice. So may a bug, but that strikes older checkpoints as well.
UNCLEAR = (AttributeError, IndexError, NotImplementedError, TypeError)
_T = TypeVar("_T")


class Damaged(Exception):
    """A checkpoint whose files are missing, cannot be parsed, or hold other values than were saved."""


class NotFinite(Exception):
    """Weights that are to be saved hold a number that is not finite."""


def items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that are saved apart, so that weights can be read without the optimiser's state."""
    parts = {"variables": state.variables, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
    return parts if state.ema is None else parts | {"ema": state.ema}


def save_args(parts: Mapping[str, Any], metadata: Mapping[str, Any]) -> ocp.args.Composite:
    """What Orbax is to write for `parts`, as from `items`, and for metadata that JSON can hold.

    Raises:
      NotFinite: the weights or their averages are not finite.
    """
    metadata = {**metadata, "format": FORMAT}
    checksums, finite = _examine(parts, metadata)
    if not all(finite[name] for name in parts if name != "optimizer"):  # which may well keep an infinity
        raise NotFinite("weights that are not finite")
    return ocp.args.Composite(
        **{name: ocp.args.StandardSave(part) for name, part in parts.items()},
        metadata=ocp.args.JsonSave(metadata),
        checksums=ocp.args.JsonSave(checksums),
    )


def check(parts: Mapping[str, Any], metadata: Mapping[str, Any], expected: Mapping[str, int]) -> dict[str, Any]:
    """Compares what was read with the checksums of what was saved; returns the metadata without the format's number.

    Raises:
      Damaged: they differ.
    """
    found, _ = _examine(parts, metadata)
    wrong = [name for name in found if found[name] != expected.get(name)]
    if wrong:
        raise Damaged(f"{' and '.join(wrong)} differ from what was saved (checksum)")
    return {key: value for key, value in metadata.items() if key != "format"}


@jax.jit
def _examine_array(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A checksum of every bit of an array, and whether it is finite.

    The checksum is the same on any mesh, since integers add up exactly.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    # Odd weights: a change of any one element shows, and so do moved ones.
    weights = 2 * jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) + 1
    return (bits * weights).sum(dtype=jnp.uint32), jnp.isfinite(x).all()


def _examine(parts: Mapping[str, Any], metadata: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, bool]]:
    """Checksums of what is saved, and whether each part is finite.

    Without checksums a flipped bit in a tensor would be read as a good one.
    """
    # An array at a time: as one program, thousands of them take a minute to compile.
    found = {name: [] for name in parts}
    for name, part in parts.items():
        for x in jax.tree.leaves(part):
            found[name].append(_examine_array(x))
            # One at a time: several reductions across processes under way can deadlock on CPUs.
            if not getattr(x, "is_fully_replicated", True):
                jax.block_until_ready(found[name][-1])
    found = jax.device_get(found)
    checksums = {name: zlib.crc32(np.array([x for x, _ in pairs], np.uint32)) for name, pairs in found.items()}
    checksums["metadata"] = zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode())
    return checksums, {name: all(finite for _, finite in pairs) for name, pairs in found.items()}


class _PlainArrays(ocp.type_handlers.NumpyHandler):
    """Reads what was saved of a `jax.Array` as a NumPy array, and not the devices that it was on.

    Orbax's own handler fails where only the file that names these devices is damaged.
    """

    _array_metadata_store = None  # Orbax warns where a handler has none of that name

    def typestr(self) -> str:
        return "jax.Array"


@contextlib.contextmanager
def open_reader() -> Iterator[ocp.PyTreeCheckpointHandler]:
    """Reads a part of a checkpoint into NumPy arrays, without a manager, which warns that a part is no whole."""
    plain, numpy = (jax.Array, _PlainArrays()), (np.ndarray, ocp.type_handlers.NumpyHandler())
    registry = ocp.type_handlers.create_type_handler_registry(plain, numpy)
    with contextlib.closing(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as reader:
        yield reader


def check_shapes(step: Path, parts: Mapping[str, Any]) -> None:
    """Compares what a checkpoint says that it holds with shapes and dtypes; reads no values.

    Raises:
      Damaged: they differ.
    """
    for name, part in parts.items():
        with open_reader() as reader:
            found = jax.tree.leaves(reader.metadata(step / name).tree)
        if sorted((x.shape, str(x.dtype)) for x in found) != sorted(
            (x.shape, str(x.dtype)) for x in jax.tree.leaves(part)
        ):
            raise Damaged(f"{name} is not all there")
    for name in ("metadata", "checksums"):
        load_json(step / name)


def load_json(item: Path, name: str = "metadata") -> dict[str, Any]:
    """Reads a JSON file of a part of a checkpoint.

    Raises:
      OSError, ValueError: there is none, or it holds something else.
    """
    values = json.loads(storage.read_text(item / name))
    if not isinstance(values, dict):
        raise ValueError(f"{item.name}/{name} is no JSON object")
    return values


def load_metadata(step: Path) -> dict[str, Any]:
    """Reads the metadata of a checkpoint, with the number of its format if it has one.

    Args:
      step: the checkpoint's folder.

    Raises:
      Damaged: they are missing or cannot be parsed.
      UserError: the format is newer than this version knows, or a fault of the file system did not pass.
    """
    metadata = read(str(step), lambda: load_json(step / "metadata"))
    if metadata.get("format", 0) > FORMAT:
        raise UserError(f"{step} has the format {metadata['format']}, which only a newer fcvit_jax than this reads.")
    return metadata


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _raise_user_error(error: BaseException) -> None:
    """Raises the UserError that an error comes from, if it comes from one: it says already what to do."""
    for cause in _chain(error):
        if isinstance(cause, UserError):
            raise cause


def _is_passing(error: BaseException) -> bool:
    """Whether a fault of the file system may pass, such as EIO or a time-out; a missing file does not."""
    return any((isinstance(e, OSError) and not isinstance(e, _GONE)) or _PASSING.search(str(e)) for e in _chain(error))


def _is_storage(error: BaseException) -> bool:
    """Whether an error comes from the file system, not from a bug."""
    return any(storage.is_fault(e) or (isinstance(e, ValueError) and _STORAGE.search(str(e))) for e in _chain(error))


def reason(error: BaseException) -> str:
    """An error in one line that people can read: Orbax and TensorStore add thousands of characters of settings."""
    if type(error) is Exception and error.__cause__ is not None:  # of Orbax, which says only in which array
        error = error.__cause__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = re.split(r" \[(?:tensorstore_spec|os_error_code)", text)[0]
    if found := re.search(r"OS error \d+: [^\[\]]+", text):
        return found[0].strip()
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        text = f"a JSON file is cut or changed: {text}"
    text = re.sub(r'^[A-Z_]+: |Error opening "\w+" driver: | in OCDBT database at local file "[^"]*"', "", text)
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"  # the cause comes last


def read(what: str, read: Callable[[], _T]) -> _T:
    """Calls a function that reads a part of a checkpoint, again after a pause where a fault may pass.

    Args:
      what: names the part in messages.
      read: the function.

    Raises:
      Damaged: files are missing or cannot be parsed.
      UserError: a fault of the file system did not pass.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except Exception as error:  # Orbax raises plain Exception as well
            _raise_user_error(error)
            if _is_passing(error):
                if pause is None:
                    raise UserError(
                        f"Could not read {what}: {reason(error)}\nNothing was changed. Once the storage works, run the "
                        "same command again."
                    ) from error
                log.warning("%s cannot be read now (%s): trying again in %d s", what, reason(error), pause)
                time.sleep(pause)
            elif isinstance(error, (ValueError, KeyError, *_GONE)) or type(error) is Exception:
                raise Damaged(reason(error)) from error
            else:
                raise  # a bug, with its traceback


@contextlib.contextmanager
def explained(action: str, advice: str) -> Iterator[None]:
    """Turns an error of the storage inside into a UserError; a bug keeps its traceback.

    Args:
      action: what could not be done.
      advice: what the user should do about a storage that fails.
    """
    try:
        yield
    except Exception as error:
        _raise_user_error(error)
        if not _is_storage(error):
            raise
        text = reason(error)
        advice = next((better for cause, better in _ADVICE.items() if cause in text), advice)
        raise UserError(f"Could not {action}: {text}\n{advice}") from error
