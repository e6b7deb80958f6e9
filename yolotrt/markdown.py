"""Tables and sections of Markdown files that commands write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from yolotrt.errors import OutputError
from yolotrt.files import atomic_write_text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar in a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_section(path: Path, name: str, text: str) -> None:
    """Write `text` between the marks of section `name` in a Markdown file; the rest stays as it is.

    The marks are comments, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. Without them the section is added at the
    end.

    Raises:
        OutputError: if the file cannot be read or written, or has only one of the marks.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as problem:
        raise OutputError(f"cannot read {path} ({problem}): choose another file") from problem
    section = f"{begin}\n{text.strip()}\n{end}"
    if begin in old and end in old[old.index(begin) :]:
        before, rest = old.split(begin, 1)
        new = before + section + rest.split(end, 1)[1]
    elif begin in old or end in old:
        raise OutputError(f"{path} has only one of the marks of {name}: delete it, or add the other")
    else:
        new = f"{old.rstrip()}\n\n{section}\n" if old.strip() else f"{section}\n"
    atomic_write_text(path, new)
