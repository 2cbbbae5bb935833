"""The figures of the tools, and what all of them use: colours, text and files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fcvit_jax.errors import UserError

# Okabe and Ito's colours, which people with any colour vision can tell apart. Yellow is left out: too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MAX_CLASSES = 40  # of a legend; the rest is counted


def literal(text: str) -> str:
    """Escapes text for matplotlib, which reads text between two $ as a formula, and refuses what is not UTF-8."""
    return text.replace("$", r"\$").encode(errors="replace").decode()


def class_patches(classes: Sequence[int], class_names: Sequence[str], colours: np.ndarray) -> list[Patch]:
    """What a legend shows for some classes, whose colours are (all classes, 3) uint8."""
    shown = [Patch(facecolor=colours[c] / 255, edgecolor="0.4", label=class_names[c]) for c in classes[:MAX_CLASSES]]
    rest = len(classes) - MAX_CLASSES
    return [*shown, Patch(facecolor="none", label=f"and {rest} more classes")] if rest > 0 else shown


def legend_columns(handles: Sequence[Patch], width: float) -> int:
    """How many columns a legend has under a figure of a width in inches, so that its longest label finds room."""
    longest = max(len(handle.get_label()) for handle in handles)
    return max(min(int(15 * width) // (longest + 8), len(handles)), 1)  # 15 letters an inch, 8 of them for the patch


def legend_height(handles: Sequence[Patch], width: float) -> float:
    """Its height in inches."""
    return 0.25 + 0.2 * -(-len(handles) // legend_columns(handles, width))


def legend_below(figure: Figure, handles: Sequence[Patch]) -> None:
    """Puts a legend under all of a figure, whose height must have room for it."""
    columns = legend_columns(handles, figure.get_size_inches()[0])
    # Given as they are: a legend would leave out labels that begin with "_".
    texts = [literal(handle.get_label()) for handle in handles]
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=8)


def check_format(path: Path) -> None:
    """Raises a UserError if pictures with this file ending cannot be written."""
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"{path}: its ending must be one of .{', .'.join(formats)}.")


def save(figure: Figure, path: Path) -> None:
    """Writes a picture, and makes its folder if there is none; raises a UserError if it cannot be written."""
    path = path.expanduser()
    check_format(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
