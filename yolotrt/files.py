"""Reading and writing files so that nothing half-written is ever left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from yolotrt.errors import InputError, OutputError, YolotrtError

_WRITE_BITS = 0o222
_PREFIX_CHARACTERS = 48
"""Of the name, for the temporary file: with up to 4 bytes each they stay below the usual limit of 255 bytes."""


def require_file(path: Path, what: str, error: type[YolotrtError] = InputError) -> Path:
    """Return `path` if it is a readable, non-empty regular file.

    Args:
        path: The file that the user named.
        what: The file's role in the message, such as ``weights``.
        error: The error class to raise.

    Raises:
        YolotrtError: of class `error`, if the file is missing, a directory, a device or pipe, unreadable or empty.
    """
    try:
        if path.is_dir():
            raise error(f"{what} {path} is a directory: name a file")
        if not path.exists():
            raise error(f"{what} {path} does not exist: check the path")
        if not path.is_file():  # reading a device such as /dev/zero would never end
            raise error(f"{what} {path} is not a regular file: copy it to one")
        if not os.access(path, os.R_OK):
            raise error(f"{what} {path} cannot be read: check its permissions")
        if path.stat().st_size == 0:
            raise error(f"{what} {path} is empty: make or download it again")
    except (OSError, ValueError) as problem:  # name too long, a null byte in the name
        raise error(f"{what} {str(path)[:200]!r} cannot be opened: {problem}") from problem
    return path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success it replaces `path`, otherwise it is removed.

    Missing parent folders are created. The data are flushed to the disk before the rename, so that after a crash or a
    kill `path` holds either its old content or all of the new. A symbolic link stays one: its target is replaced.
    A replaced file keeps its permissions.

    Raises:
        OutputError: if the folder or the file cannot be written.
    """
    temporary: Path | None = None
    try:
        target = _replaceable(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.parent / f".{target.name[:_PREFIX_CHARACTERS]}.{secrets.token_hex(8)}.part"
        # not tempfile: this way the system applies the umask, which cannot be read without setting it
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        temporary = beside
        with os.fdopen(descriptor, "wb") as file:
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        temporary = None
    except OSError as problem:
        raise OutputError(
            f"cannot write {path}: {problem.strerror or problem}: choose a writable place with free space"
        ) from problem
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically. See `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def _replaceable(path: Path) -> Path:
    """The file that `path` leads to, which need not exist.

    Raises:
        OutputError: if a rename must not replace it. The system would let one replace a write-protected file in a
            writable folder, and root even /dev/null.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory: name a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}: it is a device or a pipe: name a file")
    if path.exists() and not path.stat().st_mode & _WRITE_BITS:
        raise OutputError(f"cannot write {path}: it is write-protected: choose another name")
    try:
        return path.resolve()
    except (ValueError, RuntimeError) as problem:  # a null byte in the name; a loop of links before Python 3.13
        raise OutputError(f"cannot write {str(path)!r}: {problem}: choose another name") from problem
