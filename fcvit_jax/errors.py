"""The one exception that is meant to be read by a user."""


class UserError(ValueError):
    """A mistake the user can mend: `main.py` and the tools print its message without a traceback and exit with 1."""
