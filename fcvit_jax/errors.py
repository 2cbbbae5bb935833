"""The exception for mistakes that a user can fix, and the check of a number's range, which raises it."""

import math


class UserError(ValueError):
    """A mistake the user can fix: `main.py` and the tools print its message without a traceback and exit with 1."""


def check_range(section: str, low: float, below: float = math.inf, **values: float) -> None:
    """Checks numbers of a config.

    Args:
      section: the part of the config that they are from.
      low: the least that they may be.
      below: what they must be less than.
      **values: the numbers by their keys.

    Raises:
      UserError: naming the first that is out of its range.
    """
    for key, value in values.items():
        if not low <= value < below:
            limit = f" and less than {below}" if below < math.inf else "" if math.isfinite(value) else " and finite"
            raise UserError(f"{section}.{key}={value} must be at least {low}{limit}.")
