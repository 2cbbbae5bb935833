"""Google Cloud Storage: what devices/storage.py does for a run's folder in a bucket, gs://BUCKET/FOLDER.

Everything goes through one file system of fsspec, which etils.epath, and so Orbax and TFDS, find under "gs" as well.
It repeats requests for some minutes while the bucket does not answer. What a user can mend, such as a missing role, it
raises as a UserError. TensorStore, which writes Orbax's arrays, has a client of its own that repeats requests too.

A bucket differs from a disk in these ways:

- There are no folders; and to move one means to copy each object and to delete it.
- There are no locks, and an object is written as a whole, at most about once a second; see gcs_run.py.
"""

import asyncio
import contextlib
import errno
import functools
import json
import logging
import os
import re
import secrets
import time
from typing import Any
from urllib.parse import unquote

from etils import epath

from fcvit_jax.errors import UserError, log

try:
    import fsspec
    from gcsfs.core import GCSFileSystem
    from gcsfs.retry import HttpError, is_retriable
    from google.auth.exceptions import GoogleAuthError, TransportError
except ImportError as error:
    raise UserError(f'gs:// needs gcsfs ({error}): pip install "fcvit-jax[gcs]", or "gcsfs>=2026.4".') from error

PAUSES = (1, 2, 5, 10, 20, 40, 60, 60, 60)  # seconds before each repetition of a request
_COMMITTED = "commit_success.txt"  # which Orbax writes last into a checkpoint's folder
_ROLES = "grant Storage Object User on the bucket and, for the bucket itself, Storage Legacy Bucket Reader"
# One try of a request; gcsfs repeats it for half a minute only, and prints a traceback then.
_try_once = GCSFileSystem._request.__wrapped__
_said = 0.0  # when the user was last told that a bucket does not answer


class _Buckets(GCSFileSystem):
    """gcsfs, but it keeps no listings, repeats requests longer and raises errors that say what to do."""

    _silent = False  # whether the last request was given up: those that follow it are not repeated

    def __init__(self, **options: Any):
        # With a kept listing a process would never see what others write.
        super().__init__(**options | {"use_listings_cache": False})

    async def _request(self, method: str, path: str, *args: Any, **options: Any) -> tuple:
        for pause in (None,) if self._silent else (*PAUSES, None):
            try:
                answer = await _try_once(self, method, path, *args, **options)
                self._silent = False
                return answer
            except Exception as error:
                explained = _explained(error, self._format_path(path, args))
                is_refused = getattr(error, "code", None) == 401  # the first tries may renew an old token
                if pause is None or not _is_passing(error) or (is_refused and pause > 2):
                    self._silent = _is_passing(error) and not is_refused
                    raise explained from error
                _say(explained, pause)
            await asyncio.sleep(pause)


def _is_passing(error: Exception) -> bool:
    return is_retriable(error) or isinstance(error, asyncio.TimeoutError | TransportError)


def _say(error: Exception, pause: float) -> None:
    """Warns of a bucket that does not answer, but not of each of many requests at the same time."""
    global _said
    if time.monotonic() > _said + pause / 2:
        _said = time.monotonic()
        log.warning("%s Trying again in %d s.", str(error).partition("\n")[0], pause)


def _explained(error: Exception, url: str) -> Exception:
    """The error that users get for one of gcsfs; itself where there is nothing to explain."""
    bucket, _, key = re.sub(r"^.*?/b/", "", url.partition("?")[0]).partition("/o")
    where, code = f"gs://{bucket}", getattr(error, "code", None)
    said = " ".join(str(getattr(error, "message", None) or error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        if not key:  # of the bucket, of its list, or of a new object
            return UserError(f"There is no bucket {where}.")
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{where}{unquote(key)}")
    if code == 401 or (isinstance(error, GoogleAuthError) and not _is_passing(error)):
        return UserError(
            f"No credentials for {where} ({said}): on a TPU VM give its service account access, elsewhere run: gcloud "
            "auth application-default login"
        )
    if type(error) is OSError and said.startswith("Forbidden"):
        said = said.removeprefix("Forbidden: ").partition(" ")[2]
        return UserError(f"{where} does not allow this: {said} To whoever is named here {_ROLES}.")
    if _is_passing(error):
        return UserError(
            f"{where} does not answer ({said[:200]}).\nWhat was saved is still there: once the bucket answers, run the "
            "same command again."
        )
    if isinstance(error, HttpError) and str(code) != "416":  # gcsfs knows what an empty range is
        return OSError(errno.EIO, f"{where}: {said[:300]}")
    return error


@functools.cache
def file_system() -> _Buckets:
    """The file system of all buckets."""
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, _Buckets, clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()  # TFDS may have looked at a bucket before
    logging.getLogger("google.auth").setLevel(logging.ERROR)  # it warns where there is no project, which none needs
    return fsspec.filesystem("gs")


def as_path(text: str) -> epath.Path:
    """The path gs://BUCKET/FOLDER.

    Raises:
      UserError: the text is none, or has characters that Google's tools take for patterns.
    """
    file_system()
    address = "gs://" + re.sub("^gs:/+", "", text).rstrip("/")  # a pathlib.Path has one slash of the two
    if not re.fullmatch(r"gs://[^/]+(/[^/]+)+", address):
        raise UserError(f"{address} must be a folder in a bucket: gs://BUCKET/FOLDER")
    if found := re.search(r"[*?\[\]#\r\n]|/\.\.?(?=/|$)", address):
        raise UserError(f"{address} has {found[0]!r} in it, which means something else to Google's tools.")
    return epath.Path(address)


def split(path: epath.Path) -> tuple[str, str]:
    """The name of the bucket, and that of the object in it."""
    bucket, _, key = str(path).removeprefix("gs://").partition("/")
    return bucket, key


def is_file(path: epath.Path) -> bool:
    """As in storage."""
    return file_system().isfile(str(path))


def names(folder: epath.Path) -> list[str]:
    """As in storage."""
    try:
        return [name for path in folder.iterdir() if (name := path.name) != folder.name]
    except FileNotFoundError:
        return []


def replace_text(path: epath.Path, text: str) -> None:
    """As in storage; an object is always written as a whole."""
    file_system().pipe_file(str(path), text.encode())


def remove(path: epath.Path) -> None:
    """As in storage."""
    with contextlib.suppress(FileNotFoundError):
        file_system().rm(str(path), recursive=True)


def move(path: epath.Path, target: epath.Path) -> None:
    """As in storage. A kill in between loses nothing, since all is copied before anything is deleted."""
    files, start = file_system(), str(path).removeprefix("gs://")
    for name in files.find(start):
        files.cp_file(name, f"{target}{name.removeprefix(start)}".removeprefix("gs://"))
    remove(path / _COMMITTED)  # first: what is left after a kill is then an unfinished save
    remove(path)


def is_finished(step: epath.Path) -> bool:
    """Whether a checkpoint's folder is that of a save that was finished."""
    return is_file(step / _COMMITTED)


def write_if(path: epath.Path, content: bytes, generation: str) -> str:
    """Writes an object if its generation is the one given; "0": if there is none. Returns the new generation.

    Raises:
      FileExistsError: another process has written it, or deleted it.
    """
    bucket, key = split(path)
    boundary = secrets.token_hex(16)
    about = json.dumps({"name": key})
    parts = f"--{boundary}\nContent-Type: application/json\n\n{about}\n--{boundary}\nContent-Type: text/plain\n\n"
    try:
        written = file_system().call(
            "POST",
            f"{file_system().base.replace('/storage/', '/upload/storage/')}b/{bucket}/o",
            headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
            data=parts.encode() + content + f"\n--{boundary}--".encode(),
            uploadType="multipart",
            ifGenerationMatch=generation,
            json_out=True,
        )
        return written["generation"]
    except FileExistsError:
        # A request whose answer was lost is sent again, and then finds what it has written itself.
        with contextlib.suppress(FileNotFoundError):
            current = file_system().info(str(path))["generation"]
            if path.read_bytes() == content:
                return current
        raise


def check_access(folder: epath.Path) -> None:
    """Does once all that a run will do, so that a missing role shows at the start and not at the first deletion.

    Raises:
      UserError: there are no credentials, no bucket, or a role is missing.
    """
    bucket, _ = split(folder)
    file_system().call("GET", "b/{}", bucket)  # which Orbax does when it first deletes a checkpoint
    probe = folder / f"probe-{secrets.token_hex(4)}"
    for text in ("first", "second"):  # to replace an object needs more than to create it
        replace_text(probe, text)
    probe.read_bytes()
    names(folder)
    remove(probe)
