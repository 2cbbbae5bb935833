"""The figure of the curves of runs: loss, learning rate and a metric over epochs."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError
from fcvit_jax.figures import COLOURS, literal
from fcvit_jax.run.results import parse_object

_VALIDATION = {"linestyle": "--", "marker": "o", "markersize": 4}


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl.

    Raises:
      UserError: there is no such file, it is empty, or a line cannot be read. The last line may be incomplete, since a
        kill can cut it off.
    """
    path = workdir / "metrics.jsonl"
    try:
        lines = storage.read_text(path, errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {storage.words(error)}; give folders of runs.") from error
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(parse_object(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
    if not all("epoch" in line for line in metrics):
        raise UserError(f"{path} is of another program: its lines have no epoch.")
    for line in metrics:
        for name, value in line.items():
            if not isinstance(value, int | float | None):
                raise UserError(f"{path} is damaged: {name} is {value!r:.40}, not a number.")
    if not metrics:
        raise UserError(f"{path} is empty: the run has reported nothing yet.")
    return metrics


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, float]]], metric: str | None = None) -> Figure:
    """Draws loss, learning rate and a metric over epochs.

    Args:
      runs: lines of metrics.jsonl by the run's name.
      metric: a fraction that evaluation gives, such as "top1"; None: the first that it gives besides the loss.
    """
    if metric is None:
        evaluated = (
            name.removeprefix("eval/")
            for lines in runs.values()
            for line in lines
            for name in line
            if name.startswith("eval/") and name not in ("eval/loss", "eval/count")
        )
        metric = next(evaluated, "not evaluated yet")
    figure = Figure(figsize=(12, 4.4 + 0.25 * len(runs)), dpi=120, layout="constrained")
    loss, rate, quality = figure.subplots(1, 3)
    handles, labels = [], []  # passed to the legend directly, which otherwise leaves out names that begin with "_"
    for (name, metrics), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
        epochs, losses = _points(metrics, "train/loss")
        loss.plot(epochs, losses, ".", color=colour, markersize=5, alpha=0.35, markeredgewidth=0)
        loss.plot(epochs, smoothed(losses), color=colour, linewidth=1.6)
        loss.plot(*_points(metrics, "eval/loss"), color=colour, **_VALIDATION)
        rate.plot(*_points(metrics, "train/lr"), color=colour)
        epochs, values = _points(metrics, f"eval/{metric}")
        quality.plot(epochs, [100 * value for value in values], color=colour, **_VALIDATION)
        best = f"best {metric} {100 * max(values):.2f} %" if values else "not evaluated yet"
        handles += quality.plot((), (), color=colour)
        labels.append(literal(f"{name}: {best}"))
    figure.legend(handles, labels, loc="outside lower center", fontsize=10)
    keys = [
        Line2D((), (), color="0.4", marker=".", linestyle="", alpha=0.5, label="training batches, as augmented"),
        Line2D((), (), color="0.4", linewidth=1.6, label="smoothed"),
        Line2D((), (), color="0.4", **_VALIDATION, label="validation"),
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=9, frameon=False)
    for axis, title, unit in ((loss, "Loss", ""), (rate, "Learning rate", ""), (quality, metric, "%")):
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.grid(alpha=0.3)
    return figure


def _points(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """The epochs that have a value, and the values."""
    lines = [line for line in metrics if line.get(key) is not None]  # null: it was not finite
    return [line["epoch"] for line in lines], [line[key] for line in lines]


def smoothed(values: Sequence[float]) -> np.ndarray:
    """The mean of every value and its neighbours, by Gaussian weights.

    Mixing makes the losses of single batches jump, however well a network learns. The weights' standard deviation is a
    twentieth of the curve, and some two values where there are few.
    """
    places, count = np.arange(len(values)), len(values)
    deviation = max(count / 20, min(2, count / 8), 0.1)
    weights = np.exp(-0.5 * ((places[:, None] - places) / deviation) ** 2)
    return weights @ np.asarray(values) / weights.sum(1)
