"""Checksums of a folder's files, in the format of `sha256sum`: `sha256sum --check SHA256SUMS` checks them too."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from fcvit_jax.errors import UserError

NAME = "SHA256SUMS"


def make(files: Mapping[str, bytes]) -> bytes:
    """The content of a folder's `SHA256SUMS`.

    Args:
      files: contents by name, with "/" between folders.
    """
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()).encode()


def check(folder: Path, names: tuple[str, ...] | None = None) -> None:
    """Compares files with the checksums beside them.

    Args:
      folder: with a `SHA256SUMS`.
      names: the files to compare, of those that are listed; None: all that are listed.

    Raises:
      UserError: a file is missing, was changed or cannot be read, or the checksums themselves cannot be read.
    """
    try:
        lines = (folder / NAME).read_text().splitlines()
        listed = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines]
        if not listed or not all(listed):
            raise UserError(f"{folder / NAME} is damaged: write the folder again.")
        for expected, name in (match.groups() for match in listed):
            if names is None or name in names:
                with open(folder / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != expected:
                    raise UserError(
                        f"{folder / name} is not what was written (by its {NAME}): it is damaged or was changed."
                    )
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / NAME} is damaged: write the folder again.") from error
