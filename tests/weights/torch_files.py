"""Torch files made without torch, for the tests of the modules that read them.

Pickles are put together opcode by opcode, so that they can also be wrong ones.
"""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from yolotrt.errors import CheckpointError, YolotrtError
from yolotrt.weights.checkpoint import read_checkpoint
from yolotrt.weights.inert_pickle import InertUnpickler, Storage
from yolotrt.weights.model import Weights

ANCHORS = [[[1.25, 1.625], [2.0, 3.75]]]  # cells of 8 pixels: (10, 13) and (16, 30) in pixels

byte_edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8)
"""Bytes to change in a file: positions, counted around its end, and their new values."""
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Op(bytes):
    """Opcodes that push one value."""


def pack(value) -> Op:
    match value:
        case Op():
            return value
        case None:
            return Op(b"N")
        case bool():
            return Op(b"\x88" if value else b"\x89")
        case int():
            return Op(b"J" + struct.pack("<i", value))
        case float():
            return Op(b"G" + struct.pack(">d", value))
        case str():
            return Op(b"X" + struct.pack("<I", len(value.encode())) + value.encode())
        case bytes():
            return Op(b"B" + struct.pack("<I", len(value)) + value)
        case tuple():
            return Op(b"(" + b"".join(map(pack, value)) + b"t")
        case list():
            return Op(b"](" + b"".join(map(pack, value)) + b"e")
        case dict():
            return Op(b"}(" + b"".join(pack(part) for item in value.items() for part in item) + b"u")
    raise TypeError(type(value))


def named(name: str) -> Op:
    module, _, attribute = name.rpartition(".")
    return Op(f"c{module}\n{attribute}\n".encode())


def stack_named(module: str, name: str) -> Op:
    return Op(pack(module) + pack(name) + b"\x93")


def call(function: Op, *arguments) -> Op:
    return Op(function + pack(arguments) + b"R")


def new(name: str, **state) -> Op:
    return Op(named(name) + b")\x81" + pack(state) + b"b")


def storage(key: str, count: int, kind: str = "FloatStorage") -> Op:
    return Op(pack(("storage", named(f"torch.{kind}"), key, "cpu", count)) + b"Q")


def view(stored: Op, shape, strides, offset=0) -> Op:
    return call(
        named("torch._utils._rebuild_tensor_v2"),
        stored,
        offset,
        shape,
        strides,
        False,
        call(named("collections.OrderedDict")),
    )


class Checkpoint:
    """A one-layer YOLOv5 model: Conv with BatchNorm, then Detect with one level of two anchors and two classes."""

    def __init__(self) -> None:
        self.storages: dict[str, bytes] = {}
        self.random = np.random.default_rng(0)

    def tensor(self, array, dtype=np.float32) -> Op:
        array = np.ascontiguousarray(array, dtype)
        kind = {"f4": "FloatStorage", "f2": "HalfStorage", "f8": "DoubleStorage", "i8": "LongStorage"}[
            array.dtype.str[1:]
        ]
        key = str(len(self.storages))
        self.storages[key] = array.tobytes()
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return view(storage(key, array.size, kind), array.shape, strides)

    def parameter(self, *shape: int) -> Op:
        value = self.tensor(self.random.standard_normal(shape), np.float16)
        return call(named("torch._utils._rebuild_parameter"), value, True, call(named("collections.OrderedDict")))

    def batch_norm(self, epsilon: float = 1e-3) -> Op:
        return new(
            "torch.nn.modules.batchnorm.BatchNorm2d",
            eps=epsilon,
            _parameters={"weight": self.parameter(4), "bias": self.parameter(4)},
            _buffers={
                "running_mean": self.tensor(np.zeros(4)),
                "running_var": self.tensor(np.ones(4)),
                "num_batches_tracked": self.tensor(np.array(7), np.int64),
            },
        )

    def conv(self, act: Op | None = None, epsilon: float = 1e-3) -> Op:
        convolution = new(
            "torch.nn.modules.conv.Conv2d", _parameters={"weight": self.parameter(4, 3, 3, 3), "bias": None}
        )
        act = act or new("torch.nn.modules.activation.SiLU", inplace=True)
        return new("models.common.Conv", _modules={"conv": convolution, "bn": self.batch_norm(epsilon), "act": act})

    def detect(self, kind: str = "models.yolo.Detect", stride=(8.0,), anchors=ANCHORS, **state) -> Op:
        outputs = new(
            "torch.nn.modules.conv.Conv2d",
            _parameters={"weight": self.parameter(14, 4, 1, 1), "bias": self.parameter(14)},
        )
        return new(
            kind,
            stride=self.tensor(np.array(stride)),
            nc=2,
            _buffers={"anchors": self.tensor(np.array(anchors))},
            _modules={"m": new("torch.nn.modules.container.ModuleList", _modules={"0": outputs})},
            **state,
        )

    def model(self, *layers: Op, **state) -> Op:
        layers = layers or (self.conv(), self.detect())
        container = new(
            "torch.nn.modules.container.Sequential", _modules={str(i): layer for i, layer in enumerate(layers)}
        )
        state = {"names": ["cat", "dog"], "yaml": {"nc": 80, "backbone": [[-1, 1, "Conv", [4, 3]]], "head": []}} | state
        return new("models.yolo.Model", _modules={"model": container}, **state)


def zip_bytes(root, storages: dict[str, bytes], compression=zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("best/data.pkl", b"\x80\x02" + pack(root) + b".")
        for name, content in members.items():
            archive.writestr(f"best/{name}", content)
        for key, content in storages.items():
            archive.writestr(f"best/data/{key}", content)
    return buffer.getvalue()


def legacy_bytes(root, storages: dict[str, bytes], counts: dict[str, int]) -> bytes:
    """See torch/serialization.py, `_legacy_save`."""
    pickles = [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        pickle.dumps(1001, 2),
        pickle.dumps({"little_endian": True}, 2),
        b"\x80\x02" + pack(root) + b".",
        pickle.dumps(list(storages), 2),
    ]
    return b"".join(pickles) + b"".join(struct.pack("<q", counts[key]) + data for key, data in storages.items())


def small_zip(**state) -> bytes:
    checkpoint = Checkpoint()
    return zip_bytes({"epoch": -1, "model": checkpoint.model(**state)}, checkpoint.storages)


def small_legacy() -> bytes:
    checkpoint = Checkpoint()
    root = {"model": checkpoint.model()}
    counts = {key: stored.count for key, stored in storages_in(root).items()}
    return legacy_bytes(root, checkpoint.storages, counts)


def storages_in(root) -> dict[str, Storage]:
    """The storages that a pickle refers to, by key."""
    unpickler = InertUnpickler(pack(root) + b".")
    unpickler.load()
    return unpickler.storages


def read(data: bytes, folder: Path) -> Weights:
    path = folder / "model.pt"
    path.write_bytes(data)
    return read_checkpoint(path)


def change(data: bytes, edits) -> bytes:
    changed = bytearray(data)
    for position, value in edits:
        changed[position % len(data)] = value
    return bytes(changed)


def assert_succeeds_or_is_refused(data: bytes, folder: Path) -> None:
    try:
        read(data, folder)
    except YolotrtError as problem:
        assert "\n" not in str(problem)


def assert_refused_within_bounded_memory(data: bytes, message: str, folder: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            read(data, folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A hundred bytes an object, one object for a byte of the pickle, is the most that is allowed.
    assert peak < 120 * len(data) + 4_000_000
