from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "demo_model"
sys.path.insert(0, str(TOOLS))

import datasets  # noqa: E402
import evaluate  # noqa: E402
import metrics  # noqa: E402

from yolotrt.postprocess import Boxes  # noqa: E402


def _labels(rng: np.random.RandomState) -> tuple[dict, list[Boxes], list[metrics.Boxes]]:
    """Boxes of three classes in six pictures; detections near them, of the wrong class, or nowhere near."""
    images, annotations, found, truth = [], [], [], []
    for index in range(6):
        images.append({"id": index, "file_name": f"{index}.jpg", "width": 640, "height": 640})
        corner, side = rng.uniform(0, 500, (5, 2)), rng.uniform(8, 100, (5, 1))
        class_id = rng.randint(0, 3, 5)
        for box, label in zip(np.hstack([corner, side, side]).tolist(), class_id.tolist(), strict=True):
            identity = len(annotations) + 1
            annotations.append({"id": identity, "image_id": index, "category_id": label, "bbox": box,
                                "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
        xyxy = np.hstack([corner, corner + side]).astype(np.float32)
        moved = (xyxy + rng.normal(0, 0.06, xyxy.shape) * side).astype(np.float32)
        guess = np.where(rng.rand(5) < 0.8, class_id, (class_id + 1) % 3)
        confidence = rng.permutation(np.linspace(0.1, 0.9, 5) + index * 1e-3).astype(np.float32)
        order = np.argsort(-confidence)
        found.append(Boxes(moved[order], confidence[order], guess[order].astype(np.int64)))
        truth.append(metrics.Boxes(xyxy, class_id.astype(np.int64), np.ones(5, np.float32)))
    categories = [{"id": index, "name": str(index)} for index in range(3)]
    return {"images": images, "annotations": annotations, "categories": categories}, found, truth


def test_coco_figures_agree_with_our_own_metric() -> None:
    pytest.importorskip("faster_coco_eval", reason="the COCO metric needs faster-coco-eval")
    labels, found, truth = _labels(np.random.RandomState(3))
    figures = evaluate.coco_figures(labels, found)
    own = metrics.average_precision([metrics.Boxes(f.xyxy, f.class_id, f.confidence) for f in found], truth, 3)
    assert 0.2 < figures["mAP50-95 all"] < figures["mAP50 all"] < 0.95  # neither trivial
    assert figures["mAP50 all"] == pytest.approx(float(own[:, 0].mean()), abs=1e-4)  # four digits are given
    assert figures["mAP50-95 all"] == pytest.approx(float(own.mean()), abs=1e-4)


def test_small_figures_count_small_boxes_only() -> None:
    pytest.importorskip("faster_coco_eval", reason="the COCO metric needs faster-coco-eval")
    labels, _, truth = _labels(np.random.RandomState(4))
    sides = [boxes.xyxy[:, 2] - boxes.xyxy[:, 0] for boxes in truth]
    large = [
        Boxes(boxes.xyxy[side >= 24], np.ones(int((side >= 24).sum()), np.float32), boxes.class_id[side >= 24])
        for boxes, side in zip(truth, sides, strict=True)
    ]  # all large boxes found, no small one
    figures = evaluate.coco_figures(labels, large)
    assert figures["mAP50 large"] == figures["mAP50-95 large"] == 1
    assert figures["mAP50 small"] == 0


def test_detections_are_in_the_pictures_own_pixels() -> None:
    def predict(picture: np.ndarray) -> np.ndarray:  # one box in the middle, another too weak
        assert picture.shape == (1, 3, 640, 640)
        return np.array([[320, 320, 64, 32, 0.9, 0.8], [100, 100, 10, 10, 0.0005, 1]], np.float32)

    (boxes,) = evaluate.detect([np.zeros((640, 1280, 3), np.uint8)], predict)
    assert boxes.xyxy.tolist() == [[576, 288, 704, 352]]
    assert boxes.confidence.tolist() == pytest.approx([0.72])


def test_missing_evaluation_set_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_command_prints_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faster_coco_eval", reason="the COCO metric needs faster-coco-eval")
    pytest.importorskip("onnxruntime", reason="runs the engine")
    monkeypatch.setattr(evaluate, "SIGN_FREE", evaluate.Recipe(9, 1, max_signs=0))
    datasets.write_dataset(tmp_path, evaluate.render_many(evaluate.Recipe(9, 2)))
    assert evaluate.main(["--data", str(tmp_path), "--no-torch", "--threads", "1"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["pictures"] == 2
    assert figures["sign-free pictures"] == 1
    assert set(figures["ONNX Runtime"]) == {
        f"{n} {s}" for n in ("mAP50", "mAP50-95") for s in ("all", "small", "large")
    }
