"""The figures of the tools, and what all of them use: colours, text and files."""

from pathlib import Path

from matplotlib.figure import Figure

from fcvit_jax.errors import UserError

# Okabe and Ito's colours, which people with any colour vision can tell apart. Yellow is left out: too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def literal(text: str) -> str:
    """Escapes text for matplotlib, which reads text between two $ as a formula, and refuses what is not UTF-8."""
    return text.replace("$", r"\$").encode(errors="replace").decode()


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
