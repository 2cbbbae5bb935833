"""The storage of runs: every other module reads and writes a run's folder through these functions.

They take paths from `run_path` or `as_path`: of a local disk, or gs://BUCKET/FOLDER, for which gcs.py and
gcs_run.py have what differs.
They raise OSError, which `words` puts into one line, and UserError where a bucket needs something from the user.
"""

import os
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import TextIO

from fcvit_jax.errors import UserError, log

_LONGEST = 200  # characters: what the names of a run's files add to that of its folder, at most


def is_local(path: str | Path) -> bool:
    """Whether a path is on a local disk, not in a bucket."""
    return not str(path).startswith("gs:/")  # a pathlib.Path has one slash of the two


def _remote(path: str | Path) -> ModuleType | None:
    """The module for the bucket that a path is in; None: it is on a local disk."""
    if is_local(path):
        return None
    from fcvit_jax.devices import gcs  # needs packages that a local run does not

    return gcs


def as_path(path: str | Path) -> Path:
    """The path, with ~ expanded; for a bucket, one of `etils.epath`, which has the methods of a path.

    Raises:
      UserError: it is an address that is not known here, such as s3://..., or no folder in a bucket.
    """
    if remote := _remote(path):
        return remote.as_path(str(path))
    if re.match(r"\w\w+:/", str(path)):
        raise UserError(f"{path} must be a path or gs://BUCKET/FOLDER; mount other buckets, and give the folder.")
    return Path(path).expanduser()


def run_path(path: str | Path) -> Path:
    """The absolute path of a run's folder or of something in it, which need not exist.

    Raises:
      UserError: as `as_path`; or it is empty, or a name that the file system does not take.
    """
    if not str(path):
        raise UserError("The path of the run's folder is empty.")
    path = as_path(path)
    if not is_local(path):
        return path
    path = path.absolute()
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
    if is_local(path):
        run_path(path / ("x" * _LONGEST))


def local_path(path: str | Path) -> Path:
    """The path, with ~ expanded, of what must be on a local disk.

    Raises:
      UserError: it is in a bucket.
    """
    path = as_path(path)
    if not is_local(path):
        raise UserError(
            f"{path} must be on a local disk. To copy from a bucket to a disk, or back: gcloud storage cp -r FROM TO"
        )
    return path


def is_fault(error: BaseException) -> bool:
    """Whether an error comes from the storage, not from a bug. Those of Google's library for Python are no OSError."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("google.api_core.", "google.auth."))


def words(error: OSError) -> str:
    """What went wrong, in one line."""
    return error.strerror or str(error).partition("\n")[0] or type(error).__name__


def is_file(path: Path) -> bool:
    """Whether there is a file of this name."""
    if remote := _remote(path):
        return remote.is_file(path)
    return path.is_file()


def is_folder(path: Path) -> bool:
    """Whether there is a folder of this name."""
    return path.is_dir()


def names(folder: Path) -> list[str]:
    """The names of what is in a folder, which need not exist."""
    if remote := _remote(folder):
        return remote.names(folder)
    return [path.name for path in folder.glob("*")]


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file; `errors` says what becomes of bytes that are no UTF-8, as for `open`.

    Raises:
      UnicodeDecodeError: there are such bytes, and errors is "strict".
    """
    return path.read_bytes().decode(errors=errors)


def replace_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    if remote := _remote(path):
        return remote.replace_text(path, text)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are not there. A bucket has none of their own."""
    if is_local(path):
        path.mkdir(parents=True, exist_ok=True)


def check_access(folder: Path) -> None:
    """Finds out whether a bucket allows all that a run does. What a disk does not allow shows when it is used.

    Raises:
      UserError: it does not; the message says what to grant.
    """
    if remote := _remote(folder):
        remote.check_access(folder)


def remove(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it; it need not exist."""
    if remote := _remote(path):
        return remote.remove(path)
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:  # another process was faster
        pass


def move(path: Path, target: Path) -> None:
    """Moves a checkpoint's folder to a place where nothing is yet."""
    if remote := _remote(path):
        return remote.move(path, target)
    path.rename(target)


def finished_saves(folder: Path) -> list[Path]:
    """The checkpoints in a folder, which need not exist; their names are steps."""
    steps, remote = [folder / name for name in names(folder) if name.isdigit()], _remote(folder)
    return [step for step in steps if remote.is_finished(step)] if remote else steps


def unfinished_saves(folder: Path) -> list[Path]:
    """What is left in a folder of checkpoints of saves that were killed."""
    if is_local(folder):
        return list(folder.glob("*.orbax-checkpoint-tmp*"))
    finished = finished_saves(folder)
    return [folder / name for name in names(folder) if name.isdigit() and folder / name not in finished]


def program_cache(workdir: Path) -> Path:
    """Where JAX keeps the programs that it compiles for a run: on a local disk, since XLA reads there too."""
    if not is_local(workdir):
        return Path("~/.cache/fcvit_jax/compilation_cache").expanduser()
    return workdir / "compilation_cache"


class _FileLock:
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
        pass  # the system lets nobody else take it

    def close(self) -> None:
        self._file.close()


class Lock:
    """A mark that one run at a time can hold. A local disk releases it however that run's process ends.

    Args:
      workdir: the run's folder.

    Raises:
      UserError: another run holds it, or the folder cannot be written.
    """

    def __init__(self, workdir: Path):
        if is_local(workdir):
            self._lock = _FileLock(workdir)
        else:
            from fcvit_jax.devices import gcs_run

            self._lock = gcs_run.Lock(workdir)

    def check(self) -> None:
        """Raises UserError if another run has taken the folder over; to be called before anything is saved."""
        self._lock.check()

    def close(self) -> None:
        """Releases the folder."""
        self._lock.close()


class GrowingFiles:
    """Files in a run's folder to which is written again and again, such as a log.

    Args:
      workdir: the run's folder.
    """

    def __init__(self, workdir: Path):
        self._workdir, self._copies = workdir, None
        if not is_local(workdir):
            from fcvit_jax.devices import gcs_run

            self._copies = gcs_run.GrowingFiles(workdir)

    def local(self, name: str) -> Path:
        """The path on a local disk under which to write a file or a folder of the run's folder."""
        return self._copies.local(name) if self._copies else self._workdir / name

    def keep(self) -> None:
        """Makes sure that what was written is in the run's folder; without it, this takes half a minute or so."""
        if self._copies:
            self._copies.keep()

    def close(self) -> None:
        """Keeps what was written."""
        if self._copies:
            self._copies.close()
