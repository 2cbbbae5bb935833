"""Datasets to batches: decoded, augmented and stacked in Grain workers, sharded over hosts.

A batch is a pure function of (seed, step): the step gives the epoch and the rows of that epoch's permutation, and every
example is augmented by a generator of its own, seeded by (seed, epoch, example). So a run resumes without any saved
state, and the number of workers and hosts changes nothing.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from fcvit_jax import augment
from fcvit_jax.data import sources
from fcvit_jax.errors import UserError, check_range

Split = sources.Records | sources.Files
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Data:
    """A dataset opened for training and evaluation, as `open_dataset` returns it.

    Attributes:
      train, eval: the examples of the two splits; None if synthetic, and train where it was not opened.
      num_train, num_eval: number of examples; num_train is 0 where train was not opened.
      class_names: one name per class, in the order of the labels.
      batch_size: images per step over all hosts.
      image_size: height and width of the images in pixels.
      workers, prefetch: decoding processes, and batches in each of their buffers, as in `open_dataset`.
      crop_pct: share of the resized image that evaluation crops.
      augmentation: keyword arguments of `augment.train_transform`.
    """

    train: Split | None
    eval: Split | None
    num_train: int
    num_eval: int
    class_names: tuple[str, ...]
    batch_size: int
    image_size: int
    workers: int
    prefetch: int
    crop_pct: float
    augmentation: dict[str, Any]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_train // self.batch_size

    @property
    def num_eval_batches(self) -> int:
        return -(-self.num_eval // self.batch_size)


def open_dataset(
    training: bool = True,  # not among the keywords, which are the keys of a config
    *,
    dataset: str,
    batch_size: int,
    data_dir: str = "~/tensorflow_datasets",
    image_size: int = 224,
    workers: int = 0,
    prefetch: int = 1,
    train_split: str = "train",
    eval_split: str = "validation",
    crop_pct: float = 0.9,
    crop_scale: Sequence[float] = (0.08, 1.0),
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    rand_augment: Sequence[float] | None = (2, 9.0, 0.5),
) -> Data:
    """Opens a dataset for `train_batches` and `eval_batches`; decodes no image yet.

    Example::

        data = open_dataset(dataset="digits", batch_size=128, image_size=32, rand_augment=None)
        for batch in train_batches(data, seed=0, start_step=0, num_steps=data.steps_per_epoch):
            batch["image"], batch["label"]                  # uint8 (128, 32, 32, 3), int32 (128,)

    Args:
      training: False: open the split for evaluation alone; the other need not be there.
      dataset: "digits"; a TFDS name such as "imagenet2012", with the features image and label; "folder:PATH", a folder
        with train/CLASS/*.jpg and val/CLASS/*.jpg (or validation/; also .jpeg, .png, .webp); or "synthetic", one batch
        of noise, for measuring the training step alone: as many images and classes as ImageNet, one batch to evaluate.
      batch_size: images per step over all hosts.
      data_dir: where TFDS keeps its data.
      image_size: height and width of the images in pixels.
      workers: decoding processes of this process; 0 decodes in a thread of it; -1 uses one fewer than the cores that
        this process may use, to leave one for training, but at least one.
      prefetch: batches in each of a worker's two buffers; it holds up to 2 * prefetch + 2 in shared memory. In an
        evaluation during training there are two such sets of workers.
      train_split, eval_split: TFDS splits, slices such as "train[:1%]" included.
      crop_pct: share of the resized image that evaluation crops.
      crop_scale, crop_ratio, flip, rand_augment: see `augment.train_transform`.

    Raises:
      UserError: a value is out of its range; or the dataset is unknown, not prepared, or not made of images and labels;
        the message says what to do.
    """
    check_range("data", 1, batch_size=batch_size, image_size=image_size, prefetch=prefetch)
    check_range("data", -1, workers=workers)
    augment.eval_geometry(image_size, image_size, image_size, crop_pct)  # refuses a crop_pct out of range
    augmentation = dict(crop_scale=crop_scale, crop_ratio=crop_ratio, flip=flip, rand_augment=rand_augment)
    augment.check_augmentation(**augmentation)

    if dataset == "synthetic":
        train, evaluation, class_names = None, None, tuple(f"class {i}" for i in range(1000))
        num_train, num_eval = 1_281_167, batch_size
    else:
        if dataset.startswith("folder:"):
            for key, split in {"train_split": train_split, "eval_split": eval_split}.items():
                if "[" in split:
                    logging.warning("data.%s=%s takes no part of a folder: all of its images are used.", key, split)
            folder = os.path.expanduser(dataset.removeprefix("folder:"))
            train, evaluation, class_names = sources.open_folder(folder, training)
        else:
            train, evaluation, class_names = sources.open_tfds(
                dataset, os.path.expanduser(data_dir), train_split if training else None, eval_split
            )
        num_train, num_eval = len(train or ()), len(evaluation)
    if training and num_train < batch_size:
        raise UserError(
            f"{dataset} has {num_train} training images, less than one batch: data.batch_size is {batch_size}"
        )
    return Data(
        train=train,
        eval=evaluation,
        num_train=num_train,
        num_eval=num_eval,
        class_names=class_names,
        batch_size=batch_size,
        image_size=image_size,
        workers=max(1, available_cores() - 1) if workers == -1 else workers,
        prefetch=prefetch,
        crop_pct=crop_pct,
        augmentation=augmentation,
    )


def available_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def train_batches(
    data: Data, seed: int, start_step: int, num_steps: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields this process's share of the training batches of steps start_step, ..., start_step + num_steps - 1.

    Args:
      data: from `open_dataset`.
      seed: of the order and the augmentation; not negative.
      start_step, num_steps: first step (its batch costs no more than any other) and number of batches.
      process_index, process_count: process p gets rows p * b, ..., (p + 1) * b - 1 of every global batch.

    Yields:
      {"image": uint8 (b, image_size, image_size, 3), "label": int32 (b,)}. Every epoch is a new permutation of the
      examples, cut to whole batches. `.close()` ends the workers.

    Raises:
      UserError: a batch cannot be split evenly; the data were opened for evaluation alone; an image cannot be read (the
        message names it); or a worker died.
    """
    if not data.num_train:
        raise UserError("These data were opened for evaluation alone.")
    rows = _rows(data, process_index, process_count)
    if data.train is None:
        noise = _noise(data, len(rows))
        return (noise for _ in range(num_steps))
    data = dataclasses.replace(data, eval=None)  # not needed by the workers, to which the rest is sent
    return _stream(data, functools.partial(_train_batch, data, seed, rows), start_step, start_step + num_steps)


def eval_batches(data: Data, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """Yields this process's share of the evaluation images, every example exactly once over all processes.

    Args:
      data: from `open_dataset`.
      process_index, process_count: as for `train_batches`.

    Yields:
      {"image": uint8 (b, image_size, image_size, 3), "label": int32 (b,), "mask": bool (b,)}: the same number of
      batches on every process, the last filled up with zeros where mask is False. `.close()` ends the workers.

    Raises:
      UserError: as for `train_batches`.
    """
    rows = _rows(data, process_index, process_count)
    if data.eval is None:
        noise = _noise(data, len(rows)) | {"mask": np.ones(len(rows), bool)}
        return (noise for _ in range(data.num_eval_batches))
    data = dataclasses.replace(data, train=None)  # not needed by the workers, to which the rest is sent
    return _stream(data, functools.partial(_eval_batch, data, rows), 0, data.num_eval_batches)


def _rows(data: Data, process_index: int, process_count: int) -> range:
    if data.batch_size % process_count:
        raise UserError(f"data.batch_size={data.batch_size} must be a multiple of the {process_count} processes")
    size = data.batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def _train_batch(data: Data, seed: int, rows: range, step: int) -> Batch:
    epoch, position = divmod(step, data.steps_per_epoch)
    indices = _epoch_order(seed, epoch, data.num_train)[position * data.batch_size :][rows.start : rows.stop].tolist()

    def transform(encoded, index):
        rng = np.random.default_rng([seed, epoch, index])
        return augment.train_transform(encoded, rng, data.image_size, **data.augmentation)

    return _load(data.train, indices, transform, len(rows), data.image_size)


def _eval_batch(data: Data, rows: range, number: int) -> Batch:
    start = number * data.batch_size
    indices = list(range(min(start + rows.start, data.num_eval), min(start + rows.stop, data.num_eval)))

    def transform(encoded, index):
        return augment.eval_transform(encoded, data.image_size, data.crop_pct)

    batch = _load(data.eval, indices, transform, len(rows), data.image_size)
    return batch | {"mask": np.arange(len(rows)) < len(indices)}


@functools.lru_cache(maxsize=2)  # a worker may hold batches of two epochs
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    # The last word keeps this stream apart from those of the examples: numpy ignores trailing zeros.
    return np.random.default_rng([seed, epoch, 0, 1]).permutation(num_examples)


def _load(
    split: Split, indices: list[int], transform: Callable[[bytes, int], np.ndarray], batch_size: int, image_size: int
) -> Batch:
    images = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
    labels = np.zeros(batch_size, np.int32)
    for row, (index, (encoded, label)) in enumerate(zip(indices, split.read(indices), strict=True)):
        try:
            images[row] = transform(encoded, index)
        except UserError as error:
            raise UserError(f"{split.describe(index)} is not a readable image: {error}") from error
        labels[row] = label
    return {"image": images, "label": labels}


def _stream(data: Data, load: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    if data.workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, which absl refuses outside of app.run
    threads = 0 if data.workers else 1
    batches = (
        grain.MapDataset.range(start, stop)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * data.prefetch))
        .mp_prefetch(grain.MultiprocessingOptions(data.workers, data.prefetch), worker_init_fn=_start_worker)
    )
    iterator = iter(batches)
    try:
        if data.workers:
            with _without_signals():
                first = list(itertools.islice(iterator, 1))
            while first:
                yield first.pop()  # kept nowhere, being in memory that a worker shares
        yield from iterator
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise UserError(
            f"A process that decodes images died: {str(error).split('. ')[0]}. What it printed, if anything, is above. "
            "If memory or shared memory ran out, set a lower --config.data.workers: each worker needs some of both. A "
            'script that trains needs a file of its own and `if __name__ == "__main__":`, since the workers import it.'
        ) from error
    finally:
        iterator.close()
        if data.workers:
            gc.collect()  # a cycle in Grain would hold the last batch in shared memory, at exit with a warning


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back from this thread, and for ever from processes that start inside.

    They reach all processes of a job; the parent still needs a batch or so, and ends its workers itself.
    """
    multiprocessing.resource_tracker.ensure_running()  # else started inside, which would let the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    del index, count
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns when it is gone, killed too; Grain's workers would stay for ever
    os._exit(1)


def _noise(data: Data, batch_size: int) -> Batch:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch_size, data.image_size, data.image_size, 3), np.uint8),
        "label": rng.integers(0, data.num_classes, batch_size, np.int32),
    }
