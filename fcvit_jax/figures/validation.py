"""The examples of the validation set that a figure shows, beside the network that is shown on them."""

import argparse
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from flax import linen as nn

from fcvit_jax.data.loader import Data
from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError
from fcvit_jax.run import saved

MAX_IMAGES = 16  # of one picture


class Chosen(NamedTuple):
    """What a figure is drawn of.

    Attributes:
      task, model, variables, metadata: of the checkpoint, as in `saved.Saved`.
      data: its validation set.
      numbers: of the examples.
    """

    task: ModuleType
    model: nn.Module
    variables: dict[str, Any]
    metadata: dict[str, Any]
    data: Data
    numbers: range


def choose_examples(args: argparse.Namespace, task_name: str, network: str) -> Chosen:
    """Opens what a tool's arguments ask for: checkpoint, dataset (None: its run's), first and count.

    Args:
      args: of the tool.
      task_name: that the checkpoint must have.
      network: what such a network is called.

    Raises:
      UserError: the checkpoint is of another task, or there are no such images.
    """
    if not 1 <= args.count <= MAX_IMAGES:
        raise UserError(f"--count={args.count} must be from 1 to {MAX_IMAGES}.")
    task, model, variables, metadata = saved.load(args.checkpoint)
    if saved.task_of(metadata) != task_name:
        raise UserError(f"{args.checkpoint} is of the task {saved.task_of(metadata)}: {network} is needed here.")
    data = _open_data(task, args.checkpoint, args.dataset)
    if data.num_classes != model.num_classes:
        raise UserError(f"The dataset has {data.num_classes} classes, the checkpoint {model.num_classes}.")
    last = args.first + args.count
    if not 0 <= args.first < last <= data.num_eval:
        raise UserError(f"Images {args.first} to {last - 1} are not among the {data.num_eval} of the validation set.")
    return Chosen(task, model, variables, metadata, data, range(args.first, last))


def _open_data(task: ModuleType, checkpoint: str, dataset: str | None) -> Data:
    """The validation set that the run of a checkpoint has, or another, read as the run's."""
    path = storage.run_path(checkpoint)  # a run's folder, one of those in it, or a step's in one of those
    configs = [folder / "config.json" for folder in (path, *path.parents[:2])]
    configs = [config for config in configs if storage.is_file(config)]
    if not configs and dataset is None:
        raise UserError(f"{checkpoint} is in no run's folder, whose config.json names the data: give --dataset.")
    try:
        options: Mapping[str, Any] = json.loads(storage.read_text(configs[0]))["data"] if configs else {"batch_size": 1}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{configs[0]} cannot be read: {error}") from error
    return task.open_dataset(training=False, **options | ({"dataset": dataset} if dataset else {}))
