"""The figure of the curves of runs: loss, learning rate and a metric over epochs."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError
from fcvit_jax.figures import COLOURS, literal
from fcvit_jax.run.results import parse_object


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
    figure = Figure(figsize=(12, 4.2 + 0.25 * len(runs)), dpi=120, layout="constrained")
    loss, rate, quality = figure.subplots(1, 3)
    handles, labels = [], []  # passed to the legend directly, which otherwise leaves out names that begin with "_"
    for (name, metrics), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):

        def curve(axis, key, scale=1.0, metrics=metrics, **style):
            points = [(line["epoch"], line[key] * scale) for line in metrics if key in line]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), **style)
            return [value for _, value in points]

        curve(loss, "train/loss", color=colour, linewidth=1.2)
        curve(loss, "eval/loss", color=colour, linestyle="--", marker="o", markersize=4)
        curve(rate, "train/lr", color=colour)
        values = curve(quality, f"eval/{metric}", 100.0, color=colour, marker="o", markersize=4)
        best = f"best {metric} {max(values):.2f} %" if values else "not evaluated yet"
        handles += quality.plot((), (), color=colour)
        labels.append(literal(f"{name}: {best}"))
    loss.plot((), (), color="0.4", label="training (augmented)")
    loss.plot((), (), color="0.4", linestyle="--", marker="o", markersize=4, label="validation")
    loss.legend(fontsize=9)
    figure.legend(handles, labels, loc="outside lower center", fontsize=10)
    for axis, title, unit in ((loss, "Loss", "cross-entropy"), (rate, "Learning rate", ""), (quality, metric, "%")):
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.grid(alpha=0.3)
    return figure
