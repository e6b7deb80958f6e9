from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "demo_model"
sys.path.insert(0, str(TOOLS))

import datasets  # noqa: E402
import render  # noqa: E402
import signs  # noqa: E402


def test_dataset_command_writes_agreeing_yolo_and_coco_labels(tmp_path: Path) -> None:
    assert render.main(["dataset", "--out", str(tmp_path), "--count", "4", "--seed", "3", "--size", "320", "256"]) == 0
    coco = json.loads((tmp_path / "instances.json").read_text())
    assert [item["file_name"] for item in coco["images"]] == [
        path.name for path in sorted((tmp_path / "images").iterdir())
    ]
    assert [item["name"] for item in coco["categories"]] == list(signs.CLASS_NAMES)
    total = 0
    for item in coco["images"]:
        picture = cv2.imread(str(tmp_path / "images" / item["file_name"]))
        assert picture.shape == (256, 320, 3)
        text = (tmp_path / "labels" / item["file_name"]).with_suffix(".txt").read_text()
        mine = [a for a in coco["annotations"] if a["image_id"] == item["id"]]
        rows = [[float(value) for value in line.split()] for line in text.splitlines()]
        assert [row[0] for row in rows] == [a["category_id"] for a in mine]
        for row, annotation in zip(rows, mine, strict=True):
            left, top, width, height = annotation["bbox"]
            expected = [(left + width / 2) / 320, (top + height / 2) / 256, width / 320, height / 256]
            assert row[1:] == pytest.approx(
                expected, abs=2e-5
            )  # the text has six digits, the json thousandths of a pixel
        total += len(mine)
    assert total == len(coco["annotations"]) > 0


def test_pool_and_single_process_render_the_same() -> None:
    recipe = datasets.Recipe(7, 3, ((160, 160), (96, 64)))
    alone, pooled = list(datasets.render_many(recipe)), list(datasets.render_many(recipe, workers=2))
    assert [image.shape for image, _, _ in alone] == [(160, 160, 3), (64, 96, 3), (160, 160, 3)]
    assert all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(alone, pooled, strict=True))


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--count", "1", "--size", "32", "640"]])
def test_impossible_dataset_is_refused_in_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render.main(["dataset", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sets_share_no_picture() -> None:
    train = pytest.importorskip("train", reason="the trainer needs torch")
    seeds = [train.TRAIN_SEED, train.EVAL_SEED, train.EMPTY_SEED]
    seeds += [recipe.seed for recipe in (datasets.CALIBRATION, datasets.EVALUATION, datasets.SIGN_FREE)]
    assert len(set(seeds)) == len(seeds)
    assert max(sample.seed for sample in datasets.SAMPLES) < min(seeds) * datasets.SEED_STEP
    assert max(train.Plan().count, datasets.EVALUATION.count) < datasets.SEED_STEP


@pytest.mark.parametrize(("command", "recipe"), [("calibration", "CALIBRATION"), ("evaluation", "EVALUATION")])
def test_commands_write_their_set(
    command: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets, recipe, datasets.Recipe(5, 2, ((96, 64),)))  # the true one, but small
    assert render.main([command, "--out", str(tmp_path)]) == 0
    assert "2 pictures" in capsys.readouterr().out
    expected = render_files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    if command == "calibration":
        expected = ["00.jpg", "01.jpg", "labels.json"]
    else:
        expected = [
            "data.yaml",
            "images/000000.jpg",
            "images/000001.jpg",
            "instances.json",
            "labels/000000.txt",
            "labels/000001.txt",
        ]
    assert render_files == expected


def test_samples_command_writes_pictures_labels_and_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = (datasets.Sample("a.png", 3, (160, 96)), datasets.Sample("b.webp", 4, (96, 160)))
    monkeypatch.setattr(datasets, "SAMPLES", samples)
    monkeypatch.setattr(datasets, "render_drive", lambda path, seed: path.write_bytes(bytes([seed])))
    assert render.main(["samples", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.webp", "drive.mp4", "labels.json"]
    labels = json.loads((tmp_path / "labels.json").read_text())
    assert [(item["file_name"], item["width"], item["height"]) for item in labels["images"]] == [
        ("a.png", 160, 96),
        ("b.webp", 96, 160),
    ]
    scene, boxes, _ = datasets.render_scene(3, (160, 96))
    assert np.array_equal(cv2.imread(str(tmp_path / "a.png")), scene)
    assert len([item for item in labels["annotations"] if item["image_id"] == 0]) == len(boxes)
