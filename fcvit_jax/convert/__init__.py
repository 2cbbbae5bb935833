"""Weights of the PyTorch original <-> our variables, and the files that hold either.

As a tool, `python -m fcvit_jax.convert SOURCE DEST [--ema]`; see `convert`.
"""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from fcvit_jax.convert.fcvit import (
    from_original,
    infer_model,
    is_pyramid,
    original_names,
    original_shape,
    to_original,
)
from fcvit_jax.convert.files import METADATA, as_numpy, import_torch, is_ours, read, read_metadata, write_whole
from fcvit_jax.errors import UserError, log
from fcvit_jax.networks.fcvit import (
    VARIANTS,
    Backbone,
    FCViT,
    abstract_variables,
    create_backbone,
    create_model,
)

__all__ = ["METADATA", "convert", "from_torch", "load_pretrained", "read_metadata", "to_torch"]


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
        path: np.array(from_original(as_numpy(state_dict[names[path]]), path), x.dtype, order="C")
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
    weights, _ = read(Path(path), ema)
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
    weights, metadata = read(Path(source), ema)
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
        torch = import_torch()
        state_dict = {key: torch.from_numpy(x) for key, x in to_torch(variables, model).items()}
        content = io.BytesIO()  # torch hides the system's error where it cannot write
        torch.save({"state_dict": state_dict} if name.endswith(".tar") else state_dict, content)
        write_whole(dest, lambda file: file.write(content.getbuffer()))
    elif name.endswith(".npz"):
        arrays = traverse_util.flatten_dict(variables, sep="/")
        write_whole(dest, lambda file: np.savez(file, **arrays, **{METADATA: json.dumps(metadata)}))
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
