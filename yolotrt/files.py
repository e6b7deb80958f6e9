"""Reading and writing files so that nothing half-written is ever left behind."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from yolotrt.errors import InputError, OutputError, YolotrtError


def require_file(path: Path, what: str, error: type[YolotrtError] = InputError) -> Path:
    """Return `path` if it is a readable, non-empty regular file.

    Args:
        path: The file that the user named.
        what: The file's role in the message, such as ``weights``.
        error: The error class to raise.

    Raises:
        YolotrtError: of class `error`, if the file is missing, a directory, unreadable or empty.
    """
    try:
        if path.is_dir():
            raise error(f"{what} {path} is a directory: name a file")
        if not path.exists():
            raise error(f"{what} {path} does not exist: check the path")
        if not os.access(path, os.R_OK):
            raise error(f"{what} {path} cannot be read: check its permissions")
        if path.is_file() and path.stat().st_size == 0:
            raise error(f"{what} {path} is empty: make or download it again")
    except (OSError, ValueError) as problem:  # name too long, a null byte in the name
        raise error(f"{what} {str(path)[:200]!r} cannot be opened: {problem}") from problem
    return path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; on success it replaces `path`, otherwise it is removed.

    Missing parent folders are created. The data are flushed to the disk before the rename, so that after a crash or a
    kill `path` holds either its old content or all of the new.

    Raises:
        OutputError: if the folder or the file cannot be written.
    """
    temporary: Path | None = None
    try:
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a directory: name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
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


def _umask() -> int:
    """The process's file mode mask; reading it means setting it for an instant."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
