"""Ray's reader of blocks: files are fetched and decoded by tasks on any CPU of the cluster."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from yolotrt.distributed.items import Block, Item
from yolotrt.distributed.storage import is_remote, open_filesystem, unreadable
from yolotrt.errors import ImageError, InputError, VideoError
from yolotrt.media.frames import Frame, host_memory
from yolotrt.media.images import decode_image, read_image
from yolotrt.media.sources import is_video
from yolotrt.media.video import read_video

READ_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.5
_BYTES_A_TABLE = 32 * 1024 * 1024
"""Decoded pictures that travel together: a share of Ray's object store that leaves room for many."""

SCHEMA = pa.schema(
    [
        ("block", pa.string()),
        ("position", pa.int64()),  # of the picture in its block
        ("total", pa.int64()),  # pictures of the block, in its last row, which is no picture
        ("item", pa.int64()),
        ("path", pa.string()),
        ("frame", pa.int64()),
        ("time_s", pa.float64()),
        ("result", pa.string()),  # name for an annotated picture
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("bgr", pa.large_binary()),
        ("error", pa.string()),
        ("again", pa.bool_()),  # whether another run may have more luck
    ]
)


class UnreadableError(InputError):
    """A store does not give a file: not the file's fault."""


class MediaSource(Datasource):  # type: ignore[misc]  # Ray is not type-checked
    """Blocks as a Ray data source; each is one read task."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self._blocks = blocks

    def get_name(self) -> str:
        """What progress bars show."""
        return "Read"

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known before decoding."""
        return None

    def get_read_tasks(self, *_args: Any, **_options: Any) -> list[ReadTask]:
        """One for each block, however many run at once."""
        return [
            ReadTask(_Read(block), BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None))
            for block in self._blocks
        ]


@dataclass(frozen=True)
class _Read:
    """Reads one block."""

    block: Block

    def __call__(self) -> Iterator[pa.Table]:
        return read_block(self.block)


def read_block(block: Block) -> Iterator[pa.Table]:
    """The pictures and frames of a block, in tables of `SCHEMA`; what cannot be read is a row with an error.

    The last row has the number of rows before it in `total`.
    """
    rows: list[dict[str, Any]] = []
    size = position = 0
    for number, item in enumerate(block.items):
        for row in _rows_of(item):
            rows.append({**row, "block": block.key, "position": position, "item": number})
            position += 1
            size += len(row.get("bgr", b""))
            if size >= _BYTES_A_TABLE:
                yield pa.Table.from_pylist(rows, SCHEMA)
                rows, size = [], 0
    rows.append({"block": block.key, "position": position, "total": position})
    yield pa.Table.from_pylist(rows, SCHEMA)


def _rows_of(item: Item) -> Iterator[dict[str, Any]]:
    """One row a picture or frame; at the end one with an error if there was any."""
    try:
        for frame in _frames_of(item):
            is_frame = frame.clip is not None
            yield {
                "path": item.source,
                "frame": frame.index if is_frame else None,
                "time_s": frame.time_s if is_frame else None,
                "result": f"{item.name}_{frame.index}" if is_frame else item.name,
                "height": frame.image.shape[0],
                "width": frame.image.shape[1],
                "bgr": np.ascontiguousarray(frame.image).data.cast("B"),
            }
    except (ImageError, VideoError) as error:
        yield {"path": item.source, "error": str(error)}
    except UnreadableError as error:
        yield {"path": item.source, "error": str(error), "again": True}
    except MemoryError:
        yield {"path": item.source, "error": f"{item.source} does not fit into memory: scale it down"}


def _frames_of(item: Item) -> Iterator[Frame]:
    """The item's pictures."""
    path = Path(item.source)
    if item.span is None:
        yield Frame(
            path, decode_image(_fetch(item.source), item.source) if is_remote(item.source) else read_image(path)
        )
    elif is_remote(item.source) and not item.source.startswith("http"):
        with tempfile.TemporaryDirectory(prefix="yolotrt-") as folder:
            local = Path(folder) / PurePosixPath(item.source).name
            _download(item.source, local)
            yield from read_video(local, host_memory, item.span)
    elif is_video(path):  # FFmpeg reads from the web itself
        yield from read_video(path, host_memory, item.span)


def _fetch(url: str) -> bytes:
    """The content of a remote file."""

    def get() -> bytes:
        filesystem, path = open_filesystem(url)
        content: bytes = filesystem.cat_file(path)
        return content

    data: bytes = _patiently(url, get)
    return data


def _download(url: str, target: Path) -> None:
    """Copy a remote file to this machine, piece by piece."""

    def copy() -> None:
        filesystem, path = open_filesystem(url)
        with filesystem.open(path, "rb") as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)

    _patiently(url, copy)


def _patiently(url: str, action: Callable[[], Any]) -> Any:
    """Try some times: of millions of requests some fail.

    Raises:
        ImageError: if there is no such file.
        UnreadableError: if it cannot be had.
    """
    for attempt in range(READ_ATTEMPTS):
        try:
            return action()
        except FileNotFoundError as problem:
            raise ImageError(f"{url} does not exist any more: check the source") from problem
        except Exception as problem:  # each store has errors of its own
            if attempt == READ_ATTEMPTS - 1:
                failure = problem if isinstance(problem, InputError) else unreadable(url, problem)
                raise UnreadableError(str(failure)) from problem
            time.sleep(_FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")
