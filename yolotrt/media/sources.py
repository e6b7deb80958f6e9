"""What the user names on the command line, as a list of picture files, video files, cameras and streams."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from yolotrt.errors import InputError

PICTURE_SUFFIXES = (
    ".bmp", ".dib", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""File name endings that make a file in a folder, or one that a glob matches, a picture."""

VIDEO_SUFFIXES = (
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv",
)  # fmt: skip
"""File name endings that make a file a video."""

MEDIA_SUFFIXES = (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES)

MODEL_SUFFIXES = (".pt", ".pth", ".wts", ".safetensors", ".onnx", ".engine", ".plan")
"""File name endings of models, which some people pass as a source."""

_LISTED_PROBLEMS = 5
_FILE_URL_SUFFIXES = tuple(suffix for suffix in VIDEO_SUFFIXES if suffix != ".ts")
"""What ends a web address of a file; ``.ts`` may be a stream without an end."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: pathlib has already merged the two of a URL in a Path
_CAMERA_DEVICE = re.compile(r"/dev/video\d+")
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_DIGITS = re.compile(r"(\d+)")


def expand_sources(sources: Sequence[str | Path]) -> list[Path | str]:
    """Turn sources into files, cameras and streams, each once, in the order given.

    A source is

    - a picture or video file; one with an unknown suffix is taken for a picture,
    - a folder: its pictures and videos in natural order (2.jpg before 10.jpg), without those of its subfolders and
      hidden ones,
    - a glob such as ``a/*.jpg`` or ``a/**/*.png`` (recursive), in natural order; an existing file of that very name
      goes first,
    - a camera, by its number or device: ``0``, ``/dev/video0``,
    - a URL: a stream such as ``rtsp://host/live``, or a video file on the web, ``https://host/clip.mp4``,
    - a ``.txt`` list in UTF-8: one of these a line, paths relative to the list's folder or else to the current one;
      blank lines and lines that begin with ``#`` are skipped.

    A leading ``~`` is the home folder.

    Args:
        sources: Sources as typed.

    Returns:
        Files, which exist or are web addresses, as paths; cameras and streams as text. Whether they hold pictures shows
        when they are read.

    Raises:
        InputError: if a source does not exist or yields nothing.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    if not given:
        raise InputError("no source given: name a picture, a video, a folder, a glob, a .txt list, a camera or a URL")
    unique: dict[Path | str, Path | str] = {}
    for source in given:
        for item in _expand(source):
            # The folder is resolved but not the file: two links to one picture are two pictures, as their names differ.
            unique.setdefault(item if isinstance(item, str) else item.parent.resolve() / item.name, item)
    return list(unique.values())


def is_video(path: Path) -> bool:
    """Whether a file's name is that of a video; of what is on the web only videos are files."""
    return path.suffix.lower() in VIDEO_SUFFIXES or is_url(path)


def is_url(path: Path) -> bool:
    """Whether the path is a web address."""
    return _URL.match(str(path)) is not None


def source_name(path: Path) -> str:
    """The source as typed; pathlib merges the two slashes of a URL."""
    scheme, _, rest = str(path).partition(":/")
    return f"{scheme}://{rest.lstrip('/')}" if is_url(path) else str(path)


def public_name(source: str) -> str:
    """The source without the user name and password of a URL."""
    return re.sub(r"(?<=://)[^/]*@", "", source)


def _expand(source: str | Path) -> Sequence[Path | str]:
    """The files, cameras and streams of one source."""
    text = str(source)
    if not text.strip():
        raise InputError("a source is empty: name a picture, a video, a folder, a glob, a .txt list, a camera or a URL")
    beyond = _beyond_the_disk(text) if isinstance(source, str) else _url(text)
    if beyond is not None:
        return [beyond]
    try:
        path = _home_expanded(Path(source))
        if path.is_dir():
            return _folder(path)
        if path.suffix.lower() in MODEL_SUFFIXES and path.is_file():
            raise InputError(f"source {path} is a model, not a picture: build with -s --weights, detect with --engine")
        if path.exists():
            return _list(path) if path.suffix.lower() == ".txt" else [path]
        if _GLOB_CHARACTERS.search(str(path)):
            return _glob(path)
    except (OSError, ValueError, RuntimeError) as problem:  # no permission, a null byte, a home that is unknown
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(f"source {text[:200]!r} cannot be opened ({reason}): check the path") from problem
    raise InputError(f"source {path} does not exist: check the path")


def _beyond_the_disk(text: str) -> Path | str | None:
    """A camera or URL, or None if it is a name on the disk."""
    return text if text.isdecimal() or _CAMERA_DEVICE.fullmatch(text) else _url(text)


def _url(text: str) -> Path | str | None:
    """A URL: of a video file as a path, of a stream as text; None if it is none.

    Raises:
        InputError: if it is one of a picture.
    """
    if not _URL.match(text):
        return None
    url = source_name(Path(text)) if "://" not in text else text
    ending = Path(urlsplit(url).path).suffix.lower()
    if ending in PICTURE_SUFFIXES:
        raise InputError(f"source {public_name(url)} is a picture on the web: download it first")
    return Path(url) if url.lower().startswith("http") and ending in _FILE_URL_SUFFIXES else url


def _home_expanded(path: Path) -> Path:
    """The path with a leading ``~`` replaced, unless a file of that very name is there."""
    return path if path.exists() else path.expanduser()


def _folder(folder: Path) -> list[Path]:
    """The folder's own pictures and videos."""
    found = _media(path for path in folder.iterdir() if not path.name.startswith("."))
    if not found:
        raise InputError(
            f"folder {folder} holds no picture or video: name one with files of {' '.join(MEDIA_SUFFIXES)}"
        )
    return found


def _glob(pattern: Path) -> list[Path]:
    """What the pattern matches. Path.glob would need a start folder and matches hidden files."""
    found = _media(Path(name) for name in glob.glob(str(pattern), recursive=True))  # noqa: PTH207
    if not found:
        raise InputError(
            f"no picture or video matches {pattern}: check the pattern; suffixes are {' '.join(MEDIA_SUFFIXES)}"
        )
    return found


def _media(paths: Iterable[Path]) -> list[Path]:
    """Those that are files with a picture's or video's suffix, in natural order."""
    found = (path for path in paths if path.suffix.lower() in MEDIA_SUFFIXES and is_file_or_broken_link(path))
    return sorted(found, key=_natural_key)


def is_file_or_broken_link(path: Path) -> bool:
    """Whether it is a file, or a link that leads nowhere: that is named when it is read, not passed over in silence."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _natural_key(path: Path) -> tuple[list[list[str | int]], str]:
    """A sort key that compares runs of digits by value; the plain text decides between 1.jpg and 01.jpg."""
    # A split at digits alternates text, number, text, ...: like is always compared with like.
    return [
        [int(piece) if index % 2 else piece for index, piece in enumerate(_DIGITS.split(part.casefold()))]
        for part in path.parts
    ], str(path)


def _list(path: Path) -> list[Path | str]:
    """What a text file lists."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as problem:
        raise InputError(f"list {path} is not UTF-8 text: save it as UTF-8") from problem
    entries = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    entries = [(number, entry) for number, entry in entries if entry and not entry.startswith("#")]
    if not entries:
        raise InputError(f"list {path} names no source: write one a line")
    found = [(number, entry, _listed(path, number, entry)) for number, entry in entries]
    missing = [f"line {number} ({entry[:200]})" for number, entry, file in found if file is None]
    if missing:
        shown = ", ".join(missing[:_LISTED_PROBLEMS])
        more = f" and {len(missing) - _LISTED_PROBLEMS} more" if len(missing) > _LISTED_PROBLEMS else ""
        raise InputError(f"list {path} names files that do not exist, {shown}{more}: correct the list")
    return [file for _, _, file in found if file is not None]


def _listed(list_path: Path, number: int, entry: str) -> Path | str | None:
    """The source of one line, or None if it is a file that does not exist."""
    try:
        beyond = _beyond_the_disk(entry)
    except InputError as error:
        raise InputError(f"list {list_path}, line {number}: {error}") from error
    if beyond is not None:
        return beyond
    path = _home_expanded(Path(entry))
    for candidate in (list_path.parent / path, path):
        if candidate.is_file():
            return candidate
    return None
