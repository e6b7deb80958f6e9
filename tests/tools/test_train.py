from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the trainer needs torch")
TOOLS = Path(__file__).resolve().parents[2] / "tools" / "demo_model"
sys.path.insert(0, str(TOOLS))

import loss  # noqa: E402
import metrics  # noqa: E402
import model as network  # noqa: E402
import train  # noqa: E402


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((5, 5, 4, 4), (5, 5, 4, 4), 1.0),
        # Shifted by half: inner 2 x 4 = 8, union 24, centre distance 4, diagonal 6^2 + 4^2 = 52.
        ((5, 5, 4, 4), (7, 5, 4, 4), 8 / 24 - 4 / 52),
        # Apart: IoU 0, distance 100, diagonal 14^2 + 4^2 = 212.
        ((0, 0, 4, 4), (10, 0, 4, 4), -100 / 212),
        # 4 x 4 inside 8 x 4: IoU 1/2, v = 4 / pi^2 (atan 1 - atan 2)^2, alpha = v / (v - 1/2 + 1).
        ((0, 0, 4, 4), (0, 0, 8, 4), 0.5 - (v := 4 / math.pi**2 * (math.atan(1) - math.atan(2)) ** 2) ** 2 / (v + 0.5)),
    ],
    ids=["equal", "half shifted", "apart", "other aspect"],
)
def test_ciou_has_the_hand_computed_value(first, second, expected) -> None:
    value = loss.ciou(torch.tensor([first], dtype=torch.float64), torch.tensor([second], dtype=torch.float64))
    assert value.item() == pytest.approx(expected, abs=1e-6)


ONE_ANCHOR = torch.tensor([[2.0, 2.0]])


@pytest.mark.parametrize(
    ("middle", "cells"),
    [
        ((4.3, 4.6), {(4, 4), (3, 4), (4, 5)}),  # left half and lower half: left and lower neighbours
        ((4.7, 4.2), {(4, 4), (5, 4), (4, 3)}),
        ((0.3, 0.3), {(0, 0)}),  # no cell left of or above the first
        ((9.8, 9.8), {(9, 9)}),  # nor right of or below the last
    ],
)
def test_box_is_assigned_to_its_cell_and_the_two_nearest(middle, cells) -> None:
    targets = torch.tensor([[3.0, 7.0, middle[0] * 8, middle[1] * 8, 16.0, 16.0]])
    found = loss.assign(targets, ONE_ANCHOR, (10, 10), 8.0)
    assert {(int(x), int(y)) for x, y in zip(found.column, found.row, strict=True)} == cells
    assert len(found.row) == len(cells)
    assert set(found.image.tolist()) == {3}
    assert set(found.class_id.tolist()) == {7}
    position = found.box[:, :2] + torch.stack((found.column, found.row), 1)
    assert torch.allclose(position, torch.tensor(middle).expand_as(position), atol=1e-5)
    assert torch.allclose(found.box[:, 2:], torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize(
    ("width", "height", "anchors"),
    [(2.0, 2.0, {0, 1}), (7.9, 2.0, {0, 1}), (8.1, 2.0, {1}), (0.6, 0.6, {0}), (30.0, 30.0, {1}), (40.0, 1.0, set())],
)
def test_anchors_match_when_both_sides_differ_by_less_than_four_times(width, height, anchors) -> None:
    table = torch.tensor([[2.0, 2.0], [7.8, 7.8]])
    targets = torch.tensor([[0.0, 0.0, 4.5 * 8, 4.5 * 8, width * 8, height * 8]])
    assert set(loss.assign(targets, table, (10, 10), 8.0).anchor.tolist()) == anchors


def _heads(batch: int = 1, classes: int = 3) -> list[torch.Tensor]:
    return [torch.zeros(batch, 3, 64 // s, 64 // s, 5 + classes) for s in network.STRIDES]


ANCHORS = torch.tensor(network.ANCHORS, dtype=torch.float32).view(3, 3, 2) / torch.tensor(network.STRIDES).view(3, 1, 1)


def test_loss_without_boxes_is_objectness_alone() -> None:
    total, parts = loss.detection_loss(_heads(), torch.zeros(0, 6), ANCHORS, network.STRIDES)
    # log 2 in every cell, weighted 4 + 1 + 0.4, for 64 instead of 640 pixels.
    assert parts.tolist() == pytest.approx([0, math.log(2) * 5.4 * 0.01, 0], rel=1e-5)
    assert total.item() == pytest.approx(sum(parts.tolist()), rel=1e-6)


def test_perfect_prediction_has_no_box_and_class_loss() -> None:
    heads = _heads()
    targets = torch.tensor([[0.0, 1.0, 20.0, 20.0, 14.0, 14.0]])  # the first anchor's own size, in the middle of a cell
    before = loss.detection_loss(heads, targets, ANCHORS, network.STRIDES)[1]
    for level, head in enumerate(heads):
        found = loss.assign(targets, ANCHORS[level], (head.shape[2], head.shape[3]), network.STRIDES[level])
        place = (found.image, found.anchor, found.row, found.column)
        head[(*place, slice(0, 2))] = torch.logit((found.box[:, :2] + 0.5) / 2, eps=1e-6)
        ratio = (found.box[:, 2:] / ANCHORS[level][found.anchor]) ** 0.5 / 2
        head[(*place, slice(2, 4))] = torch.logit(ratio, eps=1e-6)
        head[(*place, slice(5, 8))] = torch.tensor([-20.0, 20.0, -20.0])
    after = loss.detection_loss(heads, targets, ANCHORS, network.STRIDES)[1]
    assert before[0] > 0.01 and before[2] > 0.01
    assert after[0].item() == pytest.approx(0, abs=1e-5)
    assert after[2].item() == pytest.approx(0, abs=1e-5)


def test_decoding_inverts_the_assignment() -> None:
    model = network.DetectionModel(network.yolov5n_yaml(3), ["a", "b", "c"])
    heads = _heads()
    heads[1][0, 2, 1, 3, :5] = torch.tensor([0.5, -0.5, 0.25, -0.25, 3.0])
    rows = network.decode(heads, model.model[-1])
    row = 3 * 64 + 2 * 16 + 1 * 4 + 3  # level, then anchor, then y, then x
    sigmoid = torch.sigmoid(heads[1][0, 2, 1, 3, :5])
    expected = [
        (sigmoid[0] * 2 - 0.5 + 3) * 16, (sigmoid[1] * 2 - 0.5 + 1) * 16,
        (sigmoid[2] * 2) ** 2 * 86, (sigmoid[3] * 2) ** 2 * 86, sigmoid[4],
    ]  # fmt: skip
    assert rows.shape == (1, 3 * (64 + 16 + 4), 8)
    assert rows[0, row, :5].tolist() == pytest.approx([float(value) for value in expected], rel=1e-6)


def test_module_tree_equals_the_official_one(golden: Path) -> None:
    checkpoint = pytest.importorskip("yolotrt.weights.checkpoint", reason="the restricted reader is not there yet")
    official = checkpoint.read_checkpoint(golden / "weights" / "yolov5n.pt")
    names = official.metadata.names
    yaml = {**network.yolov5n_yaml(80), "anchors": official.metadata.yaml["anchors"]}
    assert yaml == official.metadata.yaml
    model = network.DetectionModel(yaml, names).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_872_157
    state = {name: torch.from_numpy(np.array(array)) for name, array in official.tensors.items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus
    assert all(name.endswith(("num_batches_tracked", "anchors")) for name in missing)
    model.model[-1].anchors.copy_(
        torch.tensor(yaml["anchors"]).view(3, 3, 2) / torch.tensor(network.STRIDES).view(3, 1, 1)
    )
    picture = np.random.RandomState(0).rand(1, 3, 384, 640).astype(np.float32)
    with torch.no_grad():
        decoded = network.decode(model(torch.from_numpy(picture)), model.model[-1]).numpy()
    expected = np.load(golden / "expected" / "yolov5n_raw.npz")["384x640_decoded"]
    # The reference data state 5e-3 px as the tolerance between two fp32 implementations.
    assert np.abs(decoded - expected).max() < 5e-3


def _data(labels: list[list[list[float]]], size: int = 64) -> train.Pictures:
    table = torch.full((len(labels), 8, 5), -1.0)
    for index, rows in enumerate(labels):
        for row, values in enumerate(rows):
            table[index, row] = torch.tensor(values)
    levels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1) * 20 + 50
    return train.Pictures(levels.expand(-1, 3, size, size).contiguous(), table)


def test_compose_without_change_returns_the_picture_and_its_labels() -> None:
    pictures, labels, _ = train.scene.render_scene(3, (64, 64)), [[[1, 10, 12, 30, 40]]], None
    data = _data(labels)
    data.images[0] = torch.from_numpy(pictures[0][..., ::-1].copy()).permute(2, 0, 1)
    layout = train.Layout(torch.full((1, 2), 64.0), torch.ones(1, 4), torch.zeros(1, 4, 2))
    images, targets = train.compose(data, torch.zeros(1, 4, dtype=torch.long), layout)
    assert torch.allclose(images * 255, data.images.float(), atol=1e-2)
    assert targets.tolist() == [[0, 1, 20, 26, 20, 28]]


def test_mosaic_puts_each_tile_into_its_quadrant_and_cuts_boxes() -> None:
    data = _data([[[0, 0, 0, 10, 10]], [[1, 20, 20, 40, 60]], [], [[2, 0, 0, 12, 12], [3, 50, 50, 60, 60]]])
    origin = torch.tensor([[[-4.0, 0.0], [32.0, 0.0], [0.0, 40.0], [32.0, 32.0]]])
    layout = train.Layout(torch.tensor([[32.0, 32.0]]), torch.tensor([[1.0, 0.5, 1.0, 2.0]]), origin)
    images, targets = train.compose(data, torch.arange(4)[None], layout)
    values = torch.round(images[0, 0] * 255)
    assert values[5, 5] == 50
    assert values[5, 50] == 70  # half size: the tile ends at row 32
    assert values[36, 5] == 114  # the third tile starts at row 40
    assert values[50, 5] == 90
    assert values[50, 50] == 110
    assert targets.tolist() == [
        [0, 0, 3.0, 5.0, 6.0, 10.0],  # cut on the left
        [0, 1, 47.0, 20.0, 10.0, 20.0],
        [0, 2, 44.0, 44.0, 24.0, 24.0],  # the fourth tile's other box is outside
    ]


def test_augmented_boxes_stay_on_their_signs() -> None:
    size = 128
    data = _data([[[index % 5, 40, 50, 72, 90]] for index in range(4)], size)
    data.images[:] = 0
    data.images[:, :, 50:90, 40:72] = 255
    generator = torch.Generator().manual_seed(3)
    layout = train.pick_layout(16, size, 0.6, generator, torch.device("cpu"))
    images, targets = train.compose(data, torch.randint(4, (16, 4), generator=generator), layout)
    assert len(targets) > 10
    for image, _, x, y, width, height in targets.tolist():
        rows = slice(max(0, round(y - height / 2) + 1), round(y + height / 2) - 1)
        columns = slice(max(0, round(x - width / 2) + 1), round(x + width / 2) - 1)
        assert images[int(image), 0, rows, columns].mean() > 0.95


def test_colour_change_keeps_grey_grey_and_range() -> None:
    images = torch.full((4, 3, 8, 8), 0.4)
    changed = train.change_colours(images, torch.Generator().manual_seed(1))
    assert (changed.amax(1) - changed.amin(1)).max() < 1e-3  # the rounded YIQ matrix is good to three digits
    assert len({round(float(value), 4) for value in changed[:, 0, 0, 0]}) == 4
    assert changed.min() >= 0
    assert changed.max() <= 1


def _boxes(rows: list[tuple[float, ...]]) -> metrics.Boxes:
    table = np.array(rows, np.float32).reshape(-1, 6)
    return metrics.Boxes(table[:, :4], table[:, 4].astype(np.int64), table[:, 5])


def test_average_precision_has_the_hand_computed_value() -> None:
    truth = [_boxes([(0, 0, 10, 10, 0, 1), (20, 0, 30, 10, 0, 1)]), _boxes([(0, 0, 10, 10, 0, 1)])]
    found = [
        _boxes([(0, 0, 10, 10, 0, 0.9), (50, 50, 60, 60, 0, 0.8)]),  # a hit, then a miss
        _boxes([(0, 0, 10, 8, 0, 0.7)]),  # IoU 0.8: a hit up to that threshold
    ]
    table = metrics.average_precision(found, truth, 2)
    # Precision 1 up to recall 1/3 (34 of 101 points), 2/3 up to 2/3 (33 more), 0 beyond.
    assert table[0, 0] == pytest.approx((34 + 33 * 2 / 3) / 101, abs=1e-6)
    assert table[0, -1] == pytest.approx(34 / 101, abs=1e-6)
    assert np.isnan(table[1]).all()


def test_average_precision_by_size_ignores_the_others() -> None:
    truth = [_boxes([(0, 0, 10, 10, 0, 1), (100, 100, 200, 200, 0, 1)])]
    found = [_boxes([(100, 100, 200, 200, 0, 0.9), (0, 0, 10, 10, 0, 0.8), (300, 300, 400, 400, 0, 0.99)])]
    assert metrics.average_precision(found, truth, 1, (0, 24))[0] == pytest.approx(1.0, abs=1e-6)
    assert metrics.average_precision(found, truth, 1)[0, 0] < 0.7


def test_second_detection_of_a_label_is_a_miss() -> None:
    truth = [_boxes([(0, 0, 10, 10, 0, 1), (50, 50, 60, 60, 0, 1)])]
    found = [_boxes([(0, 0, 10, 10, 0, 0.9), (0, 0, 10, 9, 0, 0.8), (50, 50, 60, 60, 0, 0.7)])]
    # Precision 1 up to recall 1/2 (51 of 101 points), then 2/3.
    assert metrics.average_precision(found, truth, 1)[0, 0] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-6)


def test_selection_drops_overlapping_boxes_of_a_class_only() -> None:
    rows = np.array(
        [[10, 10, 8, 8, 0.9, 0.9, 0.0], [10.5, 10, 8, 8, 0.8, 0.9, 0.0], [10, 10, 8, 8, 0.7, 0.0, 0.9]], np.float32
    )
    kept = metrics.select(rows, 0.25, 0.6)
    assert kept.class_id.tolist() == [0, 1]
    assert kept.confidence.tolist() == pytest.approx([0.81, 0.63], rel=1e-6)
    assert kept.xyxy[0].tolist() == [6, 6, 14, 14]


def test_batches_of_a_step_repeat() -> None:
    data = _data([[[0, 10, 10, 40, 40]]] * 4)
    plan = replace(train.SMOKE, count=4, batch=2, size=64, total_steps=100)
    first, again, later = (train.make_batch(data, plan, step) for step in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], later[0])


@pytest.mark.slow
def test_smoke_run_learns_stops_resumes_and_writes_a_readable_checkpoint(tmp_path: Path) -> None:
    common = ["--smoke", "--workers", "0", "--eval-count", "4"]
    assert train.main([*common, "--out", str(tmp_path / "a"), "--minutes", "0.03"]) == 0
    first = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert 0 < first["step"] < first["total_steps"]
    resume = ["--smoke", "--workers", "0", "--resume", str(tmp_path / "a" / "state.pt"), "--out", str(tmp_path / "b")]
    assert train.main(resume) == 0
    final = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert final["step"] == final["total_steps"] == first["total_steps"]
    assert final["history"][: len(first["history"])] == first["history"]
    losses = np.array([row[1:3] for row in final["history"]])  # the sum, and the box part
    assert (losses[-3:].mean(axis=0) < losses[:3].mean(axis=0)).all()
    for name in ("best.pt", "state.pt"):
        assert (tmp_path / "b" / name).stat().st_size < 16 << 20
    checkpoint = pytest.importorskip("yolotrt.weights.checkpoint", reason="the restricted reader is not there yet")
    weights = checkpoint.read_checkpoint(tmp_path / "b" / "best.pt")
    assert weights.metadata.names == train.scene.CLASS_NAMES
    assert weights.metadata.anchors[2][2] == pytest.approx((251, 251))
    assert weights.tensors["model.24.m.0.weight"].shape == (51, 64, 1, 1)


def test_a_file_that_is_no_state_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.pt").write_bytes(b"nothing")
    assert train.main(["--out", str(tmp_path), "--resume", str(tmp_path / "state.pt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
