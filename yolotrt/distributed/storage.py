"""Files on this machine's disks and in object stores, by path or by URL (fsspec)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolotrt.errors import InputError, OutputError
from yolotrt.files import atomic_write

_SHOWN_CHARACTERS = 200


def is_remote(text: str) -> bool:
    """Whether it is a URL, such as ``s3://bucket/pictures``."""
    return "://" in text


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        InputError: if the kind of URL is unknown, its package is missing, or the store refuses.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as problem:
        raise InputError(f"{url} cannot be opened ({_shortened(problem)}): install that package") from problem
    except ValueError as problem:
        raise InputError(f"{url} cannot be opened ({_shortened(problem)}): check the URL") from problem
    except Exception as problem:  # each store has errors of its own
        raise unreadable(url, problem) from problem
    return filesystem, path


def unreadable(url: str, problem: Exception) -> InputError:
    """The error for a store that refuses."""
    return InputError(
        f"{url} cannot be read ({type(problem).__name__}: {_shortened(problem)}): check its name, your rights to it "
        "and the network"
    )


@dataclass(frozen=True)
class Storage:
    """A folder for results.

    Attributes:
        root: A path on this machine, or a URL.
    """

    root: str

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None if there is none.

        Raises:
            InputError: if it cannot be read.
        """
        try:
            if not is_remote(self.root):
                return (Path(self.root) / name).read_bytes()
            filesystem, path = open_filesystem(self.root)
            content: bytes = filesystem.cat_file(f"{path}/{name}")
        except FileNotFoundError:
            return None
        except InputError:
            raise
        except Exception as problem:
            raise unreadable(f"{self.root}/{name}", problem) from problem
        return content

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all. Object stores show no object before its end; local files are renamed.

        Raises:
            OutputError: if it cannot be written.
        """
        if not is_remote(self.root):
            with atomic_write(Path(self.root) / name) as file:
                file.write(data)
            return
        filesystem, path = open_filesystem(self.root)
        target = f"{path}/{name}"
        try:
            with contextlib.suppress(NotImplementedError):  # object stores have no folders
                filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            filesystem.pipe_file(target, data)
        except Exception as problem:
            raise OutputError(
                f"cannot write {self.root}/{name} ({type(problem).__name__}: {_shortened(problem)}): check the rights "
                "to it and its free space"
            ) from problem

    def contents(self, folder: str) -> Iterator[bytes]:
        """The content of every file of a folder, in the order of their names.

        Raises:
            InputError: if one cannot be read.
        """
        for name in sorted(self.names(folder)):
            data = self.read(f"{folder}/{name}")
            if data is not None:
                yield data

    def remove(self, name: str) -> None:
        """Remove a file.

        Raises:
            OutputError: if that is refused.
        """
        try:
            if not is_remote(self.root):
                (Path(self.root) / name).unlink(missing_ok=True)
                return
            filesystem, path = open_filesystem(self.root)
            filesystem.rm_file(f"{path}/{name}")
        except Exception as problem:
            raise OutputError(
                f"cannot remove {self.root}/{name} ({type(problem).__name__}: {_shortened(problem)}): check the rights "
                "to it"
            ) from problem

    def names(self, folder: str) -> list[str]:
        """Names of the files of a folder; none if there is no such folder.

        Raises:
            InputError: if it cannot be listed.
        """
        if not is_remote(self.root):
            place = Path(self.root) / folder
            return [path.name for path in place.iterdir() if not path.name.startswith(".")] if place.is_dir() else []
        filesystem, path = open_filesystem(self.root)
        try:
            return [str(name).rsplit("/", 1)[-1] for name in filesystem.ls(f"{path}/{folder}", detail=False)]
        except FileNotFoundError:
            return []
        except Exception as problem:
            raise unreadable(f"{self.root}/{folder}", problem) from problem


def _shortened(problem: BaseException) -> str:
    """The first line of a library's message."""
    return (str(problem).splitlines() or [type(problem).__name__])[0][:_SHOWN_CHARACTERS].rstrip(".:")
