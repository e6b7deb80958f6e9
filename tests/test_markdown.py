from __future__ import annotations

import pytest

from yolotrt.errors import OutputError
from yolotrt.markdown import table, write_section

SECTION = "<!-- begin a -->\nnew\n<!-- end a -->"

CASES = [
    # before, after
    (None, f"{SECTION}\n"),
    ("# Title\n", f"# Title\n\n{SECTION}\n"),
    ("x\n<!-- begin a -->\nold\nold\n<!-- end a -->\ny\n", f"x\n{SECTION}\ny\n"),
    ("<!-- begin b -->\nb\n<!-- end b -->\n", f"<!-- begin b -->\nb\n<!-- end b -->\n\n{SECTION}\n"),
]


@pytest.mark.parametrize(("before", "after"), CASES)
def test_a_section_is_replaced_or_added_and_the_rest_stays(tmp_path, before, after):
    path = tmp_path / "notes.md"
    if before is not None:
        path.write_text(before)
    write_section(path, "a", "new\n")
    assert path.read_text() == after


@pytest.mark.parametrize("text", ["<!-- begin a -->\n", "<!-- end a -->\n<!-- begin a -->\n"])
def test_a_mark_without_its_other_is_refused(tmp_path, text):
    path = tmp_path / "notes.md"
    path.write_text(text)
    with pytest.raises(OutputError, match="only one of the marks"):
        write_section(path, "a", "new")
    assert path.read_text() == text


def test_bars_in_cells_are_escaped():
    assert table(["a", "b"], [["x|y", "z"]]) == "| a | b |\n| --- | --- |\n| x\\|y | z |"
