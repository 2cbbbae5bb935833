"""What users are told: the exception for mistakes that they can fix, and the log."""

import contextlib
import errno
import logging
import math
import numbers
import os
import re
import sys
import traceback
from collections.abc import Iterator

import jax

MAX_IMAGE_SIZE = 8192  # pixels a side; beyond it memory runs out long before anything is computed

_LESS_MEMORY = "A smaller --config.data.batch_size or a larger train.accumulate needs less; so do fewer data.workers."

# Everything that a run says goes here; a library says nothing more until its user installs a handler.
log = logging.getLogger("fcvit_jax")


class UserError(ValueError):
    """A mistake the user can fix: `main.py` and the tools print its message without a traceback and exit with 1."""


class Unreadable(UserError):
    """An example is broken or gone: in training, `data.on_broken="skip"` takes another in its place."""


def printable(text: str) -> str:
    """Text in which what is no character to print, such as the start of a command to a terminal, is escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class Stopped(KeyboardInterrupt):
    """A signal has ended the work before it was done.

    Args:
      number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class _AboveBar(logging.Handler):
    """Prints records above a progress bar: warnings on stderr, all others on stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        if jax.distributed.is_initialized() and jax.process_index() > 0 and not getattr(record, "of_process", False):
            return  # the first process speaks for all, but of what is only of one
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        if stream is None:  # it was closed or redirected to nothing
            return
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = printable(prefix + self.format(record))
        try:
            try:
                from tqdm import tqdm

                tqdm.write(text, file=stream)
            except ImportError:  # the networks alone do not need tqdm
                print(text, file=stream)
            stream.flush()  # otherwise a file gets the line much later, and not at all if the run is killed
        except BrokenPipeError:
            raise
        except OSError:  # a full disk, or a terminal that is gone: the run goes on, and its record has the numbers
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def show_log() -> None:
    """Prints what fcvit_jax logs, from level INFO up; `main.py` and the tools call it.

    Example::

        fcvit_jax.show_log()
        fcvit_jax.train_and_evaluate(config, "runs/digits")

    A program with a logging configuration of its own does not need it: the logger is `logging.getLogger("fcvit_jax")`.
    """
    if not any(isinstance(handler, _AboveBar) for handler in log.handlers):
        log.addHandler(_AboveBar())
        log.setLevel(logging.INFO)
        log.propagate = False  # the root logger of absl would print every line again


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Runs a command-line tool: shows its log, and ends it without a traceback.

    The exit status is 1 with a message on a `UserError`, if memory runs out or if the output cannot be written, 130 on
    Ctrl-C, 128 and its number on another signal, and 141 on a broken pipe (`| head`). Names of files and classes that
    are no UTF-8 are printed with escapes.
    """
    _open_closed_streams()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    show_log()
    try:
        yield
        _flush()
    except UserError as error:
        sys.exit(printable(f"error: {error}"))
    except MemoryError as error:
        sys.exit(f"error: memory ran out: {error}\n{_LESS_MEMORY}")
    except (RuntimeError, AssertionError) as error:
        if found := re.search("RESOURCE_EXHAUSTED: .*", str(error)):  # of a device, whose memory JAX manages
            sys.exit(f"error: memory ran out: {found[0]}\n{_LESS_MEMORY}")
        if not traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
            raise
        text, platforms = str(error).partition("\n")[0] or "there are none", os.environ.get("JAX_PLATFORMS", "")
        sys.exit(f"error: JAX cannot use its devices: {text}\nIs JAX_PLATFORMS={platforms} right?")
    except KeyboardInterrupt as error:
        _flush()
        os._exit(128 + getattr(error, "number", 2))  # a normal exit during compilation may crash the process
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE):
            raise
        if error.errno != errno.EPIPE:
            sys.stdout = None  # Python would try again at its end
            sys.exit(f"error: the output cannot be written: {error.strerror}.")
        try:
            print(flush=True)  # fails again if stdout is the broken pipe
        except BrokenPipeError:
            os._exit(141)  # a normal exit would try to write the rest
        raise


def _open_closed_streams() -> None:
    """Connects standard streams that were closed with nothing, since the next files to be opened get their numbers.

    What a library prints would be written into these files.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere == number:
                os.set_inheritable(number, True)
            setattr(sys, name, open(nowhere, "w" if number else "r"))  # noqa: SIM115


def _flush() -> None:
    if sys.stdout is not None:  # it may have been closed
        sys.stdout.flush()


def check_range(section: str, low: float, below: float = math.inf, **values: float | None) -> None:
    """Checks numbers of a config.

    Args:
      section: the part of the config that they are from.
      low: the least that they may be.
      below: what they must be less than.
      **values: the numbers by their keys.

    Raises:
      UserError: naming the first that is no number or out of its range.
    """
    for key, value in values.items():
        if value is not None and (not isinstance(value, numbers.Real) or math.isnan(value)):
            raise UserError(f"{section}.{key}={value!r} must be a number.")
        if value is None or not low <= value < below:
            limit = f" and less than {below}" if below < math.inf else " and finite" if value == math.inf else ""
            raise UserError(f"{section}.{key}={value} must be at least {low}{limit}.")
