"""`detect` in a program with Ray."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from yolotrt import Detector
from yolotrt.distributed import detect
from yolotrt.distributed.worker import DetectorActor, reserved_by
from yolotrt.engines.file import EngineFile
from yolotrt.errors import ImageError, InputError, YolotrtError


def test_pictures_that_ray_has_read_are_detected_in(ray_cluster, engine_path, pictures):
    """Contents of files, and decoded pictures, which Ray has in RGB."""
    files = ray_cluster.data.read_binary_files(str(pictures), include_paths=True)
    found = detect(files, engine_path, confidence=0.4).to_pandas()
    (pictures / "broken.jpg").unlink()
    images = ray_cluster.data.read_images(str(pictures), include_paths=True, mode="RGB")
    decoded = detect(images, engine_path, confidence=0.4).to_pandas()
    with Detector(engine_path, confidence=0.4) as detector:
        for path in pictures.iterdir():
            expected = detector(path)
            for table in (found, decoded):
                rows = table[table["path"] == str(path)]
                boxes = rows[["x1", "y1", "x2", "y2"]].dropna().to_numpy(np.float32)
                np.testing.assert_array_equal(boxes, expected.xyxy)
                assert (rows["found"] == max(len(expected), 1)).all()
    (message,) = found["error"].dropna()
    assert "broken.jpg is truncated" in message
    assert "bytes" not in found.columns


def actor_of(engine: EngineFile, monkeypatch) -> DetectorActor:
    """A worker without a cluster."""
    monkeypatch.setattr("ray.get", lambda reference: reference)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    return DetectorActor(engine, {"threads": 1}, None)


def test_masks_and_classes_are_columns(monkeypatch, tiny_segment_engine, tiny_classifier_engine):
    import pyarrow as pa

    picture = np.random.RandomState(0).randint(0, 256, (50, 70, 3), np.uint8)
    table = pa.table({"bytes": [cv2.imencode(".png", picture)[1].tobytes()]})
    (found,) = actor_of(tiny_segment_engine, monkeypatch)(table)
    with Detector(tiny_segment_engine) as detector:
        masks = detector(picture).masks
        assert found["segmentation"].to_pylist() == [masks.rle(n)["counts"] for n in range(len(masks))] != []
    (classes,) = actor_of(tiny_classifier_engine, monkeypatch)(table)
    with Detector(tiny_classifier_engine) as detector:
        best = detector(picture).top()
    assert list(zip(classes["class_id"].to_pylist(), classes["name"].to_pylist(), strict=True)) == [
        (index, name) for index, name, _ in best
    ]
    assert classes["x1"].null_count == 5


def test_a_worker_without_memory_is_one_line_that_names_its_machine(monkeypatch, tiny_engine):
    import pyarrow as pa

    actor = actor_of(tiny_engine, monkeypatch)
    monkeypatch.setattr(actor, "_results", lambda _table: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(YolotrtError, match=r"^machine 10.0.0.7: out of memory: take fewer workers"):
        list(actor(pa.table({})))


def test_a_dataset_without_pictures_is_refused(monkeypatch, tiny_engine):
    import pyarrow as pa

    with pytest.raises(InputError, match="no column bgr, image, bytes"):
        list(actor_of(tiny_engine, monkeypatch)(pa.table({"picture": [b""]})))


@pytest.mark.parametrize(
    ("on_gpu", "gpus", "threads", "expected"),
    [
        (False, None, 1, {"num_cpus": 1}),
        (False, None, 3, {"num_cpus": 3}),
        (True, None, 1, {"num_cpus": 1, "num_gpus": 1}),
        (True, 0.5, 1, {"num_cpus": 1, "num_gpus": 0.5}),
        (True, 1.5, 1, "choose a share of 1, or a whole number"),
        (False, 1, 1, "runs on the CPU: leave out"),
    ],
)
def test_workers_reserve_what_they_use(tiny_engine, on_gpu, gpus, threads, expected):
    engine = EngineFile(replace(tiny_engine.header, yololayer="kernel" if on_gpu else "host"), b"")
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            reserved_by(engine, gpus, threads)
    else:
        assert reserved_by(engine, gpus, threads) == expected


def test_errors_survive_the_way_between_processes():
    import pickle

    for error in (ImageError("x: y"), InputError("x: y")):
        assert str(pickle.loads(pickle.dumps(error))) == "x: y"
