"""What a run needs, made and checked before its first step."""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fcvit_jax import tasks
from fcvit_jax.data import loader
from fcvit_jax.data.loader import Data
from fcvit_jax.devices import storage
from fcvit_jax.devices.hosts import errors_on_all_processes
from fcvit_jax.devices.sharding import make_mesh
from fcvit_jax.errors import check_range, log
from fcvit_jax.run import config as run_config
from fcvit_jax.run.state import TrainState, abstract_state
from fcvit_jax.run.step import CompiledStep


class Run(NamedTuple):
    """What stays the same from a run's first step to its last.

    Attributes:
      config: the config, complete and checked.
      workdir: the run's folder.
      task: the task's module.
      data: the dataset.
      mesh: the devices.
      model: the network.
      tx, schedule: the optimiser and its learning rate.
      prepare: the function that prepares a batch on the device.
      shapes: of the training batches, one entry for each bucket.
      abstract: shapes, dtypes and shardings of the training state.
      total: updates of the whole run.
    """

    config: ConfigDict
    workdir: Path
    task: ModuleType
    data: Data
    mesh: Mesh
    model: nn.Module
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    prepare: Callable
    shapes: list[dict[str, jax.ShapeDtypeStruct]]
    abstract: TrainState
    total: int

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.config.seed)

    @property
    def freeze(self) -> tuple[str, ...]:
        """Paths under which nothing is trained; a task's optimiser need not have them."""
        return tuple(self.config.optim.freeze) if "freeze" in self.config.optim else ()

    @property
    def eval_steps(self) -> int:
        """Updates between two evaluations."""
        return self.config.train.eval_every * self.data.steps_per_epoch

    def describe(self) -> dict[str, Any]:
        """What checkpoints say of the run's network and data."""
        data = self.data
        about = {"task": self.config.task, "model": self.config.model.to_dict(), **data.about}
        return about | {"num_train": data.num_train, "num_eval": data.num_eval}


def open_run(config: ConfigDict, workdir: str | Path) -> Run:
    """Makes all that a run needs, and checks it, before anything compiles; every process must call it."""
    with errors_on_all_processes():
        config = run_config.complete(config)
        task = tasks.load(config.task)
        run_config.check_config(config, task)
        data = task.open_dataset(**config.data)
        mesh = make_mesh(**config.mesh)
        model = task.create_model(**config.model)
        epochs, steps = config.train.epochs, config.train.steps
        total = task.num_epochs(config) * data.steps_per_epoch if steps is None else steps
        check_range("train", 1, below=2**31, steps=total)
        sizes = data.steps_per_epoch, epochs, data.batch_size, total
        tx, schedule = _made(task.make_optimizer, *sizes, **config.optim)
        prepare = _made(task.make_prepare, model, **config.mixing)
        run_config.check_sizes(config, data, mesh, model)
        shapes = loader.batch_shapes(data)
        for batch in shapes:
            jax.eval_shape(prepare, jax.random.key(0), batch)  # raises where the batch does not fit
        workdir = storage.run_path(workdir)
        run_config.check_workdir(config, workdir)
        abstract = abstract_state(task.init_variables, model, tx, mesh, ema=config.train.ema_decay is not None)
    run_config.check_processes(config, data)
    return Run(config, workdir, task, data, mesh, model, tx, schedule, prepare, shapes, abstract, total)


def _made(function: Callable, *args: Any, **options: Any) -> Any:
    """What a function makes; the same object for the same arguments, so that a second run need not trace its step."""
    pairs = ((key, tuple(value) if isinstance(value, list) else value) for key, value in options.items())
    return _made_once(function, args, tuple(sorted(pairs)))


@functools.lru_cache(maxsize=32)
def _made_once(function: Callable, args: tuple, options: tuple) -> Any:
    return function(*args, **dict(options))


@contextmanager
def kept_programs(run: Run) -> Iterator[None]:
    """Has JAX keep compiled programs for later starts, if the config wants it; afterwards, where it did before."""
    before = jax.config.jax_compilation_cache_dir
    if not run.config.compilation_cache or before is not None:
        yield
        return

    def use(path: str | None) -> None:
        jax.config.update("jax_compilation_cache_dir", path)
        compilation_cache.reset_cache()  # else JAX stays with the folder that it has

    folder = storage.program_cache(run.workdir)
    if not folder.is_relative_to(run.workdir):
        log.info("compiled programs are kept in %s", folder)
    use(str(folder))
    try:
        yield
    finally:
        use(before)


def compile_in_background(run: Run) -> Future[CompiledStep]:
    """Starts to compile the training step in another thread."""
    if len(run.shapes) > 1:
        log.info("compiling the training step for %d shapes of batches", len(run.shapes))
    compiler = ThreadPoolExecutor(1)
    future = compiler.submit(
        lambda: CompiledStep(
            run.abstract,
            run.shapes,
            run.key,
            model=run.model,
            tx=run.tx,
            schedule=run.schedule,
            prepare=run.prepare,
            loss=run.task.loss,
            mesh=run.mesh,
            ema_decay=run.config.train.ema_decay,
            ema_warmup=run.config.train.ema_warmup,
            freeze=run.freeze,
            accumulate=run.config.train.accumulate,
            group_size=run_config.group_size(run.model),
        )
    )
    compiler.shutdown(wait=False)  # a Ctrl-C should not wait for the compiler
    return future
