"""Finding and loading what was saved: weights, their metadata and the network that they are of."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from fcvit_jax import tasks
from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError
from fcvit_jax.formats import hub
from fcvit_jax.run import disk

_DAMAGED = "It is damaged or not from fcvit_jax; try an earlier step."


def find_step(path: str | Path) -> Path:
    """Finds the folder of one checkpoint.

    Args:
      path: a run's folder, its `checkpoints` or `best` folder (the newest step is taken), or one step's folder.

    Raises:
      UserError: there is none.
    """
    path = storage.run_path(path)
    storage.check_name(path)
    if not storage.is_folder(path):
        raise UserError(f"No checkpoint at {path}: there is no such folder.")
    if storage.is_folder(path / "variables"):
        return path
    folder = path / "checkpoints" if storage.is_folder(path / "checkpoints") else path
    steps = [step for step in storage.finished_saves(folder) if storage.is_folder(step / "variables")]
    if not steps:
        raise UserError(f"No checkpoint in {folder}: give a run's folder, its checkpoints or best folder, or a step's.")
    return max(steps, key=lambda p: int(p.name))


def load_variables(path: str | Path, *, ema: bool | None = None) -> dict[str, Any]:
    """Reads the weights of a checkpoint, as NumPy arrays.

    Example::

        variables = load_variables("runs/digits")                        # {"params": ..., ...}

    Args:
      path: as in `find_step`.
      ema: the exponential moving averages instead of the plain weights; None: what evaluation uses, that is, the
        averages if the run kept them.

    Raises:
      UserError: there is no checkpoint, it holds no averages, or it cannot be read.
    """
    step = find_step(path)
    if ema is None:
        ema = storage.is_folder(step / "ema")
    item = step / ("ema" if ema else "variables")
    if not storage.is_folder(item):
        raise UserError(f"{step} holds no exponential moving averages: the run did not keep them.")

    def read() -> tuple[dict[str, Any], dict[str, int]]:
        disk.load_json(item, "_METADATA")  # whose damage Orbax does not notice
        with disk.open_reader() as reader:
            variables = reader.restore(item, args=ocp.args.PyTreeRestore())
        return variables, disk.load_json(step / "checksums")

    try:
        metadata = disk.load_metadata(step)
        variables, checksums = disk.read(str(step), read)
        disk.check({item.name: variables}, metadata, checksums)
    except disk.Damaged as error:
        raise UserError(f"Could not read the checkpoint {step}: {error}\n{_DAMAGED}") from error
    return variables


def load_metadata(path: str | Path) -> dict[str, Any]:
    """Reads what was saved beside the weights: "model" (arguments of `create_model`), "class_names", ...

    Args:
      path: as in `find_step`.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    step = find_step(path)
    try:
        metadata = disk.load_metadata(step)
    except disk.Damaged as error:
        raise UserError(f"Could not read the metadata of {step}: {error}\n{_DAMAGED}") from error
    names = metadata.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{step} is damaged: its class_names are no list of names.")
    return {key: value for key, value in metadata.items() if key != "format"}


def task_of(metadata: Mapping[str, Any]) -> str:
    """The name of the task that weights were trained for; older checkpoints do not say it."""
    return metadata.get("task", "classification")


def create_model(source: str | Path, metadata: Mapping[str, Any]) -> nn.Module:
    """Makes the network that weights were saved of.

    Args:
      source: file or folder of the weights, to be named in an error.
      metadata: what was saved beside them: "task", and "model", the arguments of its `create_model`.

    Raises:
      UserError: the metadata do not say, or name an option that does not exist.
    """
    try:
        return tasks.load(task_of(metadata)).create_model(**metadata["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{source} does not say which network it holds: {type(error).__name__}: {error}") from error


def fits(variables: Mapping[str, Any], task: ModuleType, model: nn.Module) -> bool:
    """Whether variables have the names and the shapes that a task's network has."""
    expected = jax.eval_shape(lambda key: task.init_variables(model, key), jax.random.key(0))
    return jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, expected)


class Saved(NamedTuple):
    """What evaluation uses of a checkpoint.

    Attributes:
      task: the module of the task that the network was trained for.
      model: the network.
      variables: of NumPy arrays; the moving averages where the run kept them.
      metadata: what was saved beside them, completed by the task.
    """

    task: ModuleType
    model: nn.Module
    variables: dict[str, Any]
    metadata: dict[str, Any]


def load(checkpoint: str | Path) -> Saved:
    """Loads what evaluation uses of a checkpoint, or of a file of weights.

    Example::

        task, model, variables, metadata = load("runs/digits")
        logits = model.apply(variables, images)                     # images (N, H, W, 3) float, normalised
        task, model, variables, metadata = load("vit_base.safetensors:vit_base_patch16_224")

    Args:
      checkpoint: as in `find_step`, or any file that `fcvit_jax.convert.load_network` takes. FILE:NAME names the
        variant, where the file does not tell a ViT from a DeiT. Or `hf-hub:owner/name`, or a folder in that layout.

    Raises:
      UserError: there is no checkpoint, it cannot be read, or it holds another network than it says.
    """
    checkpoint = hub.local(checkpoint)
    file, _, name = str(checkpoint).rpartition(":")
    if Path(file).expanduser().is_file():
        return _load_file(storage.run_path(file), name)
    path = storage.run_path(checkpoint)
    if storage.is_file(path) or hub.is_layout(path):
        return _load_file(path, None)
    return _load_step(find_step(path))


def _load_file(path: Path, name: str | None) -> Saved:
    from fcvit_jax import convert  # it imports this module
    from fcvit_jax.convert.weights import FAMILIES

    model, variables, metadata = convert.load_network(path, name=name)
    task = tasks.load(task_of(metadata))
    if type(create_model(path, metadata)) is not type(model):
        raise UserError(
            f"{path} holds {FAMILIES[type(model)].description}, which is none of the task {task_of(metadata)}."
        )
    return Saved(task, model, variables, task.complete_metadata(path, model, metadata))


def _load_step(step: Path) -> Saved:
    from fcvit_jax.convert.weights import FAMILIES, kind_of  # it imports this module

    metadata = load_metadata(step)
    variables = load_variables(step)
    task, model = tasks.load(task_of(metadata)), create_model(step, metadata)
    if not fits(variables, task, model):
        held = FAMILIES[kind_of(f"params/{name}/" for name in variables["params"])].description
        raise UserError(
            f"{step} holds {held}, with weights of another network than the {metadata['model']} that it names."
        )
    return Saved(task, model, variables, task.complete_metadata(step, model, metadata))
