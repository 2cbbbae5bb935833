"""Reads the examples of a batch; in training others take the place of broken ones, where that is wanted."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from fcvit_jax.errors import Unreadable, UserError, log

if TYPE_CHECKING:
    from fcvit_jax.data.loader import Batch, Data, Example, Source

MOST_TRIES = 1000  # examples that are tried in place of a broken one


def read(
    data: "Data",
    source: "Source",
    indices: list[int],
    rng: Callable[[int], np.random.Generator | None] = lambda index: None,
) -> Iterator["Example"]:
    """Reads some examples of a source.

    Args:
      data: says how; see `loader.Data`.
      source: one of its two splits.
      indices: of the examples.
      rng: rng(index) gives the generator of an example of training; by default None, for evaluation.

    Raises:
      UserError: an example cannot be read, or is not as it must be; the message names it. `Unreadable` if it is broken.
    """
    for index, record in zip(indices, source.read(indices), strict=True):
        try:
            yield data.load_example(data, record, rng(index))
        except UserError as error:
            raise type(error)(f"{source.describe(index)}: {error}") from error


def read_for_training(
    data: "Data",
    indices: list[int],
    rng: Callable[[int], np.random.Generator],
    others: Callable[[int], np.ndarray],
) -> tuple[list["Example"], list[str]]:
    """Reads some training examples; with `data.on_broken="skip"` another takes the place of a broken one.

    Args:
      data: says how.
      indices: of the examples.
      rng: as in `read`.
      others: others(index) gives the examples that are tried in place of a broken one, in their order.

    Returns:
      The examples, and for every example that was broken, also in place of another, a line that names it.

    Raises:
      UserError: as in `read`; or neither an example nor any of the others can be read.
    """
    if data.on_broken == "error":
        try:
            return list(read(data, data.train, indices, rng)), []
        except Unreadable as error:
            raise UserError(f"{error} (data.on_broken=skip would put another example in its place)") from error

    def candidates(index: int) -> Iterator[int]:
        yield index
        yield from others(index).tolist()

    examples, broken = [], []
    for index in indices:
        reasons = []
        for candidate in candidates(index):
            try:
                # With the generator of the place, since the epoch has the other example with its own as well.
                examples += read(data, data.train, [candidate], lambda _, place=index: rng(place))
                break
            except Unreadable as error:
                reasons.append(str(error))
        else:
            raise UserError(f"{reasons[0]}; and none of {len(reasons) - 1} others in its place can be read")
        broken += reasons
    return examples, broken


def stack(examples: Iterable["Example"]) -> "Batch":
    """A batch of examples: their arrays by name, stacked."""
    examples = list(examples)
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def name_broken(named: set[str], loaded: tuple["Batch", list[str]]) -> "Batch":
    """Warns of what was broken, of each example once, and returns the batch.

    Args:
      named: what was warned of before; it is added to.
      loaded: a batch, and lines that name what was broken.
    """
    batch, broken = loaded
    for line in broken:
        if line not in named:
            named.add(line)
            message = "%s; another example takes its place (%d broken so far)"
            log.warning(message, line, len(named), extra={"of_process": True})
    return batch
