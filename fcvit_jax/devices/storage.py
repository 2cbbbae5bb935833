"""The storage of runs: every other module reads and writes a run's folder through these functions.

They take paths from `run_path` or `as_path`, and raise OSError, which `words` puts into one line.
"""

import os
import re
import shutil
from pathlib import Path
from typing import TextIO

from fcvit_jax.errors import UserError, log

_LONGEST = 200  # characters: what the names of a run's files add to that of its folder, at most


def as_path(path: str | Path) -> Path:
    """The path, with ~ expanded.

    Raises:
      UserError: it is an address, such as gs://...
    """
    if re.match(r"\w\w+:/", str(path)):  # a Path has one slash of the two
        raise UserError(f"{path} must be a path: mount the bucket, for example with gcsfuse, and give its folder.")
    return Path(path).expanduser()


def run_path(path: str | Path) -> Path:
    """The absolute path of a run's folder or of something in it, which need not exist.

    Raises:
      UserError: it is empty, an address that no storage here knows, or a name that the file system does not take.
    """
    if not str(path):
        raise UserError("The path of the run's folder is empty.")
    path = as_path(path).absolute()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # which whoever needs it says
    except (OSError, ValueError) as error:  # too long, not allowed, or no name at all
        raise UserError(f"{str(path)[:300]} cannot be used: {getattr(error, 'strerror', None) or error}.") from error
    return path


def check_name(path: Path) -> None:
    """Checks that checkpoints can lie in a folder, which need not exist.

    Raises:
      UserError: its name is no UTF-8, which Orbax and TensorStore need, or too long for files inside it.
    """
    if os.fsencode(str(path)) != str(path).encode(errors="replace"):  # what Python cannot decode has become surrogates
        raise UserError(f"{path} is no name in UTF-8: choose another, or set LC_ALL=C.UTF-8 if it is one.")
    run_path(path / ("x" * _LONGEST))


def words(error: OSError) -> str:
    """What went wrong, in one line."""
    return error.strerror or str(error).partition("\n")[0] or type(error).__name__


def is_file(path: Path) -> bool:
    """Whether there is a file of this name."""
    return path.is_file()


def is_folder(path: Path) -> bool:
    """Whether there is a folder of this name."""
    return path.is_dir()


def names(folder: Path) -> list[str]:
    """The names of what is in a folder, which need not exist."""
    return [path.name for path in folder.glob("*")]


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file; `errors` says what becomes of bytes that are no UTF-8, as for `open`.

    Raises:
      UnicodeDecodeError: there are such bytes, and errors is "strict".
    """
    return path.read_bytes().decode(errors=errors)


def replace_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are not there."""
    path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it; it need not exist."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:  # another process was faster
        pass


def move(path: Path, target: Path) -> None:
    """Moves a folder to a place where nothing is yet."""
    path.rename(target)


def unfinished_saves(folder: Path) -> list[Path]:
    """What is left in a folder of checkpoints of saves that were killed."""
    return list(folder.glob("*.orbax-checkpoint-tmp*"))


def program_cache(workdir: Path) -> Path:
    """Where JAX keeps the programs that it compiles for a run."""
    return workdir / "compilation_cache"


class Lock:
    """A mark that one run at a time can hold; the system releases it however that run's process ends.

    Args:
      workdir: the run's folder.

    Raises:
      UserError: another run holds it, or the folder cannot be written.
    """

    def __init__(self, workdir: Path):
        import fcntl  # not on Windows, where the tools that only read work all the same

        try:
            self._file: TextIO = (workdir / ".lock").open("w")
        except OSError as error:
            raise UserError(f"--workdir={workdir} cannot be written: {words(error)}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.close()
            raise UserError(f"Another run is under way in {workdir}: stop it, or choose another --workdir.") from error
        except OSError as error:
            log.warning("%s has no locks (%s): make sure that no second run uses the folder.", workdir, words(error))

    def check(self) -> None:
        """Raises UserError if another run has taken the folder over, which a local disk does not allow."""

    def close(self) -> None:
        """Releases the folder."""
        self._file.close()


class GrowingFiles:
    """Files in a run's folder to which is written again and again, such as a log.

    Args:
      workdir: the run's folder.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir

    def local(self, name: str) -> Path:
        """The local path under which to write a file or a folder of the run's folder."""
        return self._workdir / name

    def keep(self) -> None:
        """Makes sure that what was written is in the run's folder."""

    def close(self) -> None:
        """Keeps what was written."""
