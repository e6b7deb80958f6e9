"""What there is to do: pictures and parts of videos, in blocks that are finished or not."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from yolotrt.distributed.storage import is_remote, open_filesystem, unreadable
from yolotrt.errors import InputError
from yolotrt.media.frames import Span
from yolotrt.media.sources import MEDIA_SUFFIXES, VIDEO_SUFFIXES, expand_sources
from yolotrt.media.video import declared_duration_s

PICTURES_A_BLOCK = 128
"""What a lost worker or an interrupted run does again at most, for each worker; also one file of results."""
SEGMENT_S = 60.0
"""Length of a video's parts: some thousand frames, so that finding the first one is a small part of the work."""

_STREAM_SCHEMES = ("rtsp", "rtmp", "rtp", "udp", "tcp", "srt")


@dataclass(frozen=True)
class Item:
    """One picture, or a part of a video.

    Attributes:
        source: The path, or the URL.
        span: Which frames of a video; None for a picture.
        name: Of its annotated picture, without a suffix; no two sources share one.
    """

    source: str
    span: Span | None = None
    name: str = ""

    @property
    def key(self) -> str:
        """Sixteen characters for source and span, by which a finished item is known again."""
        span = self.span
        text = self.source if span is None else f"{self.source}\0{span.stride}\0{span.start_s}\0{span.end_s}"
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Block:
    """Items that are done together.

    Attributes:
        items: At least one.
    """

    items: tuple[Item, ...]

    @property
    def key(self) -> str:
        """Names the block's results: the same items give the same name."""
        return hashlib.blake2b("".join(item.key for item in self.items).encode(), digest_size=12).hexdigest()

    @property
    def label(self) -> str:
        """For messages."""
        first, last = self.items[0].source, self.items[-1].source
        return first if first == last else f"{first} ... {last}"


def list_items(sources: Sequence[str | Path], span: Span) -> list[Item]:
    """Pictures and parts of videos of all sources.

    Args:
        sources: As `expand_sources` takes them, or URLs of stores that fsspec knows: of a file, of a folder, which is
            searched in depth, or a pattern such as ``s3://bucket/2026/*.jpg``.
        span: Which frames of videos.

    Raises:
        InputError: if a source cannot be read or is a camera or stream.
    """
    found: dict[str, None] = {}
    for source in sources:
        found.update(dict.fromkeys(_remote_files(str(source)) if is_remote(str(source)) else _local_files(source)))
    if span != Span() and not any(map(_is_video, found)):
        raise InputError("--stride, --start and --end have no effect on pictures: leave them out")
    names = _unique_names(found)
    return [
        Item(source, part, names[source])
        for source in found
        for part in (_segments(source, span) if _is_video(source) else [None])
    ]


def in_blocks(items: Iterable[Item]) -> Iterator[Block]:
    """Pictures in blocks of equal size, each part of a video in one of its own."""
    pictures: list[Item] = []
    for item in items:
        if item.span is not None:
            yield Block((item,))
            continue
        pictures.append(item)
        if len(pictures) == PICTURES_A_BLOCK:
            yield Block(tuple(pictures))
            pictures = []
    if pictures:
        yield Block(tuple(pictures))


def _local_files(source: str | Path) -> list[str]:
    """Absolute, since workers have another current folder."""
    files = expand_sources([source])
    live = [file for file in files if isinstance(file, str)]
    if live:
        raise InputError(f"{live[0]} is a live source, which has no end: run it without --ray")
    return [str(Path(file).absolute()) for file in files]


def _remote_files(url: str) -> list[str]:
    """Files of a URL."""
    if url.split("://", 1)[0].lower() in _STREAM_SCHEMES:
        raise InputError(f"{url} is a live source, which has no end: run it without --ray")
    filesystem, path = open_filesystem(url)
    try:
        if any(character in path for character in "*?["):
            found = filesystem.glob(path)
        elif _has_media_suffix(path):
            return [url]  # what it holds shows when it is read
        else:
            found = filesystem.find(path)
    except Exception as problem:  # each store has errors of its own
        raise unreadable(url, problem) from problem
    files = sorted(filesystem.unstrip_protocol(name) for name in found if _has_media_suffix(name))
    if not files:
        raise InputError(f"{url} holds no picture or video: check its name; suffixes are {' '.join(MEDIA_SUFFIXES)}")
    return files


def _has_media_suffix(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in MEDIA_SUFFIXES


def _is_video(source: str) -> bool:
    return PurePosixPath(source).suffix.lower() in VIDEO_SUFFIXES


def _segments(source: str, span: Span) -> list[Span]:
    """Parts of a video that have the frames of `span` once.

    A stride counts from the first frame, and an object store would be asked for the whole file for each part: these
    stay in one piece.
    """
    duration_s = None if span.stride > 1 or is_remote(source) else declared_duration_s(Path(source))
    if duration_s is None:
        return [span]
    end_s = duration_s if span.end_s is None else min(span.end_s, duration_s)
    starts = list(itertools.takewhile(lambda start: start < end_s, _from(span.start_s))) or [span.start_s]
    # the last one ends where the file does, whatever it declares
    ends: list[float | None] = [*starts[1:], span.end_s]
    return [Span(1, start, end) for start, end in zip(starts, ends, strict=True)]


def _from(start_s: float) -> Iterator[float]:
    """Times at which parts begin."""
    return (start_s + SEGMENT_S * number for number in itertools.count())


def _unique_names(sources: Iterable[str]) -> dict[str, str]:
    """For each source the stem of its name; a number is added to one that is taken."""
    names: dict[str, str] = {}
    used: set[str] = set()
    last: Counter[str] = Counter()  # by stem: ten million files of one name are not to be counted from 2 each time
    for source in sources:
        stem = name = PurePosixPath(source).stem
        while name.casefold() in used:
            last[stem] += 1
            name = f"{stem}_{last[stem] + 1}"
        used.add(name.casefold())
        names[source] = name
    return names
