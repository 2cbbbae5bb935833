"""Evaluation of any task, which counts every example exactly once."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from fcvit_jax import tasks
from fcvit_jax.data import loader
from fcvit_jax.data.loader import Data
from fcvit_jax.devices import storage
from fcvit_jax.devices.cpu import compiler_options
from fcvit_jax.devices.hosts import errors_on_all_processes
from fcvit_jax.devices.sharding import global_batch, make_mesh, state_shardings
from fcvit_jax.devices.stopping import ProcessBatches, StopSignal
from fcvit_jax.errors import Stopped, UserError, log
from fcvit_jax.run import results, saved
from fcvit_jax.run.config import check_config, check_processes, check_sizes, class_changes, class_order, complete


@functools.cache  # so that later evaluations find what JAX has compiled for the first
def _compiled(eval_step: Callable, mesh: Mesh) -> Callable:
    # Outputs are replicated on every device, so that every process can read all of them.
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(eval_step, static_argnums=0, out_shardings=whole, compiler_options=compiler_options(mesh))


def evaluate(
    task: ModuleType, model: nn.Module, variables: Mapping[str, Any], data: Data, mesh: Mesh, watch: Callable = iter
) -> dict[str, float]:
    """Evaluates a network over all examples of a dataset; every process must call it.

    Example::

        data = classification.open_dataset(False, dataset="digits", batch_size=64, image_size=32)
        result = evaluate(classification, model, variables, data, make_mesh())
        result["count"]

    Args:
      task: its module.
      model: the network.
      variables: its variables, on the mesh.
      data: from the task's `open_dataset`; `data.batch_size` examples are computed at once.
      mesh: the devices.
      watch: wraps the iterator over the batches, as `StopSignal.watch` does.

    Returns:
      What the task's `finish` returns.

    Raises:
      UserError: an example cannot be read.
    """
    shapes = [
        loader.process_shapes(batch | {"mask": jax.ShapeDtypeStruct((data.batch_size,), bool)})
        for batch in loader.batch_shapes(data, training=False)
    ]
    batches = ProcessBatches(
        loader.eval_batches(data, jax.process_index(), jax.process_count()),
        data.num_eval_batches,
        lambda number: shapes[loader.eval_bucket(data, number)],
    )
    with closing(batches):
        # disable=None: only where stderr is a terminal.
        hidden = True if jax.process_index() > 0 else None
        bar = tqdm(watch(batches), "evaluating", len(batches), leave=False, unit="batch", disable=hidden)
        result = task.finish(_outputs(task.eval_step, model, variables, bar, mesh), data)
        batches.check()
    return result


def _outputs(
    eval_step: Callable, model: nn.Module, variables: Mapping[str, Any], batches: Iterable[loader.Batch], mesh: Mesh
) -> Iterator[Any]:
    """What `eval_step` returns for each batch, on the host."""
    step, pending = _compiled(eval_step, mesh), None
    for batch in batches:
        with jax.set_mesh(mesh):  # for the depthwise convolutions
            outputs = step(model, variables, global_batch(batch, mesh))
        if pending is not None:
            yield jax.device_get(pending)  # one batch late, so that the device never waits for the host
        pending = outputs
    if pending is not None:
        yield jax.device_get(pending)


def evaluate_checkpoint(config: ConfigDict, workdir: str | Path, which: str = "checkpoints") -> dict[str, float]:
    """Evaluates a checkpoint of a run.

    Args:
      config: the run's.
      workdir: the run's folder.
      which: "checkpoints" for the newest, "best" for the best, or "checkpoints/STEP".

    Returns:
      What the task's `finish` returns; if there are rows in it, `<workdir>/evaluation.json` has it too.

    Raises:
      UserError: the config or the data is not usable, there is no such checkpoint, or the result is not finite.
    """
    with errors_on_all_processes():
        config = complete(config)
        task = tasks.load(config.task)
        check_config(config, task)
        data = task.open_dataset(training=False, **config.data)
        mesh = make_mesh(**config.mesh)
        model = task.create_model(**config.model)
        check_sizes(config, data, mesh, model, training=False)
        path = saved.find_step(storage.run_path(workdir) / which)
        metadata = saved.load_metadata(path)
        if saved.task_of(metadata) != config.task:
            raise UserError(f"{path} is of the task {saved.task_of(metadata)}, the config of {config.task}.")
        order = _check_data(path, metadata, data, config.data.keys())
        variables = saved.load_variables(path)
        if not saved.fits(variables, task, model):
            raise UserError(f"{path} is of the network {metadata['model']}, not of the config's; give its config.")
        if order is not None:
            variables = task.reorder_classes(variables, order)
    check_processes(config, data)
    variables = jax.device_put(variables, state_shardings(variables, mesh))
    # Evaluate with the batch size of one part of a training batch; the full batch may not fit in memory.
    data = dataclasses.replace(data, batch_size=data.batch_size // config.train.accumulate)
    with StopSignal() as stop:
        result = evaluate(task, model, variables, data, mesh, stop.watch)
        if stop.received:
            raise Stopped(stop.number)
    if numbers := results.not_finite(result):
        raise UserError(f"{path}: {numbers}: its weights have diverged, or the data are broken.")
    if table := results.describe_rows(result):
        log.info("%s", table)
    log.info("%s: %s, over %d examples", path, task.describe(result), result["count"])
    results.write_evaluation(storage.run_path(workdir), {"step": int(path.name), **result})
    return result


def _check_data(path: Path, metadata: Mapping[str, Any], data: Data, options: Collection[str]) -> list[int] | None:
    """Compares the data, opened with some options, with those of a checkpoint's run, and says what differs.

    Returns:
      As `class_order`, where the classes are the same in another order; otherwise None.

    Raises:
      UserError: they have another number of classes.
    """
    names = metadata.get("class_names", data.class_names)  # a converted checkpoint may have none
    classes = saved.create_model(path, metadata).num_classes
    if classes != data.num_classes:
        raise UserError(
            f"{path} has {classes} classes, the dataset {data.num_classes}: evaluate on data with the checkpoint's"
            f" classes, or fine-tune it on these data, with --config.init_from={path}."
        )
    changes, order = class_changes(names, data.class_names), class_order(names, data.class_names)
    if changes and order is not None:
        log.info("%s has the classes of the data in another order: they are matched by name", path)
    elif changes:
        log.info("\n".join([f"the classes of {path} -> those of the data, which are matched by place:", *changes]))
    for name, used in data.about.items():
        if name in options and metadata.get(name, used) != used:
            log.info("%s is of a run with data.%s=%s; this evaluation is with %s", path, name, metadata[name], used)
    return order if changes else None
