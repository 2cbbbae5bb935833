"""What a run in a bucket does regularly: it renews its lock, and uploads the files that it writes on the local disk.

Both name the generation of an object that they expect, so that of two runs one notices that it is not alone.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from etils import epath

from fcvit_jax.devices import gcs
from fcvit_jax.errors import UserError, log

RENEWAL = 30.0  # seconds between two renewals of a lock, and between two uploads of files that have grown
STALE = 120.0  # seconds after which a lock that was not renewed is that of a killed run


class _Regularly:
    """Calls a function again and again, in a thread, until it is closed.

    Args:
      seconds: between two calls.
      function: what it raises is dropped: its next call, which may be another's, raises it again.
    """

    def __init__(self, seconds: float, function: Callable[[], None]):
        self._seconds, self._function, self._end = seconds, function, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._seconds):
            with contextlib.suppress(Exception):
                self._function()

    def close(self) -> None:
        self._end.set()
        self._thread.join()


class Lock:
    """As in storage: an object .lock, which the run renews while it holds it.

    A killed run leaves it behind. So whoever finds one waits until it is renewed, or for so long that its run cannot be
    alive. Times are those of the server, so that clocks need not agree.
    """

    def __init__(self, workdir: epath.Path):
        self._workdir, self._path = workdir, workdir / ".lock"
        self._mutex, self._lost, self._token = threading.Lock(), False, secrets.token_hex(8)
        self._generation = self._take()
        self._renewed = time.monotonic()
        self._thread = _Regularly(RENEWAL, self._renew)

    def _content(self) -> bytes:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token, "time": time.time()}
        return json.dumps(about).encode()

    def _look(self) -> tuple[str, float]:
        """The generation of the lock that is there, or "0", and for how long it was not renewed, in seconds."""
        try:
            headers, content = gcs.file_system().call("GET", "b/{}/o/{}", *gcs.split(self._path))
        except FileNotFoundError:
            return "0", 0.0
        about = json.loads(content)
        renewed = datetime.fromisoformat(about["updated"])
        return about["generation"], (parsedate_to_datetime(headers["Date"]) - renewed).total_seconds()

    def _take(self) -> str:
        """Waits for the lock, if it may be that of a killed run, and returns its generation."""
        first = None
        while True:
            generation, age = self._look()
            if generation == "0" or age >= STALE:
                with contextlib.suppress(FileExistsError):  # another was faster
                    return gcs.write_if(self._path, self._content(), generation)
            elif first is None:
                first = generation
                log.warning(
                    "%s has the lock of %s. If that run was killed, this one goes on in %d s.",
                    *(self._workdir, self._holder(), STALE - age),
                )
            elif generation != first:
                raise UserError(
                    f"Another run is under way in {self._workdir}, {self._holder()}: stop it, or choose another "
                    "--workdir."
                )
            time.sleep(min(max(STALE - age, 0.1), RENEWAL / 6))

    def _holder(self) -> str:
        """Whose lock it is, in words."""
        try:
            about = json.loads(self._path.read_text())
            return f"process {about['pid']} on {about['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another run"

    def _renew(self) -> None:
        with self._mutex:
            if self._lost:
                return
            try:
                self._generation = gcs.write_if(self._path, self._content(), self._generation)
                self._renewed = time.monotonic()
            except FileExistsError:
                self._lost = True

    def check(self) -> None:
        """As in storage."""
        if time.monotonic() > self._renewed + 1.5 * RENEWAL:  # this process was stopped, or the bucket did not answer
            self._renew()
        if self._lost:
            raise UserError(
                f"Another run has taken over {self._workdir} ({self._holder()}), since this one did not renew its "
                "lock in time, or the file .lock was deleted. This run ends without saving."
            )

    def close(self) -> None:
        """As in storage."""
        self._thread.close()
        with self._mutex, contextlib.suppress(Exception):  # a lock that stays is waited out
            if not self._lost and self._look()[0] == self._generation:
                gcs.file_system().call(
                    "DELETE", "b/{}/o/{}", *gcs.split(self._path), ifGenerationMatch=self._generation
                )
            self._lost = True


class GrowingFiles:
    """As in storage: files are written on the local disk, and uploaded now and then, each as a whole."""

    def __init__(self, workdir: epath.Path):
        self._workdir = workdir
        self._folder, self._thread = None, None
        self._mutex = threading.Lock()
        self._uploaded: dict[Path, tuple] = {}  # size and time of each file when it was uploaded
        self._generations: dict[Path, str] = {}

    def local(self, name: str) -> Path:
        """As in storage; a file that is in the bucket is fetched first."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fcvit_jax-"))
            self._thread = _Regularly(RENEWAL, self.keep)
        local, remote = self._folder / name, self._workdir / name
        if not local.exists() and gcs.is_file(remote):
            self._generations[local] = gcs.file_system().info(str(remote))["generation"]
            local.write_bytes(remote.read_bytes())
        return local

    def keep(self) -> None:
        """As in storage."""
        if self._folder is None:
            return
        with self._mutex:
            for local in sorted(path for path in self._folder.rglob("*") if path.is_file()):
                stat = local.stat()
                version = (stat.st_size, stat.st_mtime_ns)
                if self._uploaded.get(local) == version:
                    continue
                remote = self._workdir / local.relative_to(self._folder).as_posix()
                try:
                    generation = gcs.write_if(remote, local.read_bytes(), self._generations.get(local, "0"))
                except FileExistsError as error:
                    raise UserError(f"{remote} was changed by another run, so this one ends.") from error
                self._generations[local], self._uploaded[local] = generation, version

    def close(self) -> None:
        """As in storage."""
        if self._folder is not None:
            self._thread.close()
            try:
                self.keep()
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)
