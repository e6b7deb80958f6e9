"""Scale tables: what is written is read again; what cannot be right is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from yolotrt.calibration.table import MAX_SCALE, ScaleTable, TableSource
from yolotrt.errors import InputError

SOURCE = TableSource("a" * 64, (64, 96), "mse", "b" * 64, {"pad_value": 114})
GROUPS = ((1 / 127, ("images",)), (0.25, ("model.0.act", "model.1")))
NAMES = [names for _, names in GROUPS]


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "scales.json"
    ScaleTable(SOURCE, 64, GROUPS).save(path)
    return path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_written_is_read_again(path):
    table = ScaleTable.load(path)
    assert table == ScaleTable(SOURCE, 64, GROUPS)
    assert table.scales == {"images": 1 / 127, "model.0.act": 0.25, "model.1": 0.25}
    table.check_belongs_to("a" * 64, (64, 96), NAMES, path)


def test_a_group_is_a_line_that_a_person_can_edit(path):
    text = path.read_text()
    assert '\n  {"scale": 0.25, "tensors": ["model.0.act", "model.1"]}\n' in text
    path.write_text(text.replace('"scale": 0.25', '"scale": 0.5'))
    assert ScaleTable.load(path).scales["model.1"] == 0.5


def test_whatever_changes_the_scales_changes_the_key():
    others = [
        TableSource("c" * 64, (64, 96), "mse", "b" * 64, {"pad_value": 114}),
        TableSource("a" * 64, (96, 64), "mse", "b" * 64, {"pad_value": 114}),
        TableSource("a" * 64, (64, 96), "max", "b" * 64, {"pad_value": 114}),
        TableSource("a" * 64, (64, 96), "mse", "c" * 64, {"pad_value": 114}),
        TableSource("a" * 64, (64, 96), "mse", "b" * 64, {"pad_value": 128}),
    ]
    assert len({source.key() for source in (SOURCE, *others)}) == 6


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0, "is 0, not positive"),
        (-0.1, "is -0.1, not positive"),
        (math.nan, "is nan"),
        (math.inf, "is inf"),
        (1e-40, "is 1e-40, too small for float32"),
        (MAX_SCALE * 1.001, "so that values exceed the range of fp16"),
        ("0.1", "is '0.1', not a number"),
        (True, "is True, not a number"),
        (None, "is None, not a number"),
    ],
)
def test_impossible_scales_are_refused_by_name(path, scale, message):
    edit(path, scales=[{"scale": 0.1, "tensors": ["images"]}, {"scale": scale, "tensors": ["model.0.act"]}])
    with pytest.raises(InputError, match=r"the scale of model\.0\.act .*: correct it or calibrate again") as error:
        ScaleTable.load(path)
    assert message in str(error.value)


def rows(*groups: tuple[float, list[str]]) -> list[dict[str, object]]:
    return [{"scale": scale, "tensors": names} for scale, names in groups]


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (rows((0.1, ["images"])), "has no scale for tensor model.0.act"),
        (rows((0.1, ["images"]), (0.2, ["model.0.act"])), "has no scale for tensor model.1"),
        (
            rows((0.1, ["images"]), (0.2, ["model.0.act"]), (0.3, ["model.1"])),
            "has different scales for model.0.act, model.1",
        ),
        (
            rows((0.1, ["images"]), (0.2, ["model.0.act", "model.1"]), (0.3, ["model.7"])),
            "has a scale for model.7, which the model has not",
        ),
    ],
)
def test_a_table_for_other_tensors_is_refused(path, scales, message):
    edit(path, scales=scales)
    with pytest.raises(InputError) as error:
        ScaleTable.load(path).check_belongs_to("a" * 64, (64, 96), NAMES, path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("weights", "imgsz", "message"),
    [
        ("c" * 64, (64, 96), r"was made for other weights \(aaaaaaaaaaaa"),
        ("a" * 64, (64, 64), "was made for pictures of 64x96, not 64x64"),
    ],
)
def test_a_table_of_another_model_or_size_is_refused(path, weights, imgsz, message):
    with pytest.raises(InputError, match=message):
        ScaleTable.load(path).check_belongs_to(weights, imgsz, NAMES, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "is no scale table of yolotrt"),
        ({"format_version": 99}, "has format 99, this version reads 1"),
        ({"imgsz": [64]}, "is damaged"),
        ({"scales": [{"scale": 0.1}]}, "is damaged"),
        ({"scales": rows((0.1, ["a", "b"]), (0.2, ["b"]))}, "has two scales for tensor b"),
    ],
)
def test_damaged_tables_are_refused(path, changes, message):
    edit(path, **changes)
    with pytest.raises(InputError, match=message):
        ScaleTable.load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\x00\x01"])
def test_other_files_are_refused(path, content):
    path.write_text(content)
    with pytest.raises(InputError, match=str(path)):
        ScaleTable.load(path)
