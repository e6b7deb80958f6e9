"""From pictures to scales: what is observed, what is refused, and when an earlier table is taken."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolotrt.calibration import calibrate as module
from yolotrt.calibration.activations import OnnxActivations
from yolotrt.calibration.calibrate import FoundTable, find_table, make_table, observe, scales_folder
from yolotrt.calibration.feed import PictureFeed
from yolotrt.calibration.observers import Histogram
from yolotrt.calibration.options import Int8Options
from yolotrt.calibration.table import TableSource
from yolotrt.errors import InputError, WeightsError
from yolotrt.network import recorder
from yolotrt.network.ranges import FLOORS
from yolotrt.preprocess import Letterbox
from yolotrt.weights import Weights

SIZE = (64, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("YOLOTRT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_pictures(tmp_path / "calib", 16)


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(3)
    for index in range(count):
        cv2.imwrite(str(folder / f"{index:02}.png"), random.integers(0, 256, (30 + index, 50, 3), np.uint8))
    return folder


def find(weights: Weights, calib: Path, sha: str = "1" * 64, **options: object) -> FoundTable:
    return find_table(weights, sha, SIZE, Int8Options(calib=calib, **{"method": "mse", **options}))


class _Recorded:
    """An activation source that shows what it is told to."""

    groups = (("images",), ("a", "b"))

    def __init__(self, floors=None, **tensors):
        self.floors = floors or {}
        self.tensors = {name: np.asarray(values, np.float32) for name, values in tensors.items()}

    def observe(self, images):
        yield "images", images
        yield from self.tensors.items()


SOURCE = TableSource("", SIZE, "max", "", {})


def test_pictures_come_letterboxed_as_for_inference(pictures):
    feed = PictureFeed.find(pictures, SIZE)
    seen = [batch.copy() for batch in feed.batches()]
    assert len(seen) == 16
    for path, batch in zip(feed.paths, seen, strict=True):
        image = cv2.imread(str(path))
        expected = Letterbox.fit(image.shape[:2], SIZE).apply(image)[..., ::-1].transpose(2, 0, 1) / np.float32(255)
        np.testing.assert_allclose(batch[0], expected, atol=1e-7)  # one rounding of the division


def test_the_pictures_checksum_depends_on_contents_alone(pictures, tmp_path):
    renamed = tmp_path / "renamed"
    shutil.copytree(pictures, renamed)
    (renamed / "00.png").rename(renamed / "zz.png")
    first = PictureFeed.find(pictures, SIZE).checksum()
    assert PictureFeed.find(renamed, SIZE).checksum() == first
    (renamed / "01.png").write_bytes((renamed / "02.png").read_bytes())
    assert PictureFeed.find(renamed, SIZE).checksum() != first


def test_too_few_pictures_are_refused_with_their_number(tmp_path, tiny_weights):
    folder = write_pictures(tmp_path / "few", 15)
    with pytest.raises(InputError, match=r"^15 calibration pictures can be read, at least 16 are needed"):
        find(tiny_weights, folder)


def test_unreadable_pictures_are_named_and_do_not_count(pictures, tiny_weights, caplog):
    (pictures / "03.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"^15 of 16 calibration pictures can be read"):
        find(tiny_weights, pictures)
    assert "left out of the calibration" in caplog.text
    assert str(pictures / "03.png") in caplog.text


def test_an_unreadable_picture_among_enough_is_left_out(tmp_path, tiny_weights, caplog):
    folder = write_pictures(tmp_path / "more", 17)
    (folder / "03.png").write_bytes(b"no picture")
    assert find(tiny_weights, folder).table.pictures == 16
    assert str(folder / "03.png") in caplog.text


def test_without_pictures_the_message_says_what_to_give(tmp_path, tiny_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no folder calib_images here: name yours with --calib"):
        find_table(tiny_weights, "", SIZE, Int8Options())
    (tmp_path / "calib_images").mkdir()
    with pytest.raises(InputError, match=r"^without --calib: folder calib_images holds no picture"):
        find_table(tiny_weights, "", SIZE, Int8Options())


def test_scales_are_what_the_tensors_show(pictures, tiny_weights):
    """The reference runs the network tensor by tensor in NumPy-readable outputs and takes plain maxima."""
    activations = OnnxActivations(tiny_weights, SIZE)
    feed = PictureFeed.find(pictures, SIZE)
    largest: dict[str, float] = {}
    for images in feed.batches():
        for name, values in activations.observe(images):
            floor = activations.floors.get(name, -np.inf)
            largest[name] = max(largest.get(name, 0.0), float(np.abs(np.maximum(values, floor)).max()))
    table = find(tiny_weights, pictures, method="max").table
    assert table.scales["images"] == pytest.approx(1 / 127)
    for name, value in largest.items():
        if name != "images":
            assert table.scales[name] == pytest.approx(value / 127, rel=1e-6)
    assert {f"model.{index}.{part}" for index in range(5) for part in ("conv", "act")} == set(largest) - {"images"}
    assert set(activations.floors.values()) == {FLOORS[recorder.ActivationType.SIGMOID]}


def test_tensors_of_a_group_share_the_scale_of_all_their_values(pictures):
    feed = PictureFeed.find(pictures, SIZE)
    source = _Recorded(a=[0.5, -3.0], b=[2.0])
    histograms, count = observe(source, feed)
    table = make_table(histograms, source.groups, SOURCE, count)
    assert table.scales["a"] == table.scales["b"] == pytest.approx(3 / 127)


def test_values_below_a_floor_do_not_widen_the_range(pictures):
    source = _Recorded({"a": -6.0}, a=[-100.0, 4.0], b=[1.0])
    histograms, _ = observe(source, PictureFeed.find(pictures, SIZE))
    assert (histograms["a"].largest, histograms["b"].largest) == (6.0, 1.0)


def test_memory_does_not_grow_with_the_pictures(pictures):
    histograms, _ = observe(_Recorded(a=[1.0], b=[1.0]), PictureFeed.find(pictures, SIZE))
    assert all(isinstance(histogram, Histogram) for histogram in histograms.values())
    assert {histogram.counts.nbytes for histogram in histograms.values()} == {4096 * 8}


def test_a_tensor_that_is_not_finite_is_named(pictures):
    with pytest.raises(WeightsError, match="tensor a is NaN or infinite in the float network"):
        observe(_Recorded(a=[np.nan], b=[1.0]), PictureFeed.find(pictures, SIZE))


def test_values_beyond_fp16_are_refused_by_name(pictures):
    source = _Recorded(a=[1e6], b=[1.0])
    histograms, count = observe(source, PictureFeed.find(pictures, SIZE))
    with pytest.raises(InputError, match=r"the scale of tensor a would be .* exceed the range of fp16"):
        make_table(histograms, source.groups, SOURCE, count)


def test_a_tensor_of_zeros_gets_a_harmless_scale_and_is_named(pictures, caplog):
    source = _Recorded(a=[0.0], b=[0.0])
    histograms, count = observe(source, PictureFeed.find(pictures, SIZE))
    assert make_table(histograms, source.groups, SOURCE, count).scales["a"] > 0
    assert "tensor a is 0 in all pictures" in caplog.text


def test_the_same_calibration_is_taken_from_the_cache(pictures, tiny_weights, monkeypatch):
    first = find(tiny_weights, pictures)
    assert first.origin == "calibrated now"
    monkeypatch.setattr(module, "observe", lambda *_: pytest.fail("calibrated again"))
    second = find(tiny_weights, pictures)
    assert second.table == first.table
    assert second.origin.startswith("from an earlier calibration with the same pictures")
    assert str(scales_folder()) in second.origin


@pytest.mark.parametrize("change", ["weights", "pictures", "method"])
def test_a_stale_table_is_never_used(pictures, tiny_weights, change):
    find(tiny_weights, pictures)
    sha, options = "1" * 64, {}
    if change == "weights":
        sha = "2" * 64
    elif change == "pictures":
        cv2.imwrite(str(pictures / "00.png"), np.zeros((9, 9, 3), np.uint8))
    else:
        options = {"method": "max"}
    assert find(tiny_weights, pictures, sha, **options).origin == "calibrated now"


@pytest.mark.parametrize("damage", ["{", '{"format": "x"}'])
def test_a_damaged_cache_is_said_and_made_again(pictures, tiny_weights, damage, caplog):
    find(tiny_weights, pictures)
    (path,) = scales_folder().iterdir()
    path.write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert find(tiny_weights, pictures).origin == "calibrated now"
    assert str(path) in caplog.text
    assert "calibrating again" in caplog.text
    assert find(tiny_weights, pictures).origin != "calibrated now"


def test_a_named_table_is_written_and_then_taken_as_it_is_edited(pictures, tiny_weights, tmp_path):
    path = tmp_path / "mine.json"
    assert str(path) in find(tiny_weights, pictures, table=path).origin
    values = json.loads(path.read_text())
    row = next(row for row in values["scales"] if "model.0.act" in row["tensors"])
    row["scale"] = 0.125
    path.write_text(json.dumps(values))
    again = find(tiny_weights, tmp_path / "no pictures needed", table=path)
    assert again.origin == f"read from {path}"
    assert again.table.scales["model.0.act"] == 0.125


def test_a_named_table_of_another_model_is_refused(pictures, tiny_weights, tmp_path):
    path = tmp_path / "mine.json"
    find(tiny_weights, pictures, table=path)
    with pytest.raises(InputError, match="was made for other weights"):
        find(tiny_weights, pictures, "2" * 64, table=path)
    metadata = replace(tiny_weights.metadata, imgsz=(96, 96))
    with pytest.raises(InputError, match="was made for pictures of 64x64, not 96x96"):
        find_table(replace(tiny_weights, metadata=metadata), "1" * 64, (96, 96), Int8Options(table=path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "median"}, "calibration method 'median' is not known: choose one of auto, max, "),
        ({"keep": ("auto", "model.1")}, "--int8-keep takes auto, none or names of layers"),
        ({"keep": ("none", "auto")}, "--int8-keep takes auto, none or names of layers"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        Int8Options(**options)
