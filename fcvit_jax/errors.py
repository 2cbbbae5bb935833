"""The exception for mistakes that a user can fix, and what most often raises or shows it."""

import contextlib
import math
import os
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake the user can fix: `main.py` and the tools print its message without a traceback and exit with 1."""


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends a command-line tool without a traceback: status 1 and a message on a `UserError`, 130 on Ctrl-C, 141 where
    nobody reads its output any more, as after `| head`.

    Names of files and classes that are no UTF-8 are printed with escapes.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(130)  # a normal exit during compilation may crash the process
    except BrokenPipeError:
        try:
            print(flush=True)  # is it that of the output?
        except BrokenPipeError:
            os._exit(141)  # a normal exit would try to write the rest
        raise


def check_range(section: str, low: float, below: float = math.inf, **values: float | None) -> None:
    """Checks numbers of a config.

    Args:
      section: the part of the config that they are from.
      low: the least that they may be.
      below: what they must be less than.
      **values: the numbers by their keys.

    Raises:
      UserError: naming the first that is None or out of its range.
    """
    for key, value in values.items():
        if value is None or not low <= value < below:
            limit = f" and less than {below}" if below < math.inf else " and finite" if value == math.inf else ""
            raise UserError(f"{section}.{key}={value} must be at least {low}{limit}.")
