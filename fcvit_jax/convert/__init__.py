"""Weights of the PyTorch original <-> our variables, and the files that hold either.

As a tool, `python -m fcvit_jax.convert SOURCE DEST [--ema]`; see `convert`.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from flax import traverse_util

from fcvit_jax.convert.fcvit import (
    from_original,
    infer_model,
    is_ours,
    is_pyramid,
    original_names,
    original_shape,
    to_original,
)
from fcvit_jax.errors import UserError, exit_on_error, log
from fcvit_jax.networks.fcvit import (
    VARIANTS,
    Backbone,
    FCViT,
    abstract_variables,
    create_backbone,
    create_model,
)

# Where a .npz keeps what it says of itself, as JSON.
METADATA = "__metadata__"


def _abstract(model: FCViT | Backbone) -> dict[str, jax.ShapeDtypeStruct]:
    """The model's variables without values, by path: "params/stem/conv/kernel", ..."""
    return traverse_util.flatten_dict(abstract_variables(model), sep="/")


def _check(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a UserError that lists every tensor that is missing, unexpected or has another shape."""
    problems = [f"missing: {name} {expected[name]}" for name in expected if name not in found]
    problems += [f"unexpected: {name} {found[name]}" for name in found if name not in expected]
    problems += [
        f"misshaped: {name} {found[name]}, should be {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        raise UserError("\n  ".join([f"The weights do not fit the model ({len(problems)} tensors):", *problems]))


def _as_numpy(x: Any) -> np.ndarray:
    if hasattr(x, "detach"):  # PyTorch's; NumPy has no bfloat16 of its own
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x
    return np.asarray(x)


def from_torch(state_dict: Mapping[str, np.ndarray], model: FCViT | Backbone) -> dict[str, Any]:
    """Makes our variables from a state dict of the original.

    Example::

        state_dict = torch.load("fcvit_b12.pth", weights_only=True)
        variables = from_torch(state_dict, create_model("fcvit_s12"))

    Args:
      state_dict: NumPy or PyTorch tensors by the original's names, of any float dtype. `num_batches_tracked`, on which
        nothing depends, is ignored.
      model: what the variables are for.

    Returns:
      {"params": ..., "batch_stats": ...} of NumPy arrays in the model's dtypes.

    Raises:
      UserError: tensors are missing, unexpected or misshaped; lists them all.
    """
    abstract = _abstract(model)
    names = original_names({path: x.shape for path, x in abstract.items()})
    expected = {names[path]: original_shape(x.shape, path) for path, x in abstract.items()}
    found = {name: tuple(x.shape) for name, x in state_dict.items()}
    for name in [name for name in found if name.endswith("num_batches_tracked")]:
        if name.replace("num_batches_tracked", "running_var") in expected:
            del found[name]
    _check(found, expected)
    flat = {
        path: np.array(from_original(_as_numpy(state_dict[names[path]]), path), x.dtype, order="C")
        for path, x in abstract.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def to_torch(variables: Mapping[str, Any], model: FCViT | Backbone) -> dict[str, np.ndarray]:
    """Makes a state dict of the original from our variables; the exact inverse of `from_torch`.

    Example::

        state_dict = {name: torch.from_numpy(x) for name, x in to_torch(variables, model).items()}

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      model: what the variables are for.

    Returns:
      float32 arrays by the original's names, in no particular order; `num_batches_tracked` (int64), which has no
      counterpart here, is 0.

    Raises:
      UserError: tensors are missing, unexpected or misshaped; lists them all.
    """
    flat = traverse_util.flatten_dict(variables, sep="/")
    shapes = {path: x.shape for path, x in _abstract(model).items()}
    _check({path: tuple(x.shape) for path, x in flat.items()}, shapes)
    state_dict = {}
    for path, name in original_names(shapes).items():
        state_dict[name] = np.array(to_original(np.asarray(flat[path]), path), np.float32, order="C")
        if name.endswith("running_var"):
            state_dict[name.replace("running_var", "num_batches_tracked")] = np.array(0, np.int64)
    return state_dict


def _variables(weights: Mapping[str, np.ndarray], model: FCViT | Backbone) -> dict[str, Any]:
    """The model's variables of weights by the original's names or by our paths."""
    if not is_ours(weights):
        return from_torch(weights, model)
    abstract = _abstract(model)
    _check({path: x.shape for path, x in weights.items()}, {path: x.shape for path, x in abstract.items()})
    return traverse_util.unflatten_dict({path: weights[path].astype(x.dtype) for path, x in abstract.items()}, sep="/")


def _fit(path: str | Path, weights: Mapping[str, np.ndarray], model: FCViT | Backbone) -> dict[str, Any]:
    """As `_variables`, but a network of another size gets one line, not one a tensor."""
    try:
        return _variables(weights, model)
    except UserError as error:
        if 0 in model.depths:  # infer_model does not know such
            raise
        found = infer_model({name: x.shape for name, x in weights.items()})
        theirs, ours = ((tuple(m.depths), tuple(m.dims)) for m in (found, model))
        if theirs == ours:
            raise
        raise UserError(
            f"{path} holds another network than the model: depths {theirs[0]} and dims {theirs[1]}, "
            f"the model has {ours[0]} and {ours[1]}."
        ) from error


def load_pretrained(path: str | Path, model: FCViT | Backbone, *, ema: bool | None = None) -> dict[str, Any]:
    """Reads weights for a model from a file of ours or of the original.

    If the file has another number of classes (or no head), the model gets a new head, drawn from a normal distribution
    with standard deviation 0.02 and always the same; a pyramid that is given a classifier's weights gets new norms. A
    warning says so.

    Example::

        model = create_model("fcvit_s12", num_classes=10)
        variables = load_pretrained("fcvit_b12.pth.tar", model)
        variables = load_pretrained("fcvit_b12.pth.tar", create_backbone("fcvit_s12"))

    Args:
      path: a .pth or .pth.tar of the original, a .npz of ours, or the folder of a run or of one Orbax checkpoint.
      model: what the weights are for.
      ema: True: the exponential moving averages; False: the plain weights; None: for a run of ours, what evaluation
        uses (the averages, if it kept them); for a file of the original, the plain weights, if it holds them.

    Returns:
      {"params": ..., "batch_stats": ...} of NumPy arrays in the model's dtypes.

    Raises:
      UserError: the file cannot be read, holds another network, or has tensors outside the head that do not fit; then
        it lists them all.
    """
    weights, _ = _read(Path(path), ema)
    if isinstance(model, Backbone) and is_pyramid(weights):
        return _fit(path, weights, model)
    kernel, axis = ("params/head/kernel", -1) if is_ours(weights) else ("head.weight", 0)
    classes = weights[kernel].shape[axis] if kernel in weights and weights[kernel].ndim == 2 else 0
    if isinstance(model, Backbone):
        variables = _fit(path, weights, FCViT(num_classes=classes, **_fields(model)))
        log.warning("%s holds a classifier: the norms of the pyramid start afresh.", path)
        params = {name: x for name, x in variables["params"].items() if name not in ("norm", "head")}
        for i, dim in enumerate(model.dims):
            params[f"norm_{i}"] = {"scale": np.ones(dim, model.param_dtype), "bias": np.zeros(dim, model.param_dtype)}
        return variables | {"params": params}
    variables = _fit(path, weights, model.clone(num_classes=classes))
    if classes != model.num_classes:
        head = "the head starts afresh" if model.num_classes else "the head is left out"
        log.warning("%s has %d classes, the model %d: %s.", path, classes, model.num_classes, head)
        variables["params"].pop("head", None)
        if model.num_classes:
            shape = (model.dims[-1], model.num_classes)
            variables["params"]["head"] = {
                "kernel": np.random.default_rng(0).normal(0, 0.02, shape).astype(model.param_dtype),
                "bias": np.zeros(shape[1:], model.param_dtype),
            }
    return variables


def convert(source: str | Path, dest: str | Path, *, ema: bool | None = None) -> None:
    """Converts a file of weights; the network is the one that the file names, or is inferred from the shapes.

    Nothing is written on an error.

    Args:
      source: as in `load_pretrained`.
      dest: the file's ending chooses its format: .pth or .pt (a state dict), .pth.tar ({"state_dict": ...}), .npz
        (arrays by our paths, "params/stem/conv/kernel", float32); otherwise a new folder for an Orbax checkpoint. The
        latter two carry metadata: "model", the arguments of `create_model` or of `create_backbone`, and any that the
        source has.
      ema: as in `load_pretrained`.

    Raises:
      UserError: the source cannot be read or holds another network, or the destination cannot be written.
    """
    dest = Path(dest).expanduser()
    weights, metadata = _read(Path(source), ema)
    if "model" in metadata:
        create = create_backbone if is_pyramid(weights) else create_model
        try:
            model = create(**metadata["model"])
        except TypeError as error:
            raise UserError(f"{source} does not say which network it holds: {error}") from error
    else:
        model = infer_model({name: x.shape for name, x in weights.items()})
    # In float32, in which a run evaluates its averages, whatever the dtype of its parameters.
    variables = _variables(weights, model.clone(param_dtype=np.float32))
    metadata = {"model": _arguments(model)} | metadata
    name = dest.name.lower()
    if name.endswith((".pt", ".pth", ".pth.tar")):
        torch = _torch()
        state_dict = {key: torch.from_numpy(x) for key, x in to_torch(variables, model).items()}
        content = io.BytesIO()  # torch hides the system's error where it cannot write
        torch.save({"state_dict": state_dict} if name.endswith(".tar") else state_dict, content)
        _write(dest, lambda file: file.write(content.getbuffer()))
    elif name.endswith(".npz"):
        arrays = traverse_util.flatten_dict(variables, sep="/")
        _write(dest, lambda file: np.savez(file, **arrays, **{METADATA: json.dumps(metadata)}))
    elif dest.suffix.lower() in (".safetensors", ".ckpt", ".bin", ".tar", ".gz", ".zip", ".h5"):
        raise UserError(f"{dest}: the ending must be .pth, .pt, .pth.tar or .npz, or none for a folder.")
    else:
        from fcvit_jax.run import checkpoint

        checkpoint.save_variables(dest, variables, metadata)


def _fields(model: FCViT | Backbone) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(model) if field.name not in ("name", "parent"))
    return {name: getattr(model, name) for name in names}


def _arguments(model: FCViT | Backbone) -> dict[str, Any]:
    """The arguments of `create_model` or `create_backbone` that make the model, as JSON can hold them."""
    fields = _fields(model)
    variant = next((name for name, sizes in VARIANTS.items() if sizes.items() <= fields.items()), "fcvit_tiny")
    usual = create_model(variant) if isinstance(model, FCViT) else create_backbone(variant)
    changed = {name: x for name, x in fields.items() if x != getattr(usual, name)}
    return {"name": variant} | changed


def _write(dest: Path, write: Callable[[BinaryIO], None]) -> None:
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


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads what a file that `load_pretrained` takes says of itself: "model", "class_names", ...; {} if nothing.

    Raises:
      UserError: it cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        from fcvit_jax.run import saved

        return saved.load_metadata(path)
    if path.suffix.lower() != ".npz":
        return {}
    with _open_npz(path) as file:
        return json.loads(str(file[METADATA])) if METADATA in file else {}


def _read(path: Path, ema: bool | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights, by the original's names or by our paths, and what the file says of itself."""
    path = path.expanduser()
    if path.is_dir():
        from fcvit_jax.run import saved

        return traverse_util.flatten_dict(saved.load_variables(path, ema=ema), sep="/"), read_metadata(path)
    if not path.is_file():
        raise UserError(f"There is no file or folder {path}.")
    if path.suffix.lower() != ".npz":
        return _read_torch(path, ema), {}
    if ema:
        raise UserError(f"{path} is a .npz: it holds one set of weights, no moving averages.")
    with _open_npz(path) as file:
        weights = {name: file[name] for name in file if name != METADATA}
    return weights, read_metadata(path)


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


def _torch():
    try:
        import torch
    except ImportError as error:
        raise UserError("Files of the original (.pth) need PyTorch: pip install torch") from error
    return torch


def _read_torch(path: Path, ema: bool | None) -> dict[str, np.ndarray]:
    """The state dict of a file of the original, which may hold it bare or with timm's other entries around it."""
    torch = _torch()
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
        arrays[name.removeprefix("module.")] = _as_numpy(x)
    return arrays


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fcvit_jax.convert",
        description=convert.__doc__.splitlines()[0],
        epilog="example: python -m fcvit_jax.convert fcvit_b12.pth.tar converted.npz",
    )
    parser.add_argument("source", help=".pth, .pth.tar, .npz, or the folder of a run or an Orbax checkpoint")
    parser.add_argument("dest", help=".pth, .pt, .pth.tar, .npz, or a new folder for an Orbax checkpoint")
    parser.add_argument(
        "--ema", action="store_true", default=None, help="read the averages; the default for a run that kept them"
    )
    args = parser.parse_args(argv)
    with exit_on_error():
        convert(args.source, args.dest, ema=args.ema)
    dest = Path(args.dest).expanduser()
    print(f"wrote the {'folder' if dest.is_dir() else 'file'} {dest}")
