"""What the user names on the command line, as a list of picture files."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from yolotrt.errors import InputError

PICTURE_SUFFIXES = (
    ".bmp", ".dib", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""File name endings that make a file in a folder, or one that a glob matches, a picture."""

VIDEO_SUFFIXES = (
    ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv",
)  # fmt: skip
"""File name endings of moving pictures."""

MODEL_SUFFIXES = (".pt", ".pth", ".wts", ".safetensors", ".onnx", ".engine", ".plan")
"""File name endings of models, which some people pass as a source."""

_LISTED_PROBLEMS = 5
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: pathlib has already merged the two of a URL in a Path
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_DIGITS = re.compile(r"(\d+)")


def expand_sources(sources: Sequence[str | Path]) -> list[Path]:
    """Turn sources into picture files, each once, in the order given.

    A source is

    - a picture file; one with an unknown suffix is taken at its word,
    - a folder: its pictures in natural order (2.jpg before 10.jpg), without those of its subfolders and hidden ones,
    - a glob such as ``a/*.jpg`` or ``a/**/*.png`` (recursive), in natural order; an existing file of that very name
      goes first,
    - a ``.txt`` list in UTF-8: one path a line, relative to the list's folder or else to the current one; blank lines
      and lines that begin with ``#`` are skipped.

    A leading ``~`` is the home folder.

    Args:
        sources: Sources as typed.

    Returns:
        Existing files. Whether they hold pictures shows when they are read.

    Raises:
        InputError: if a source does not exist, yields no picture, or is a video, stream or camera.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    if not given:
        raise InputError("no source given: name a picture, a folder, a glob or a .txt list")
    unique: dict[Path, Path] = {}
    for source in given:
        for picture in _expand(source):
            # The folder is resolved but not the file: two links to one picture are two pictures, as their names differ.
            unique.setdefault(picture.parent.resolve() / picture.name, picture)
    return list(unique.values())


def _expand(source: str | Path) -> list[Path]:
    """The picture files of one source."""
    _refuse_stream(source)
    try:
        path = _home_expanded(Path(source))
        if path.is_dir():
            return _folder(path)
        _refuse_video(path, f"source {path}")
        if path.suffix.lower() in MODEL_SUFFIXES and path.is_file():
            raise InputError(f"source {path} is a model, not a picture: build with -s --weights, detect with --engine")
        if path.exists():
            return _list(path) if path.suffix.lower() == ".txt" else [path]
        if _GLOB_CHARACTERS.search(str(path)):
            return _glob(path)
    except (OSError, ValueError, RuntimeError) as problem:  # no permission, a null byte, a home that is unknown
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(f"source {str(source)[:200]!r} cannot be opened ({reason}): check the path") from problem
    raise InputError(f"source {path} does not exist: check the path")


def _home_expanded(path: Path) -> Path:
    """The path with a leading ``~`` replaced, unless a file of that very name is there."""
    return path if path.exists() else path.expanduser()


def _refuse_stream(source: str | Path) -> None:
    """Raise if the source is nothing on a disk."""
    text = str(source)
    if not text.strip():
        raise InputError("a source is empty: name a picture, a folder, a glob or a .txt list")
    if _URL.match(text):
        raise InputError(f"source {text} is a stream or URL, this version reads pictures only: download it first")
    if isinstance(source, str) and text.isdecimal():
        raise InputError(
            f"source {text} is a camera index, this version reads pictures only: name a picture, or ./{text} for a path"
        )


def _refuse_video(path: Path, what: str) -> None:
    """Raise if the name is that of a video."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        raise InputError(f"{what} is a video, this version reads pictures only: extract its frames as pictures")


def _folder(folder: Path) -> list[Path]:
    """The folder's own pictures."""
    pictures = _pictures(path for path in folder.iterdir() if not path.name.startswith("."))
    if not pictures:
        raise InputError(f"folder {folder} holds no picture: name one with files of {' '.join(PICTURE_SUFFIXES)}")
    return pictures


def _glob(pattern: Path) -> list[Path]:
    """The pictures that the pattern matches. Path.glob would need a start folder and matches hidden files."""
    pictures = _pictures(Path(name) for name in glob.glob(str(pattern), recursive=True))  # noqa: PTH207
    if not pictures:
        raise InputError(f"no picture matches {pattern}: check the pattern; suffixes are {' '.join(PICTURE_SUFFIXES)}")
    return pictures


def _pictures(paths: Iterable[Path]) -> list[Path]:
    """Those that are files with a picture's suffix, in natural order."""
    pictures = (path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    return sorted(pictures, key=_natural_key)


def _natural_key(path: Path) -> tuple[list[list[str | int]], str]:
    """A sort key that compares runs of digits by value; the plain text decides between 1.jpg and 01.jpg."""
    # A split at digits alternates text, number, text, ...: like is always compared with like.
    return [
        [int(piece) if index % 2 else piece for index, piece in enumerate(_DIGITS.split(part.casefold()))]
        for part in path.parts
    ], str(path)


def _list(path: Path) -> list[Path]:
    """The pictures that a text file lists."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as problem:
        raise InputError(f"list {path} is not UTF-8 text: save it as UTF-8") from problem
    entries = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    entries = [(number, entry) for number, entry in entries if entry and not entry.startswith("#")]
    if not entries:
        raise InputError(f"list {path} names no picture: write one path a line")
    found = [(number, entry, _listed_file(path, number, entry)) for number, entry in entries]
    missing = [f"line {number} ({entry[:200]})" for number, entry, file in found if file is None]
    if missing:
        shown = ", ".join(missing[:_LISTED_PROBLEMS])
        more = f" and {len(missing) - _LISTED_PROBLEMS} more" if len(missing) > _LISTED_PROBLEMS else ""
        raise InputError(f"list {path} names files that do not exist, {shown}{more}: correct the list")
    return [file for _, _, file in found if file is not None]


def _listed_file(list_path: Path, number: int, entry: str) -> Path | None:
    """The file of one line, or None if it does not exist."""
    what = f"list {list_path}, line {number}: {entry}"
    if _URL.match(entry):
        raise InputError(f"{what} is a stream or URL, this version reads pictures only: download it first")
    _refuse_video(Path(entry), what)
    path = _home_expanded(Path(entry))
    for candidate in (list_path.parent / path, path):
        if candidate.is_file():
            return candidate
    return None
