"""Frames in device memory: where they are, and one clear line for what is none."""

from __future__ import annotations

import contextlib
import sys
import types

import numpy as np
import pytest

from yolotrt.cuda.interop import device_pixels
from yolotrt.errors import ImageError


class Array:
    """What the CUDA array interface says of an array."""

    def __init__(self, **changes):
        self.__cuda_array_interface__ = {
            "data": (4096, False),
            "shape": (20, 10, 3),
            "typestr": "|u1",
            "version": 3,
            **changes,
        }


@pytest.mark.parametrize(
    ("changes", "size", "pitch"),
    [
        ({}, (20, 10), 30),
        ({"strides": None}, (20, 10), 30),
        ({"strides": (30, 3, 1)}, (20, 10), 30),
        ({"strides": (64, 3, 1)}, (20, 10), 64),  # rows apart
        ({"typestr": "<u1"}, (20, 10), 30),
        ({"data": (np.int64(4096), True)}, (20, 10), 30),  # read-only
        ({"shape": [1, 1, 3]}, (1, 1), 3),
    ],
)
def test_a_frame_is_found(changes, size, pitch):
    frame = Array(**changes)
    pixels = device_pixels(frame, 5)
    assert (pixels.address, pixels.size, pixels.pitch) == (4096, size, pitch)
    assert pixels.owner is frame


@pytest.mark.parametrize(
    ("changes", "stream"),
    [
        ({}, None),
        ({"stream": None}, None),
        ({"stream": 1}, 1),
        ({"stream": 140_000}, 140_000),
        ({"version": 2}, 1),  # which says nothing of a stream: the default one
        ({"version": 0, "stream": 7}, 1),
    ],
)
def test_the_stream_that_makes_it_is_known(changes, stream):
    assert device_pixels(Array(**changes), 5).stream == stream


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"typestr": "<f4"},
            "a frame must be uint8 BGR (height, width, 3), not <f4 (20, 10, 3): convert it on the GPU",
        ),
        ({"typestr": "|i1"}, "not |i1 (20, 10, 3)"),
        ({"typestr": "|b1"}, "not |b1 (20, 10, 3)"),
        ({"shape": (20, 10)}, "not |u1 (20, 10)"),
        ({"shape": (20, 10, 4)}, "not |u1 (20, 10, 4)"),
        ({"shape": (3, 20, 10)}, "not |u1 (3, 20, 10)"),
        ({"shape": (1, 20, 10, 3)}, "not |u1 (1, 20, 10, 3)"),
        ({"shape": (0, 10, 3)}, "not |u1 (0, 10, 3)"),
        ({"shape": (20, 0, 3)}, "not |u1 (20, 0, 3)"),
        (
            {"strides": (1, 20, 200)},  # channels first
            "a frame's rows must be contiguous, its strides are (1, 20, 200): make it contiguous",
        ),
        ({"strides": (30, 3, -1)}, "its strides are (30, 3, -1)"),  # RGB shown as BGR
        ({"strides": (30, -3, 1)}, "its strides are (30, -3, 1)"),  # mirrored
        ({"strides": (-30, 3, 1)}, "its strides are (-30, 3, 1)"),  # upside down
        ({"strides": (60, 6, 1)}, "its strides are (60, 6, 1)"),  # every second pixel
        ({"strides": (0, 3, 1)}, "its strides are (0, 3, 1)"),  # one row shown often
        ({"strides": (29, 3, 1)}, "its strides are (29, 3, 1)"),
    ],
)
def test_what_is_no_frame_is_one_clear_line(changes, message):
    with pytest.raises(ImageError) as caught:
        device_pixels(Array(**changes), 5)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("thing", "kind"), [("frame.jpg", "str"), ([[1]], "list"), (None, "NoneType"), (3, "int")])
def test_what_is_no_array_is_said_to_be_none(thing, kind):
    with pytest.raises(ImageError, match=f"^a frame of type {kind} is no array: pass NumPy or device arrays$"):
        device_pixels(thing, 5)


class Exchanged:
    """An array that only DLPack tells of."""

    def __dlpack__(self, **options):
        return None


def test_dlpack_needs_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    message = r"^a frame of type Exchanged is only read with CuPy \(.*\): install yolotrtx\[gpu\], or give an array"
    with pytest.raises(ImageError, match=message):
        device_pixels(Exchanged(), 5)


class FakeCupy(types.ModuleType):
    """As far as an exchange uses it."""

    def __init__(self, result):
        super().__init__("cupy")
        self.streams = []
        self.cuda = types.SimpleNamespace(ExternalStream=self._on)
        self._result = result

    @contextlib.contextmanager
    def _on(self, stream):
        self.streams.append(stream)
        yield
        self.streams.append("left")

    def from_dlpack(self, frame):
        self.streams.append("read")
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def test_dlpack_orders_the_streams_itself(monkeypatch):
    array = Array(stream=9)
    cupy = FakeCupy(array)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    pixels = device_pixels(Exchanged(), 5)
    assert cupy.streams == [5, "read", "left"]
    assert (pixels.address, pixels.stream) == (4096, None)
    assert pixels.owner is array


class OldArray(Array, Exchanged):
    """As of PyTorch: the interface of old names no stream, DLPack orders them."""

    def __init__(self):
        super().__init__(version=2)


@pytest.mark.parametrize(("is_there", "stream"), [(True, None), (False, 1)])
def test_where_the_interface_names_no_stream_dlpack_does(monkeypatch, is_there, stream):
    array, frame = Array(stream=9), OldArray()
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(array) if is_there else None)
    pixels = device_pixels(frame, 5)
    assert pixels.stream == stream
    assert pixels.owner is (array if is_there else frame)


@pytest.mark.parametrize(
    "problem", [RuntimeError("CPU arrays cannot be directly imported to CuPy"), BufferError("not exportable")]
)
def test_an_exchange_that_fails_is_one_clear_line(monkeypatch, problem):
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(problem))
    with pytest.raises(ImageError) as caught:
        device_pixels(Exchanged(), 5)
    assert str(caught.value) == (
        f"a frame of type Exchanged cannot be read as a device array ({problem}): pass NumPy or device arrays"
    )
