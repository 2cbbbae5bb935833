"""Datasets to batches: read, decoded and stacked in Grain workers, sharded over processes; the same for every task.

A batch is a pure function of (seed, step): the step gives the epoch and the rows of that epoch's permutation, and every
example is augmented by a generator of its own, seeded by (seed, epoch, example). So a run resumes without any saved
state, and the number of workers and processes changes nothing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from fcvit_jax.data.reading import MOST_TRIES, name_broken, read, read_for_training, stack
from fcvit_jax.data.workers import available_cores, stream
from fcvit_jax.errors import UserError, check_range

Example = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]


class Source(Protocol):
    """One split of a dataset; it is pickled for the worker processes."""

    def __len__(self) -> int:
        """The number of examples."""

    def read(self, indices: Sequence[int]) -> Iterable[Any]:
        """The records of some examples, as `load_example` takes them."""

    def describe(self, index: int) -> str:
        """Names an example in error messages."""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A source of `count` synthetic examples, whose records are their numbers."""

    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Sequence[int]:
        return indices

    def describe(self, index: int) -> str:
        return f"synthetic example {index}"


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A dataset opened for training and evaluation, as the task's `open_dataset` returns it.

    Attributes:
      load_example: load_example(data, record, rng) -> arrays by name; a function of a module, so that workers find it.
        `rng` is the example's generator in training, and None in evaluation. Examples of a bucket have equal shapes.
        It raises `Unreadable` for an example that is broken.
      train, eval: the examples of the two splits; train is None where it was not opened.
      class_names: one name per class, in the order of the labels.
      batch_size: examples per step over all processes.
      workers: decoding processes of this process; 0: decode in a thread of it.
      prefetch: batches in each of a worker's two buffers.
      on_broken: what a training example that cannot be read does: "error" ends the run, "skip" puts another example of
        the epoch (and of the bucket) in its place, which (seed, epoch, example) alone choose. A warning names it.
      options: what `load_example` needs besides the record.
      about: what the task keeps in checkpoints beside the weights, as JSON can hold it.
      train_buckets, eval_buckets: (examples,) integers from 0 on, none left out; a batch holds examples of one bucket,
        since their shapes differ between buckets. None: all examples have one shape.
      constant: every batch is the first one, made once: for measuring a step without its input.
    """

    load_example: Callable[["Data", Any, np.random.Generator | None], Example]
    train: Source | None
    eval: Source
    class_names: tuple[str, ...]
    batch_size: int
    workers: int = 0
    prefetch: int = 1
    on_broken: str = "error"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_buckets: np.ndarray | None = None
    eval_buckets: np.ndarray | None = None
    constant: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_train(self) -> int:
        """Number of training examples; 0 where train was not opened."""
        return 0 if self.train is None else len(self.train)

    @property
    def num_eval(self) -> int:
        return len(self.eval)

    @functools.cached_property  # the loop asks at every step
    def steps_per_epoch(self) -> int:
        if self.train_buckets is None:
            return self.num_train // self.batch_size
        return sum(-(-count // self.batch_size) for count in np.bincount(self.train_buckets).tolist())

    @property
    def num_eval_batches(self) -> int:
        return len(_eval_order(self))


def check_loading(batch_size: int, workers: int, prefetch: int, on_broken: str = "error") -> int:
    """Checks what every dataset is opened with, and returns the number of workers.

    Args:
      batch_size, prefetch, on_broken: as in `Data`.
      workers: likewise; -1: one fewer than the cores that this process may use, but at least one.

    Raises:
      UserError: a number is out of its range, or `on_broken` is neither "error" nor "skip".
    """
    if on_broken not in ("error", "skip"):
        raise UserError(f"data.on_broken={on_broken!r} must be 'error' or 'skip'.")
    check_range("data", 1, below=2**24, batch_size=batch_size)
    check_range("data", 1, below=1024, prefetch=prefetch)
    check_range("data", -1, below=max(64, 8 * available_cores()), workers=workers)
    return max(1, available_cores() - 1) if workers == -1 else workers


def check_one_batch(dataset: str, train: Source, batch_size: int) -> None:
    """Raises a UserError if the training images of a dataset do not fill one batch."""
    if len(train) < batch_size:
        raise UserError(
            f"{dataset} has {len(train)} training images, less than one batch: data.batch_size is {batch_size}"
        )


def train_batches(
    data: Data, seed: int, start_step: int, num_steps: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields this process's share of the training batches of steps start_step, ..., start_step + num_steps - 1.

    Example::

        data = classification.open_dataset(dataset="digits", batch_size=128, image_size=32, rand_augment=None)
        for batch in train_batches(data, seed=0, start_step=0, num_steps=data.steps_per_epoch):
            batch["image"], batch["label"]                  # uint8 (128, 32, 32, 3), int32 (128,)

    Args:
      data: from a task's `open_dataset`.
      seed: of the order and the augmentation; not negative.
      start_step, num_steps: first step (its batch costs no more than any other) and number of batches.
      process_index, process_count: process p gets rows p * b, ..., (p + 1) * b - 1 of every global batch.

    Yields:
      The examples of `data.load_example`, stacked: arrays (b, ...) by name. Every epoch is a new permutation of the
      examples, cut to whole batches; with buckets, each bucket is filled up with examples of its own instead, and the
      batches are shuffled. `.close()` ends the workers.

    Raises:
      UserError: a batch cannot be split evenly; the data were opened for evaluation alone; an example cannot be read
        (the message names it); or a worker died.
    """
    if data.train is None:
        raise UserError("These data were opened for evaluation alone.")
    rows = _rows(data, process_index, process_count)
    load = functools.partial(_train_batch, _without(data, "eval"), seed, rows)
    return _batches(data, load, start_step, start_step + num_steps, functools.partial(name_broken, set()))


def eval_batches(data: Data, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """Yields this process's share of the evaluation examples, every example exactly once over all processes.

    Args:
      data: from a task's `open_dataset`.
      process_index, process_count: as for `train_batches`.

    Yields:
      As `train_batches`, with "mask" (b,) bool beside the other arrays: False for rows that only fill up the last batch
      of a bucket. The number of batches is the same on every process. `.close()` ends the workers.

    Raises:
      UserError: as for `train_batches`.
    """
    rows = _rows(data, process_index, process_count)
    load = functools.partial(_eval_batch, _without(data, "train"), rows)
    return _batches(data, load, 0, data.num_eval_batches, lambda batch: batch)


def batch_shapes(data: Data, training: bool = True) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """The shapes and dtypes of the global batches, one entry for each bucket, from one example of each.

    Raises:
      UserError: that example cannot be read.
    """
    buckets = data.train_buckets if training else data.eval_buckets
    firsts = [0] if buckets is None else np.unique(buckets, return_index=True)[1].tolist()
    shapes = []
    for index in firsts:
        examples = _train_examples(data, 0, 0, [index])[0] if training else read(data, data.eval, [index])
        example = stack(examples)
        shapes.append({k: jax.ShapeDtypeStruct((data.batch_size, *x.shape[1:]), x.dtype) for k, x in example.items()})
    return shapes


def process_shapes(batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one process's share of a global batch."""
    count = jax.process_count()
    return {k: jax.ShapeDtypeStruct((x.shape[0] // count, *x.shape[1:]), x.dtype) for k, x in batch.items()}


def train_bucket(data: Data, seed: int, step: int) -> int:
    """Which entry of `batch_shapes` the training batch of a step has."""
    if data.train_buckets is None:
        return 0
    epoch, position = divmod(step, data.steps_per_epoch)
    first = train_order(data, seed, epoch)[position, 0]
    return int(data.train_buckets[first])


def eval_bucket(data: Data, number: int) -> int:
    """Which entry of `batch_shapes` an evaluation batch has."""
    if data.eval_buckets is None:
        return 0
    return int(data.eval_buckets[_eval_order(data)[number][0]])


def _without(data: Data, split: str) -> Data:
    """The data without a split that workers do not need: what they get is pickled."""
    return dataclasses.replace(data, **{split: None, f"{split}_buckets": None})


def _rows(data: Data, process_index: int, process_count: int) -> range:
    if data.batch_size % process_count:
        raise UserError(f"data.batch_size={data.batch_size} must be a multiple of the {process_count} processes")
    size = data.batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


@functools.lru_cache(maxsize=2)  # a worker may hold batches of two epochs
def train_order(data: Data, seed: int, epoch: int) -> np.ndarray:
    """The examples of an epoch's batches, (steps_per_epoch, batch_size)."""
    # The last number makes this seed differ from those of the examples, since NumPy ignores trailing zeros.
    rng = np.random.default_rng([seed, epoch, 0, 1])
    order, size = rng.permutation(data.num_train), data.batch_size
    if data.train_buckets is None:
        return order[: data.steps_per_epoch * size].reshape(-1, size)
    members = [order[data.train_buckets[order] == bucket] for bucket in range(data.train_buckets.max() + 1)]
    batches = np.concatenate([np.resize(m, (-(-len(m) // size), size)) for m in members])
    return rng.permutation(batches)


@functools.lru_cache(maxsize=2)
def _eval_order(data: Data) -> list[np.ndarray]:
    """The examples of the evaluation's batches, at most batch_size each."""
    size = data.batch_size
    if data.eval_buckets is None:
        members = [np.arange(data.num_eval)]
    else:
        members = [np.flatnonzero(data.eval_buckets == bucket) for bucket in range(data.eval_buckets.max() + 1)]
    return [m[start : start + size] for m in members for start in range(0, len(m), size)]


def _train_batch(data: Data, seed: int, rows: range, step: int) -> tuple[Batch, list[str]]:
    """A batch, and what could not be read for it."""
    epoch, position = divmod(step, data.steps_per_epoch)
    indices = train_order(data, seed, epoch)[position][rows.start : rows.stop].tolist()
    examples, broken = _train_examples(data, seed, epoch, indices)
    return stack(examples), broken


def _train_examples(data: Data, seed: int, epoch: int, indices: list[int]) -> tuple[list[Example], list[str]]:
    def generator(index: int) -> np.random.Generator:
        return np.random.default_rng([seed, epoch, index])

    def others(index: int) -> np.ndarray:
        order = train_order(data, seed, epoch).ravel()
        if data.train_buckets is not None:
            order = order[data.train_buckets[order] == data.train_buckets[index]]
        # As above, the last number makes this seed another one.
        return np.random.default_rng([seed, epoch, index, 2]).choice(order, min(len(order), MOST_TRIES), replace=False)

    return read_for_training(data, indices, generator, others)


def _eval_batch(data: Data, rows: range, number: int) -> Batch:
    order = _eval_order(data)[number]
    indices = order[rows.start : rows.stop].tolist()
    # A process without rows of its own still needs one example, for the shapes.
    batch = stack(read(data, data.eval, indices or [int(order[0])]))
    filled = np.minimum(np.arange(len(rows)), max(len(indices), 1) - 1)
    return {name: x[filled] for name, x in batch.items()} | {"mask": np.arange(len(rows)) < len(indices)}


def _batches(
    data: Data, load: Callable[[int], Any], start: int, stop: int, received: Callable[[Any], Batch]
) -> Iterator[Batch]:
    if data.constant:
        yield from itertools.repeat(received(load(0)), stop - start)
    else:
        yield from stream(load, start, stop, received, data.workers, data.prefetch)
