"""Tasks: what a run trains for. Each is a module of plain functions, which the engine calls and never looks into.

What a task has::

    BEST = "top1"                                   # what `best/` keeps the maximum of; of several, the first
    open_dataset(training=True, *, dataset, batch_size, ...) -> Data                # config.data
    load_example(data, record, rng) -> {name: array}                                # in a worker; rng None: evaluation
    create_model(name, num_classes, **fields) -> nn.Module                          # config.model
    model_fields(name) -> {field, ...}                                              # what config.model may have besides
    init_variables(model, key, jit) -> {"params": ..., ...}                     # drawn on the devices
    load_pretrained(path, model, data) -> {"params": ..., ...}                      # config.init_from
    reorder_classes(variables, order) -> variables                                  # output i is what order[i] was
    make_prepare(model, *, ...) -> prepare(key, batch) -> batch                     # config.mixing; on the device
    make_optimizer(steps_per_epoch, epochs, batch_size, steps, *, ...) -> (optimiser, schedule)      # config.optim
    num_epochs(config) -> int                                                       # of a run without train.steps
    loss(model, variables, batch, key) -> (loss, (updates, scalars))                # on the device, one part of a batch
    eval_step(model, variables, batch) -> sums or outputs                           # on the device; without masked rows
    finish(outputs, data) -> {metric: number, "count": examples, name: rows}        # on the CPU, over all batches
    describe(result) -> str                                                         # one line for people
    complete_metadata(source, model, metadata) -> metadata                          # of a checkpoint, for the tools
    read_image(encoded, metadata) -> array                                          # as evaluation sees an image
    predict(model, variables, images, metadata, ...) -> [prediction of each image]
    add_arguments(parser)                                                           # options of the `predict` tool
    predict_files(model, variables, (path, image) pairs, metadata, *, options) -> (path, {"predictions": rows}) pairs
    make_program(model, variables, metadata) -> (function, shape of the images, ...)  # and of what else `export` needs

Rows are a list of dicts with equal keys, such as one for each class: a table in the log and in evaluation.json.

The loop and the evaluation ask for all down to `describe` and, without `init_from`, not for `load_pretrained`. Of a
network they ask for `num_classes` (0: there are none) and `dtype`. tests/fake_task.py is the smallest task.
"""

import importlib
from types import ModuleType

from fcvit_jax.errors import UserError

NAMES = ("classification", "segmentation", "detection")


def load(name: str) -> ModuleType:
    """The module of a task.

    Args:
      name: one of `NAMES`, or the import path of a module of your own, such as "my_package.depth".

    Raises:
      UserError: there is no such task.
    """
    path = name if "." in name else f"fcvit_jax.tasks.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise UserError(f"task={name!r} is unknown: choose from {', '.join(NAMES)}.") from error
