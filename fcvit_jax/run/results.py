"""The result of an evaluation: its numbers and rows, as tables and as JSON."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError


def parse_object(text: str) -> dict[str, Any]:
    """The object that JSON text holds.

    Raises:
      ValueError: the text is no JSON, is nested too deep, or holds something else.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    return value


def as_json(value: Any) -> str:
    """The JSON of a value, with null in place of each number that is not finite, since JSON has no such numbers."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(x) for key, x in value.items()}
        if isinstance(value, list | tuple):
            return [finite(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False)


def not_finite(metrics: Mapping[str, Any]) -> str:
    """Lists all metrics, such as "loss nan, lr 0.1", if one of their numbers is not finite; otherwise ""."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    if all(map(math.isfinite, numbers.values())):
        return ""
    return ", ".join(f"{name} {value}" for name, value in numbers.items())


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """What of an evaluation's result are numbers, not rows or None."""
    return {name: value for name, value in result.items() if value is not None and not isinstance(value, list)}


def best_metric(task: ModuleType, result: Collection[str]) -> str:
    """The metric whose maximum `best/` keeps: the task's BEST; where it has several, the first that a result has."""
    names = (task.BEST,) if isinstance(task.BEST, str) else task.BEST
    return next((name for name in names if name in result), names[-1])


def describe_rows(result: Mapping[str, Any]) -> str:
    """The rows of an evaluation's result as tables, or "": fractions in percent, "-" where there is no value."""
    tables = []
    for rows in (value for value in result.values() if isinstance(value, list) and value):
        cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
        first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
        for name, *values in cells:
            texts = (f"  {value:>{width}}" for value, width in zip(values, widths, strict=True))
            tables.append(f"{name:{first}}{''.join(texts)}")
    return "\n".join(tables)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def write_evaluation(workdir: Path, result: Mapping[str, Any]) -> None:
    """Writes `<workdir>/evaluation.json`, if the result has rows; only the first process writes.

    Args:
      workdir: an existing folder.
      result: "step", and what the task's `finish` returned.

    Raises:
      UserError: the file cannot be written.
    """
    if jax.process_index() != 0 or numbers(result) == dict(result):
        return
    path = workdir / "evaluation.json"
    try:
        storage.replace_text(path, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {storage.words(error)}. Fix this, then run the same command again."
        ) from error
