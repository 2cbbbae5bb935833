"""What a config may hold, and whether a folder holds a run of the same config."""

import copy
import dataclasses
import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fcvit_jax import tasks
from fcvit_jax.data.loader import Data
from fcvit_jax.devices import storage
from fcvit_jax.devices.hosts import check_same
from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.errors import UserError, log
from fcvit_jax.run.checkpoint import Checkpointer
from fcvit_jax.run.options import TrainOptions
from fcvit_jax.run.results import parse_object

# Keys that each process may have its own value of.
_PROCESS_KEYS = {"data.data_dir", "data.prefetch", "data.workers"}
# Keys that may change between two starts of a run, since its result does not depend on them.
_FREE_KEYS = _PROCESS_KEYS | {
    "checkpoint.keep",
    "checkpoint.save_every",
    "compilation_cache",
    "data.on_broken",
    "data.results",
    "mesh.data",
    "mesh.fsdp",
    "resume_with_changes",
    "train.log_every",
    "train.profile_steps",
}
# Keys that came later, with the value that a config or a run without them has.
_ADDED = {
    "task": "classification",
    "data.exif": False,
    "data.on_broken": "error",
    "optim.freeze": (),
    "train.ema_warmup": False,
    "train.profile_steps": (),
}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    return traverse_util.flatten_dict(tree, sep=".")


def complete(config: ConfigDict) -> ConfigDict:
    """A copy of a config, with the values of keys that came after it was written.

    Raises:
      UserError: there is no such task.
    """
    config = copy.deepcopy(config)
    with config.unlocked():
        if "mixing" not in config:
            config.mixing = ConfigDict()  # a task may have no keys there
        if "task" not in config:
            config.task = _ADDED["task"]
        known = _known_keys(tasks.load(config.task))
        for key, value in _ADDED.items():
            section, _, name = key.rpartition(".")
            # A section that is missing is an error of `check_config`.
            if key in known and section in config and name not in config[section]:
                config[section][name] = value
    return config


def _known_keys(task: ModuleType) -> set[str]:
    """What a config of a task may have, without the fields of its networks."""
    sections = {
        "data": _keywords(task.open_dataset),
        "mixing": _keywords(task.make_prepare),
        "optim": _keywords(task.make_optimizer),
        "mesh": _keywords(make_mesh),
        "checkpoint": _keywords(Checkpointer),
        "train": {field.name for field in dataclasses.fields(TrainOptions)},
    }
    known = {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    return known | {"task", "seed", "init_from", "resume_with_changes", "compilation_cache", "model.name"}


def check_config(config: ConfigDict, task: ModuleType) -> None:
    """Compares a config with the functions that take its parts.

    Args:
      config: from `complete`.
      task: its module.

    Raises:
      UserError: naming every unknown and every missing key, or the first value that JSON cannot hold or that is out of
        its range.
    """
    values = _flat(config.to_dict())
    fields = task.model_fields(values["model.name"]) if isinstance(values.get("model.name"), str) else set()
    known = _known_keys(task) | {f"model.{field}" for field in fields}
    # A variant has values for all fields of its model but this one.
    needed = known - {f"model.{field}" for field in fields - {"num_classes"}}
    faults = []
    for key in sorted(values.keys() - known):
        close = difflib.get_close_matches(key, known, 1)
        faults.append(f"Unknown config key {key!r}" + (f": did you mean {close[0]!r}?" if close else "."))
    faults += [f"Config key {key!r} is missing." for key in sorted(needed - values.keys())]
    if faults:
        raise UserError("\n".join(faults))
    for key, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{key}={value!r} cannot be written to config.json: give a finite number or a name, such as 'float32'."
            ) from error
    for key in sorted(key for key in values.keys() & _need_value(task) if values[key] is None):
        raise UserError(f"{key}=None must have a value.")
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:  # JAX drops the higher bits
        raise UserError(f"seed={config.seed} must lie between 0 and {2**32 - 1}.")
    TrainOptions(**config.train)


def _keywords(function: Callable) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def _need_value(task: ModuleType) -> set[str]:
    """The keys whose value may not be None, as the functions that take them say."""
    functions = {"data": task.open_dataset, "mixing": task.make_prepare, "optim": task.make_optimizer}
    functions |= {"mesh": make_mesh, "checkpoint": Checkpointer, "train": TrainOptions}
    return {"task", "seed", "resume_with_changes", "compilation_cache"} | {
        f"{section}.{parameter.name}"
        for section, function in functions.items()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.annotation is not parameter.empty and "None" not in str(parameter.annotation)
    }


def group_size(model: nn.Module) -> int:
    """How many images share batch statistics in training; 0: all of a part of the batch, or there are none."""
    return getattr(model, "bn_group_size", None) or 0


def check_sizes(config: ConfigDict, data: Data, mesh: Mesh, model: nn.Module, training: bool = True) -> None:
    """Checks what no function can check alone: that dataset, batch, devices and model fit each other.

    Args:
      config, data, mesh, model: of the run.
      training: False: the model is evaluated only.

    Raises:
      UserError: they do not.
    """
    if data.num_classes != model.num_classes:
        raise UserError(
            f"The dataset has {data.num_classes} classes, the model {model.num_classes}: "
            f"set --config.model.num_classes={data.num_classes}."
        )
    accumulate, group = config.train.accumulate, group_size(model)
    part, rest = divmod(data.batch_size, accumulate)
    if rest or part % mesh.size:
        raise UserError(
            f"data.batch_size={data.batch_size} cannot be split evenly over train.accumulate={accumulate} parts and "
            f"{mesh.size} devices: choose a multiple of {accumulate * mesh.size}."
        )
    if training and group and part % group:
        raise UserError(
            f"A batch of {part} images (data.batch_size={data.batch_size}, train.accumulate={accumulate}) is not a "
            f"multiple of model.bn_group_size={group}: choose a batch that is, or model.bn_group_size=0 for all {part}."
        )


def check_processes(config: ConfigDict, data: Data) -> None:
    """Compares the config and the dataset with those of the other processes; every process must call it.

    Raises:
      UserError: on every process, if the configs or the datasets differ.
    """
    check_same("configs", {key: x for key, x in _flat(config.to_dict()).items() if key not in _PROCESS_KEYS})
    check_same("datasets", [data.num_train, data.num_eval, data.class_names])


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Compares a config with `<workdir>/config.json`, if the folder holds a run.

    If the folder has no checkpoint yet, any config is accepted.

    Raises:
      UserError: the folder holds checkpoints of another config.
    """
    path = workdir / "config.json"
    if not storage.is_file(path):
        return
    try:
        old = _flat(parse_object(storage.read_text(path)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {storage.words(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}). The checkpoints beside it need not be: move this file away, and the same "
            "command goes on with the run, under the config that is given."
        ) from error
    new = _flat(json.loads(config.to_json()))
    old = {key: value for key, value in json.loads(json.dumps(_ADDED)).items() if key in new} | old
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    lines = [f"  {key}: {old.get(key)} -> {new.get(key)}" for key in changed if key != "resume_with_changes"]
    has_checkpoint = bool(storage.finished_saves(workdir / "checkpoints"))
    if has_checkpoint and any(key not in _FREE_KEYS for key in changed) and not config.resume_with_changes:
        raise UserError(
            "\n".join([f"{workdir} holds a run of another config:", *lines])
            + "\nChoose another --workdir, or go on with these changes: --config.resume_with_changes=True"
        )
    if lines:
        what = "going on with" if has_checkpoint else "no checkpoint yet, so starting with"
        log.info("\n".join([f"{what} changes to the config of {workdir}:", *lines]))


def class_changes(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Lines that say which classes differ, the first ten of them."""
    names = zip_longest(old, new)
    lines = [f"  class {i}: {a} -> {b}" for i, (a, b) in enumerate(names) if a != b]
    if lines[10:]:
        lines[10:] = [f"  and {len(lines) - 10} more classes"]
    return lines


def class_order(old: Sequence[str], new: Sequence[str]) -> list[int] | None:
    """Where each of the new classes is among the old; None if the names are not the same, or some name is there twice.

    Example::

        class_order(["cat", "ant", "bee"], ["ant", "bee", "cat"])           # [1, 2, 0]
    """
    places = {name: place for place, name in enumerate(old)}
    if not len(places) == len(old) == len(new) or places.keys() != set(new):
        return None
    return [places[name] for name in new]


def match_classes(
    source: str | Path,
    variables: dict[str, Any],
    names: Sequence[str],
    class_names: Sequence[str],
    reorder: Callable[[dict[str, Any], list[int]], dict[str, Any]],
) -> dict[str, Any]:
    """Matches the classes of weights with those of the data: by name where the names are the same, else by place.

    It says where they differ.

    Args:
      source: of the weights, to be named.
      variables: the weights, as they are loaded for the data's number of classes.
      names: of the classes that the weights were trained for; empty if unknown.
      class_names: of the data.
      reorder: the task's `reorder_classes`.
    """
    changes, order = class_changes(names, class_names), class_order(names, class_names)
    if changes and order is not None:
        log.info("%s has the classes of the data in another order: its head is matched by name", source)
        return reorder(variables, order)
    if changes and len(names) == len(class_names):
        lines = ["The head's weights are loaded as well, although the class names differ:", *changes]
        log.info("\n".join(lines))
    return variables


def check_data(config: ConfigDict, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compares the dataset of a run's checkpoint with that of its new start: "num_train", "num_eval" and "class_names".

    Tasks without classes need not have names of them.

    Raises:
      UserError: they differ, so labels, order, epochs or evaluations would too, and `resume_with_changes` is off.
    """
    lines = class_changes(old.get("class_names", ()), new.get("class_names", ()))
    if old["num_train"] != new["num_train"]:
        lines.append(f"  training images: {old['num_train']:,} -> {new['num_train']:,}")
    if old["num_eval"] != new["num_eval"]:
        lines.append(
            f"  images of evaluation: {old['num_eval']:,} -> {new['num_eval']:,}; the best so far is of the former"
        )
    if lines and not config.resume_with_changes:
        raise UserError(
            "\n".join(["The data are not those of this run:", *lines])
            + "\nRestore them, choose another --workdir, or go on with these: --config.resume_with_changes=True"
        )
    if lines:
        log.info("\n".join(["going on with other data:", *lines]))


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `<workdir>/config.json`, whole or not at all; only the first process writes.

    Raises:
      UserError: the folder cannot be written.
    """
    if jax.process_index() != 0:
        return
    try:
        storage.make_folder(workdir)
        storage.replace_text(workdir / "config.json", config.to_json(indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {storage.words(error)}.") from error
