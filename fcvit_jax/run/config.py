"""What a config may hold, and whether a folder holds a run of the same config."""

import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fcvit_jax import optim
from fcvit_jax.augment import mixing
from fcvit_jax.data.loader import Data, open_dataset
from fcvit_jax.devices.hosts import check_same, say
from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.errors import UserError, check_range
from fcvit_jax.networks.fcvit import FCViT
from fcvit_jax.run.checkpoint import Checkpointer, step_folders

# Keys that each host may have its own value of.
_HOST_KEYS = {"data.data_dir", "data.prefetch", "data.workers"}
# Keys that may change between two starts of a run, since its result does not depend on them.
_FREE_KEYS = _HOST_KEYS | {
    "checkpoint.keep",
    "checkpoint.save_every",
    "compilation_cache",
    "mesh.data",
    "mesh.fsdp",
    "resume_with_changes",
    "train.log_every",
}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    return traverse_util.flatten_dict(tree, sep=".")


def check_config(config: ConfigDict) -> None:
    """Compares a config with the functions that take its parts.

    Raises:
      UserError: naming every unknown and every missing key, or the first value that JSON cannot hold or that is out of
        its range.
    """
    # The steps of training and evaluation share blocks in any case.
    fields = [name for name in FCViT.__dataclass_fields__ if name not in ("parent", "name", "share_blocks")]
    sections = {
        "model": {"name", *fields},
        "data": _keywords(open_dataset),
        "mixing": _keywords(mixing.make),
        "optim": _keywords(optim.make_optimizer),
        "mesh": _keywords(make_mesh),
        "checkpoint": _keywords(Checkpointer),
        "train": {"steps", "epochs", "log_every", "eval_every", "accumulate", "ema_decay"},
    }
    known = {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    known |= {"seed", "init_from", "resume_with_changes", "compilation_cache"}
    needed = known - {f"model.{field}" for field in fields if field != "num_classes"}  # the variant has the others
    values = _flat(config.to_dict())
    faults = []
    for key in sorted(values.keys() - known):
        close = difflib.get_close_matches(key, known, 1)
        faults.append(f"Unknown config key {key!r}" + (f": did you mean {close[0]!r}?" if close else "."))
    faults += [f"Config key {key!r} is missing." for key in sorted(needed - values.keys())]
    if faults:
        raise UserError("\n".join(faults))
    for key, value in values.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise UserError(
                f"{key}={value!r} cannot be written to config.json: give a number or a name, such as 'float32'."
            ) from error
    if not 0 <= config.seed < 2**32:  # JAX drops the higher bits
        raise UserError(f"seed={config.seed} must lie between 0 and {2**32 - 1}.")
    numbers = {key: x for key, x in config.train.items() if x is not None or key not in ("steps", "ema_decay")}
    check_range("train", 0, below=1, ema_decay=numbers.pop("ema_decay", 0))
    check_range("train", 1, **numbers)


def _keywords(function: Callable) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_sizes(data: Data, mesh: Mesh, model: FCViT, accumulate: int, training: bool = True) -> None:
    """Checks what no function can check alone: that dataset, batch, devices and model fit each other.

    Args:
      data, mesh, model: of the run.
      accumulate: parts that a batch is computed in.
      training: False: the model is evaluated only.

    Raises:
      UserError: they do not.
    """
    if data.num_classes != model.num_classes:
        raise UserError(
            f"The dataset has {data.num_classes} classes, the model {model.num_classes}: "
            f"set --config.model.num_classes={data.num_classes}."
        )
    group = model.bn_group_size
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


def check_hosts(config: ConfigDict, data: Data) -> None:
    """Compares the config and the dataset with the other hosts'; every host must call it.

    Raises:
      UserError: on every host, if the configs or the datasets differ.
    """
    check_same("configs", {key: x for key, x in _flat(config.to_dict()).items() if key not in _HOST_KEYS})
    check_same("datasets", [data.num_train, data.num_eval, data.class_names])


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Compares a config with `<workdir>/config.json`, if the folder holds a run.

    A start that has saved no checkpoint binds no later one.

    Raises:
      UserError: the folder holds checkpoints of another config.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        old = _flat(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --workdir.") from error
    new = _flat(json.loads(config.to_json()))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    lines = [f"  {key}: {old.get(key)} -> {new.get(key)}" for key in changed if key != "resume_with_changes"]
    has_checkpoint = bool(step_folders(workdir / "checkpoints"))
    if has_checkpoint and any(key not in _FREE_KEYS for key in changed) and not config.resume_with_changes:
        raise UserError(
            "\n".join([f"{workdir} holds a run of another config:", *lines])
            + "\nChoose another --workdir, or go on with these changes: --config.resume_with_changes=True"
        )
    if lines:
        what = "going on with" if has_checkpoint else "no checkpoint yet, so starting with"
        say("\n".join([f"{what} changes to the config of {workdir}:", *lines]))


def class_changes(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Lines that say which classes differ, the first ten of them."""
    names = zip_longest(old, new)
    lines = [f"  class {i}: {a} -> {b}" for i, (a, b) in enumerate(names) if a != b]
    if lines[10:]:
        lines[10:] = [f"  and {len(lines) - 10} more classes"]
    return lines


def check_data(config: ConfigDict, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compares the dataset of a run's checkpoint ("class_names", "num_train", "num_eval") with that of its new start.

    Raises:
      UserError: they differ, so labels, order, epochs or evaluations would too, and `resume_with_changes` is off.
    """
    lines = class_changes(old["class_names"], new["class_names"])
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
        say("\n".join(["going on with other data:", *lines]))


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `<workdir>/config.json`, whole or not at all; only the first host writes.

    Raises:
      UserError: the folder cannot be written.
    """
    if jax.process_index() != 0:
        return
    unfinished = workdir / "config.json.tmp"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(config.to_json(indent=2) + "\n")
        unfinished.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}.") from error
