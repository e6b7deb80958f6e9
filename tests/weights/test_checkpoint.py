from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from yolotrt.errors import CheckpointError, YolotrtError
from yolotrt.weights import checkpoint as checkpoint_module
from yolotrt.weights.checkpoint import InertUnpickler, TensorReader, read_checkpoint

TAGS = (
    "yolov5n",
    "yolov5n_v60",
    "pv_nc5_v70",
    "derived_v50_focus_spp_nc80",
    "derived_v31_csp_hswish_nc3",
    "derived_v20_leaky_nc2_legacy",
    "derived_p6_random_nc80",
    "derived_seg_nc80",
)
ANCHORS = [[[1.25, 1.625], [2.0, 3.75]]]  # cells of 8 pixels: (10, 13) and (16, 30) in pixels
BUFFERS = (".running_mean", ".running_var", ".anchors", ".anchor_grid")


# Torch files made without torch: pickles are put together opcode by opcode, so that they can also be wrong ones.


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
    unpickler = InertUnpickler(pack(root) + b".")
    unpickler.load()
    return legacy_bytes(root, checkpoint.storages, {key: item.count for key, item in unpickler.storages.items()})


def read(data: bytes, folder: Path):
    path = folder / "model.pt"
    path.write_bytes(data)
    return read_checkpoint(path)


# The reference checkpoints


@pytest.mark.parametrize("tag", TAGS)
def test_reference_checkpoint_gives_what_yolov5_says_of_it(golden, tag):
    expected = json.loads((golden / "expected" / f"{tag}.json").read_text())
    weights = read_checkpoint(golden / expected["weights"])
    metadata = weights.metadata
    parameters = sum(array.size for name, array in weights.tensors.items() if not name.endswith(BUFFERS))
    assert metadata.class_count == expected["nc"]
    assert metadata.names == tuple(expected["names"].values())
    assert list(metadata.strides) == expected["stride"]
    assert [[side for anchor in level for side in anchor] for level in metadata.anchors] == expected["anchors_px"]
    assert metadata.yaml == expected["yaml"]
    assert metadata.source_sha256 == expected["sha256"]
    assert parameters == expected["params_unfused"]
    assert metadata.inferred == ()
    assert metadata.batch_norm_epsilon == 1e-3


@pytest.mark.parametrize(
    ("tag", "version", "task", "imgsz", "activation"),
    [
        ("yolov5n", "v6.1+", "detect", 640, "SiLU"),
        ("yolov5n_v60", "v6.0", "detect", 640, "SiLU"),
        ("pv_nc5_v70", "v6.2+", "detect", 640, "SiLU"),
        ("derived_v50_focus_spp_nc80", "v4.0-v5.0", "detect", 640, "SiLU"),
        ("derived_v31_csp_hswish_nc3", "v3.0-v3.1", "detect", 640, "Hardswish"),
        ("derived_v20_leaky_nc2_legacy", "v1.0-v2.0", "detect", 640, "LeakyReLU(0.1)"),
        ("derived_p6_random_nc80", "v6.2+", "detect", 1280, "SiLU"),
        ("derived_seg_nc80", "v7.0+", "segment", 640, "SiLU"),
    ],
)
def test_release_task_and_activation_are_recognised_by_the_classes(golden, tag, version, task, imgsz, activation):
    metadata = read_checkpoint(golden / "weights" / f"{tag}.pt").metadata
    assert (metadata.version, metadata.task, metadata.activation) == (version, task, activation)
    assert metadata.imgsz == (imgsz, imgsz)


def test_activations_other_than_the_most_frequent_are_listed_by_module(golden):
    metadata = read_checkpoint(golden / "weights" / "derived_v31_csp_hswish_nc3.pt").metadata
    # A BottleneckCSP has an activation of its own, and the eight of them are all of the model's.
    assert metadata.activations == {f"model.{layer}.act": "LeakyReLU(0.1)" for layer in (2, 4, 6, 9, 13, 17, 20, 23)}


def test_tensors_equal_those_that_torch_reads(golden):
    """Of whole checkpoints torch's own restricted unpickler can read the tensors, if it is given empty classes."""
    torch = pytest.importorskip("torch")

    class Anything:
        def __setstate__(self, state):
            self.__dict__.update(state)

    names = [
        *(f"models.yolo.{name}" for name in ("DetectionModel", "Detect")),
        *(f"models.common.{name}" for name in ("Conv", "C3", "Bottleneck", "SPPF", "Concat")),
        *(f"torch.nn.modules.{name}" for name in ("container.Sequential", "container.ModuleList", "conv.Conv2d")),
        *(f"torch.nn.modules.{name}" for name in ("batchnorm.BatchNorm2d", "activation.SiLU", "pooling.MaxPool2d")),
        "torch.nn.modules.upsampling.Upsample",
    ]
    classes = [(type(name, (Anything,), {}), name) for name in names]

    def state_dict(module, prefix=""):
        found = {f"{prefix}{key}": value for key, value in (module._parameters | module._buffers).items()}
        for key, child in module._modules.items():
            found |= state_dict(child, f"{prefix}{key}.")
        return found

    path = golden / "weights" / "derived_p6_random_nc80.pt"
    with torch.serialization.safe_globals([*classes, set]):
        expected = state_dict(torch.load(path, weights_only=True)["model"])
    expected = {k: v.detach().float().numpy() for k, v in expected.items() if v is not None and v.is_floating_point()}
    found = read_checkpoint(path).tensors
    assert list(found) == list(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_reading_imports_nothing_that_the_file_names(golden):
    code = (
        "import sys; from pathlib import Path; from yolotrt.weights.checkpoint import read_checkpoint; "
        f"read_checkpoint(Path({str(golden / 'weights' / 'yolov5n.pt')!r})); "
        "print([name for name in ('torch', 'models', 'utils') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# What is taken from a file


@pytest.mark.parametrize("make", [small_zip, small_legacy], ids=["zip", "legacy"])
def test_both_formats_give_tensors_and_metadata(make, tmp_path):
    data = make()
    weights = read(data, tmp_path)
    assert list(weights.tensors) == [
        "model.0.conv.weight",
        *(f"model.0.bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        "model.1.anchors",
        "model.1.m.0.weight",
        "model.1.m.0.bias",
    ]
    assert all(a.dtype == np.float32 and a.flags.c_contiguous and a.flags.writeable for a in weights.tensors.values())
    assert weights.tensors["model.0.conv.weight"].shape == (4, 3, 3, 3)
    first = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float16)
    np.testing.assert_array_equal(weights.tensors["model.0.conv.weight"], first.astype(np.float32))
    assert weights.metadata.names == ("cat", "dog")
    assert weights.metadata.anchors == (((10.0, 13.0), (16.0, 30.0)),)
    assert weights.metadata.yaml["nc"] == 2  # 80 in the file: the yaml of another data set
    assert weights.metadata.source_sha256 == hashlib.sha256(data).hexdigest()


def test_deflated_members_and_big_endian_storages_are_read(tmp_path):
    checkpoint = Checkpoint()
    model = checkpoint.model()
    swapped = {}
    unpickler = InertUnpickler(pack(model) + b".")
    unpickler.load()
    for key, content in checkpoint.storages.items():
        size = len(content) // unpickler.storages[key].count
        swapped[key] = b"".join(content[i : i + size][::-1] for i in range(0, len(content), size))
    found = read(zip_bytes(model, swapped, zipfile.ZIP_DEFLATED, byteorder=b"big"), tmp_path)
    expected = read(zip_bytes(model, checkpoint.storages), tmp_path)
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)


NUMBERS = np.array([0.0, 1.0, -2.5, 3.140625, 65280.0, -0.0078125], np.float32)  # exact in all the formats but float16


@pytest.mark.parametrize(
    ("kind", "stored", "expected"),
    [
        ("FloatStorage", NUMBERS, NUMBERS),
        ("DoubleStorage", NUMBERS.astype("f8"), NUMBERS),
        ("HalfStorage", NUMBERS.astype("f2"), NUMBERS.astype("f2").astype("f4")),
        ("BFloat16Storage", (NUMBERS.view("u4") >> 16).astype("u2"), NUMBERS),
    ],
)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_every_precision_becomes_float32(kind, stored, expected, byteorder):
    reader = TensorReader(lambda _: stored.astype(stored.dtype.newbyteorder(byteorder)).tobytes(), byteorder, 1000)
    tensor = InertUnpickler(view(storage("0", 6, kind), (6,), (1,)) + b".").load()
    np.testing.assert_array_equal(reader.read(tensor), expected)


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((2, 3), (3, 1), 0, [[0, 1, 2], [3, 4, 5]]),
        ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),
        ((2, 2), (2, 1), 1, [[1, 2], [3, 4]]),
        ((3,), (0,), 2, [2, 2, 2]),
        ((1, 2), (999_999_999, 1), 4, [[4, 5]]),  # the stride of a single row means nothing
        ((), (), 5, 5),
    ],
)
@pytest.mark.parametrize("kind", ["FloatStorage", "BFloat16Storage"])
def test_strided_tensor_becomes_contiguous(shape, strides, offset, expected, kind):
    numbers = np.arange(6, dtype=np.float32)
    stored = numbers if kind == "FloatStorage" else (numbers.view("u4") >> 16).astype("u2")
    reader = TensorReader(lambda _: stored.tobytes(), "<", 1000)
    array = reader.read(InertUnpickler(view(storage("0", 6, kind), shape, strides, offset) + b".").load())
    np.testing.assert_array_equal(array, np.array(expected, np.float32))
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert array.flags.writeable


@pytest.mark.parametrize(
    ("wrap", "taken"),
    [
        (lambda a, b: {"model": a, "ema": b}, "ema"),
        (lambda a, _: {"model": a, "ema": None}, "model"),
        (lambda a, b: {"model": a, "ema": (b, 120)}, "ema"),  # a pair in releases between 4.0 and 5.0
        (lambda a, _: a, "model"),
        (lambda a, _: {"model": new("torch.nn.parallel.data_parallel.DataParallel", _modules={"module": a})}, "model"),
    ],
)
def test_averaged_model_is_preferred_and_wrappers_are_removed(wrap, taken, tmp_path):
    checkpoint = Checkpoint()
    model, average = (checkpoint.model(names=[name, "x"]) for name in ("model", "ema"))
    weights = read(zip_bytes(wrap(model, average), checkpoint.storages), tmp_path)
    assert weights.metadata.names[0] == taken
    assert "model.0.conv.weight" in weights.tensors


@pytest.mark.parametrize(
    ("stored", "names", "has_note"),
    [
        (["cat", "dog"], ("cat", "dog"), False),
        ({1: "dog", 0: "cat"}, ("cat", "dog"), False),
        (None, ("class0", "class1"), True),
        (["cat"], ("cat", "class1"), True),
        ({0: "a", 1: "b", 2: "c"}, ("a", "b"), True),
        ([0, 1], ("0", "1"), False),
        (["a\n\x1b[31m", "b"], ("a??[31m", "b"), False),  # control characters must not reach a terminal
    ],
)
def test_class_names_are_in_class_order_one_for_each_class(stored, names, has_note, tmp_path):
    metadata = read(small_zip(names=stored), tmp_path).metadata
    assert metadata.names == names
    assert bool(metadata.inferred) == has_note


@pytest.mark.parametrize(
    ("kind", "state", "label"),
    [
        ("torch.nn.modules.activation.SiLU", {}, "SiLU"),
        ("utils.activations.SiLU", {}, "SiLU"),
        ("utils.activations.MemoryEfficientMish", {}, "Mish"),
        ("torch.nn.modules.activation.ReLU", {}, "ReLU"),
        ("torch.nn.modules.linear.Identity", {}, "Identity"),
        ("torch.nn.modules.activation.LeakyReLU", {"negative_slope": 0.1}, "LeakyReLU(0.1)"),
        ("torch.nn.modules.activation.LeakyReLU", {}, "LeakyReLU(0.01)"),
    ],
)
def test_activation_is_named_by_its_class(kind, state, label, tmp_path):
    checkpoint = Checkpoint()
    model = checkpoint.model(checkpoint.conv(new(kind, **state)), checkpoint.detect())
    assert read(zip_bytes(model, checkpoint.storages), tmp_path).metadata.activation == label


def test_training_leftovers_are_accepted_and_ignored(tmp_path):
    ordered = call(named("collections.OrderedDict"))
    scalar = call(named("numpy.core.multiarray.scalar"), call(named("numpy.dtype"), "f8", False, True), b"12345678")
    leftovers = {
        "best_fitness": scalar,
        "opt": new("argparse.Namespace", cfg="x"),
        "project": call(named("pathlib.PosixPath"), "runs", "train"),
        "date": call(named("datetime.datetime"), b"1234567890"),
        "device": call(named("torch.device"), "cuda", 0),
        "dtype": named("torch.float32"),
        "seen": call(named("__builtin__.set"), [1, 2]),
        "size": call(named("torch.Size"), (1, 2)),
        "forward": call(named("__builtin__.getattr"), named("models.yolo.Detect"), "forward"),
        "metadata": Op(ordered + pack({"_metadata": 1}) + b"b"),
    }
    checkpoint = Checkpoint()
    data = zip_bytes({**leftovers, "model": checkpoint.model()}, checkpoint.storages)
    assert read(data, tmp_path).metadata.class_count == 2


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_protocol_equal_those_of_pickle(protocol):
    value = {
        "numbers": [0, -1, 255, 256, 65536, -(2**31), 2**40, -(2**70), 1.5, None, True, False],
        "texts": ("", "a", "é" * 300, b"", b"\x00\xff" * 300),
        "nested": [[], (), {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {"a": {3: [1]}}],
        "shared": [[1]] * 3,
        "ordered": OrderedDict(b=1, a=2),
    }
    if protocol == 2:
        value["texts"] = ("", "a", "é" * 300)  # protocol 2 writes bytes as a call of _codecs.encode
    assert InertUnpickler(pickle.dumps(value, protocol)).load() == value


def test_classifier_without_yaml_is_inferred_from_its_tensors(tmp_path):
    checkpoint = Checkpoint()
    channels = [(3, 16, 6), (16, 32, 3), (32, 64, 3), (64, 128, 3), (128, 256, 3)]
    repeats = [1, 2, 3, 1]

    def conv(inputs: int, outputs: int, side: int = 1) -> Op:
        convolution = new(
            "torch.nn.modules.conv.Conv2d", _parameters={"weight": checkpoint.parameter(outputs, inputs, side, side)}
        )
        norm = {name: checkpoint.parameter(outputs) for name in ("weight", "bias", "running_mean", "running_var")}
        batch_norm = new("torch.nn.modules.batchnorm.BatchNorm2d", eps=1e-3, _parameters=norm)
        act = new("torch.nn.modules.activation.SiLU")
        return new("models.common.Conv", _modules={"conv": convolution, "bn": batch_norm, "act": act})

    def c3(size: int, count: int) -> Op:
        half = size // 2
        bottlenecks = {
            str(i): new("models.common.Bottleneck", _modules={"cv1": conv(half, half), "cv2": conv(half, half, 3)})
            for i in range(count)
        }
        inner = new("torch.nn.modules.container.Sequential", _modules=bottlenecks)
        return new(
            "models.common.C3",
            _modules={"cv1": conv(size, half), "cv2": conv(size, half), "cv3": conv(size, size), "m": inner},
        )

    layers = [conv(*channels[0])]
    for (inputs, outputs, side), count in zip(channels[1:], repeats, strict=True):
        layers += [conv(inputs, outputs, side), c3(outputs, count)]
    linear = new(
        "torch.nn.modules.linear.Linear",
        _parameters={"weight": checkpoint.parameter(7, 1280), "bias": checkpoint.parameter(7)},
    )
    layers.append(new("models.common.Classify", _modules={"conv": conv(256, 1280), "linear": linear}))
    container = new("torch.nn.modules.container.Sequential", _modules={str(i): layer for i, layer in enumerate(layers)})
    names = [f"kind{i}" for i in range(7)]
    model = new("models.yolo.ClassificationModel", _modules={"model": container}, names=names)
    metadata = read(zip_bytes({"model": model}, checkpoint.storages), tmp_path).metadata
    assert (metadata.task, metadata.names, metadata.imgsz) == ("classify", tuple(names), (224, 224))
    assert (metadata.strides, metadata.anchors) == ((), ())
    assert metadata.yaml["nc"] == 7
    assert len(metadata.inferred) == 1  # the yaml, but not the names


# State dictionaries, and files by torch itself


@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_is_read_and_its_metadata_inferred(golden, prefix, tmp_path):
    expected = read_checkpoint(golden / "weights" / "yolov5n.pt")
    checkpoint = Checkpoint()
    state = {f"{prefix}{name}": checkpoint.tensor(array, np.float16) for name, array in expected.tensors.items()}
    weights = read(zip_bytes({"state_dict": state}, checkpoint.storages), tmp_path)
    assert weights.metadata.anchors == expected.metadata.anchors
    assert weights.metadata.strides == (8, 16, 32)
    assert weights.metadata.inferred
    assert list(weights.tensors) == list(expected.tensors)
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(weights.tensors[name], array)  # the file holds float16 already: no rounding


def test_names_and_yaml_beside_a_state_dict_are_used(golden, tmp_path):
    expected = read_checkpoint(golden / "weights" / "pv_nc5_v70.pt")
    checkpoint = Checkpoint()
    state = {name: checkpoint.tensor(array) for name, array in expected.tensors.items()}
    root = {"model": state, "names": list(expected.metadata.names), "yaml": dict(expected.metadata.yaml)}
    metadata = read(zip_bytes(root, checkpoint.storages), tmp_path).metadata
    assert metadata.names == expected.metadata.names
    assert metadata.yaml == expected.metadata.yaml
    assert not any("class names" in note for note in metadata.inferred)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("variant", ["float32", "float64", "float16", "bfloat16", "channels_last", "shared"])
def test_files_of_torch_save_give_the_same_numbers_as_torch(golden, legacy, variant, tmp_path):
    torch = pytest.importorskip("torch")
    state = OrderedDict(
        (name, torch.from_numpy(array))
        for name, array in read_checkpoint(golden / "weights" / "yolov5n.pt").tensors.items()
    )
    if variant == "channels_last":
        state = OrderedDict(
            (name, t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t) for name, t in state.items()
        )
        assert any(not tensor.is_contiguous() for tensor in state.values())
    elif variant == "shared":
        flat = torch.cat([tensor.flatten() for tensor in state.values()])
        ends = np.cumsum([tensor.numel() for tensor in state.values()])
        state = OrderedDict(
            (name, flat[end - t.numel() : end].view(t.shape))
            for end, (name, t) in zip(ends, state.items(), strict=True)
        )
    else:
        state = OrderedDict((name, tensor.to(getattr(torch, variant))) for name, tensor in state.items())
    path = tmp_path / "state.pt"
    torch.save({"model": state}, path, _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(path).tensors
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.float().numpy(), err_msg=name)
        assert found[name].flags.c_contiguous


# What is refused

MARKER = "marker"
MALICIOUS = [
    (call(named("os.system"), f"touch {MARKER}"), "os.system"),
    (call(named("posix.system"), f"touch {MARKER}"), "posix.system"),
    (call(named("builtins.eval"), f"open({MARKER!r}, 'w')"), "builtins.eval"),
    (call(named("__builtin__.exec"), f"open({MARKER!r}, 'w')"), "builtins.exec"),
    (call(named("builtins.open"), MARKER, "w"), "builtins.open"),
    (call(named("subprocess.Popen"), ["touch", MARKER]), "subprocess.Popen"),
    (call(named("builtins.__import__"), "os"), "builtins.__import__"),
    (call(stack_named("os", "system"), f"touch {MARKER}"), "os.system"),
    (call(named("torch.storage._load_from_bytes"), b"\x80\x02N."), "torch.storage._load_from_bytes"),
    (call(named("torch.load"), "x.pt"), "torch.load"),
    (call(named("numpy.load"), "x.npy"), "numpy.load"),
    (call(named("runpy.run_path"), "x.py"), "runpy.run_path"),
    (call(named("functools.partial"), named("models.yolo.Model")), "functools.partial"),
    # getattr: of anything but a model class, of a dotted name, and a call of what it gives
    (call(named("builtins.getattr"), "text", "format"), "builtins.getattr"),
    (call(named("builtins.getattr"), named("collections.OrderedDict"), "fromkeys"), "builtins.getattr"),
    (call(named("builtins.getattr"), named("models.yolo.Detect"), "a.b"), "builtins.getattr"),
    (call(call(named("builtins.getattr"), named("models.yolo.Detect"), "forward"), 1), "builtins.getattr"),
    (call(named("builtins.getattr"), call(named("builtins.getattr"), named("models.X"), "a"), "b"), "builtins.getattr"),
    # calls of stand-ins, of classes and of objects
    (call(named("models.yolo.Model"), 1), "models.yolo.Model"),
    (call(new("models.yolo.Model"), 1), "models.yolo.Model"),
    (call(named("torch.nn.modules.conv.Conv2d"), 1), "torch.nn.modules.conv.Conv2d"),
    (call(named("torch.FloatStorage"), 1), "torch.FloatStorage"),
    # dotted names are look-ups of attributes
    (call(stack_named("models.yolo", "Model.forward")), "models.yolo.Model.forward"),
    (stack_named("collections", "OrderedDict.fromkeys"), "collections.OrderedDict.fromkeys"),
    (stack_named("torch", "nn.Module"), "torch.nn.Module"),
    (stack_named("models", "os.system"), "models.os.system"),
    (stack_named("models..yolo", "Model"), "models..yolo.Model"),
    (stack_named("modelsx", "Model"), "modelsx.Model"),
    # objects of callables
    (Op(named("builtins.getattr") + b")\x81"), "builtins.getattr"),
    (Op(named("torch._utils._rebuild_tensor_v2") + b")\x81"), "torch._utils._rebuild_tensor_v2"),
]


@pytest.mark.parametrize(("attack", "name"), MALICIOUS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_global_that_is_not_allowed_is_refused_by_name_and_never_run(attack, name, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint()
    root = {"date": attack, "model": checkpoint.model()}
    data = zip_bytes(root, checkpoint.storages) if form == "zip" else legacy_bytes(root, {}, {})
    with pytest.raises(CheckpointError) as caught:
        read(data, tmp_path)
    assert f" {name}," in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / MARKER).exists()


def test_attacks_would_run_if_they_were_unpickled(tmp_path, monkeypatch):
    """The test above could not fail if the payload did nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + MALICIOUS[0][0] + b".")
    assert (tmp_path / MARKER).exists()


def test_name_with_control_characters_is_made_printable(tmp_path):
    with pytest.raises(CheckpointError, match=r"asks for os\.\?\[2Jsystem\?,"):
        read(zip_bytes(stack_named("os", "\x1b[2Jsystem\n"), {}), tmp_path)


def test_ultralytics_model_is_named_as_such(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"ultralytics package.*YOLOv8 or later.*: use a checkpoint of the YOLOv5"
    ):
        read(zip_bytes({"model": new("ultralytics.nn.tasks.DetectionModel")}, {}), tmp_path)


def _zip_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: make or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page.*download the .pt"),
        (b"\xef\xbb\xbf\n <?xml version='1.0'?>", "web page.*download the .pt"),
        (b"Not Found", "is text, not a checkpoint: download"),
        (b"351\nmodel.0.conv.weight 4 3f800000", r"\.wts file.*use it as weights"),
        (struct.pack("<Q", 60) + b'{"a":{}}', r"\.safetensors file.*use it as weights"),
        (b"\x1f\x8b\x08\x00", "compressed archive: unpack it"),
        (b"\x00" * 257 + b"ustar", "tar archive: unpack it"),
        (b"\x08\x07\x12\x07pytorch", "is not a PyTorch checkpoint: name a .pt"),
        (b"\x80\x04N.", "is a pickle but no PyTorch checkpoint"),
        (_zip_of("model/data/x"), r"zip archive but no PyTorch checkpoint \(it has no data.pkl\)"),
        (_zip_of("runs/best.pt"), r"zip archive around runs/best\.pt: unpack it"),
        (_zip_of("m/data.pkl", "m/constants.pkl"), r"TorchScript export.*use the \.pt"),
        (_zip_of("m/data.pkl", "m/code/__torch__.py"), r"TorchScript export.*use the \.pt"),
        (zip_bytes({"epoch": 3}, {}), "holds neither a model nor a state_dict: name a .pt"),
        (zip_bytes([1], {}), "holds neither a model nor a state_dict: name a .pt"),
        (zip_bytes({"model": new("models.yolo.Model")}, {}), "its model has no layers"),
        (small_zip()[:-30], "truncated or damaged: download or copy it again"),
        (small_legacy()[:-30], "truncated or damaged: download or copy it again"),
    ],
)
def test_other_files_are_named_with_what_to_do(content, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(content, tmp_path)
    assert "model.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist: check the path"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is a directory: name a file"):
        read_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_checkpoint(tmp_path / "pipe.pt")


def _model_with(**changes) -> bytes:
    checkpoint = Checkpoint()
    detect = checkpoint.detect(**changes)
    return zip_bytes(checkpoint.model(checkpoint.conv(), detect), checkpoint.storages)


def _two_epsilons() -> bytes:
    checkpoint = Checkpoint()
    layers = checkpoint.conv(), checkpoint.conv(epsilon=1e-5), checkpoint.detect()
    return zip_bytes(checkpoint.model(*layers), checkpoint.storages)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_model_with(kind="models.yolo.IDetect"), "last layer is models.yolo.IDetect.*only Detect"),
        (_model_with(stride=(0.0,)), "no valid strides"),
        (_model_with(stride=(8.5,)), "no valid strides"),
        (_model_with(stride=(float("nan"),)), "no valid strides"),
        (_model_with(stride=(8.0, 16.0)), "no anchors for its strides"),
        (_model_with(anchors=[[[1.0, float("inf")], [1.0, 1.0]]]), "no anchors for its strides"),
        (_model_with(anchors=[[[1.0, -1.0], [1.0, 1.0]]]), "no anchors for its strides"),
        (_model_with(anchors=[[[1.0, 1.0]] * 3]), "does not give a number of classes"),
        (_model_with(anchors=[[[1.0, 1.0]] * 14]), "does not give a number of classes"),
        (_two_epsilons(), "model.0.bn has epsilon 0.001 but model.1.bn has 1e-05"),
    ],
)
def test_model_that_cannot_be_built_is_refused(data, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(data, tmp_path)


# Attacks on time, memory and the interpreter

FOUR = np.arange(4, dtype=np.float32).tobytes()


def _tensor_zip(tensor: Op, count: int = 1) -> bytes:
    return zip_bytes({f"model.{index}.weight": tensor for index in range(count)}, {"0": FOUR})


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "stored"),
    [
        ((5,), (1,), 0, 4),
        ((4,), (1,), 1, 4),
        ((2, 2), (3, 1), 0, 4),
        ((4,), (1,), -1, 4),
        ((4,), (-1,), 3, 4),
        ((-4,), (1,), 0, 4),
        ((0,), (1,), 0, 4),
        ((4,), (), 0, 4),
        ((1,) * 9, (1,) * 9, 0, 4),
        ((2**30,), (0,), 0, 4),  # a view of one number that becomes gigabytes
        ((2**31 - 1,) * 8, (0,) * 8, 0, 4),
        ((4.0,), (1,), 0, 4),
        ((True,), (1,), 0, 4),
        ([4], [1], 0, 4),
        ((8,), (1,), 0, 8),  # the storage itself is shorter than the pickle says
        ((4,), (1,), 0, -4),
    ],
)
def test_tensor_beyond_its_storage_is_refused(shape, strides, offset, stored, tmp_path):
    data = _tensor_zip(view(storage("0", stored), shape, strides, offset))
    with pytest.raises(CheckpointError, match="damaged"):
        read(data, tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        view(storage("missing", 4), (4,), (1,)),
        view(storage("../data.pkl", 4), (4,), (1,)),
        view(pack(1), (4,), (1,)),
        call(named("torch._utils._rebuild_parameter"), 1),
        call(named("torch._utils._rebuild_tensor_v2")),
        Op(pack(("storage", named("torch.float32"), "0", "cpu", 4)) + b"Q"),
        Op(pack(("storage", "FloatStorage", "0", "cpu", 4)) + b"Q"),
        Op(pack((storage("0", 4), storage("0", 2)))),
        Op(pack((storage("0", 4), storage("0", 4, "HalfStorage")))),
        Op(pack(("module", "x", "y", "z")) + b"Q"),
        Op(pack(3) + b"Q"),
    ],
)
def test_damaged_reference_is_refused(tensor, tmp_path):
    with pytest.raises(CheckpointError, match="damaged"):
        read(_tensor_zip(tensor), tmp_path)


def _shared(count: int) -> bytes:
    """One tensor of 40,000 bytes that `count` names refer to."""
    tensor = Op(view(storage("0", 10_000), (10_000,), (1,)) + b"r\x07\x00\x00\x00")
    state = b"}(" + pack("model.0.w") + tensor
    state += b"".join(pack(f"model.{index}.w") + b"j\x07\x00\x00\x00" for index in range(1, count))
    return zip_bytes(Op(state + b"u"), {"0": bytes(40_000)})


def _lying_zip() -> bytes:
    """A deflated storage of 50 MB whose headers say that it has 16 bytes."""
    data = zip_bytes({"model.0.w": view(storage("0", 4), (4,), (1,))}, {"0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    return data.replace(struct.pack("<I", 50_000_000), struct.pack("<I", 16))


BOMBS = {
    "deflated storage": (
        zip_bytes({"model.0.w": 1}, {"0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED),
        "unpacks to more",
    ),
    "wrong size in the zip": (_lying_zip(), "damaged"),
    "one tensor many times": (_shared(3000), "more than 16 times"),
    "text of 4 GiB": (zip_bytes(Op(b"X\xff\xff\xff\xff"), {}), "damaged"),
    "text of 2**63 bytes": (zip_bytes(Op(b"\x8d" + b"\xff" * 8), {}), "damaged"),
    "bytes of 2**63 bytes": (zip_bytes(Op(b"\x8e" + b"\xff" * 8), {}), "damaged"),
    "bytearray": (zip_bytes(Op(b"\x96" + b"\xff" * 8), {}), "damaged"),
    "integer of 2 GiB": (zip_bytes(Op(b"\x8b\xff\xff\xff\x7f"), {}), "damaged"),
    "integer of negative length": (zip_bytes(Op(b"\x8b\xff\xff\xff\xff"), {}), "damaged"),
    "memo index of 2**32": (zip_bytes(Op(b"Nr\xff\xff\xff\xff"), {}), "neither a model"),
    "tuples nested deep": (zip_bytes(Op(b")" + b"\x85" * 300_000), {}), "neither a model"),
    "tuples nested as a key": (zip_bytes(Op(b"})" + b"\x85" * 300_000 + b"K\x01s"), {}), "neither a model"),
    "lists nested deep": (zip_bytes(Op(b"]" * 150_000 + b"a" * 149_999), {}), "neither a model"),
    "marks deep": (zip_bytes(Op(b"(" * 300_000), {}), "damaged"),
}


def _laughs() -> Op:
    """A list of two references to a list of two references to ..., thirteen deep: 2**13 values; each is 250 long."""
    value = pack(["x" * 250] * 2)
    for index in range(13):
        mark = struct.pack("<I", index + 100)
        value = Op(b"](" + value + b"r" + mark + b"j" + mark + b"e")
    return Op(b"}" + pack("a") + value + b"s")


def _circle(kind: str) -> Op:
    """A module that is its own child."""
    return Op(
        named(kind) + b")\x81r\x63\x00\x00\x00" + b"}" + pack("_modules") + b"}" + pack("a") + b"jc\x00\x00\x00ssb"
    )


def _wide() -> Op:
    """Modules with two references to the same child each, twenty deep: a million names."""
    module = new("models.common.Conv")
    for index in range(20):
        mark = struct.pack("<I", index + 500)
        children = b"}(" + pack("a") + module + b"r" + mark + pack("b") + b"j" + mark + b"u"
        module = Op(named("models.common.Conv") + b")\x81}" + pack("_modules") + children + b"sb")
    return module


def _model_around(layer: Op) -> bytes:
    checkpoint = Checkpoint()
    return zip_bytes(checkpoint.model(layer, checkpoint.detect()), checkpoint.storages)


BOMBS |= {
    "yaml of references": (small_zip(yaml=_laughs()), "yaml is nested too deep or too long"),
    "yaml that contains itself": (
        small_zip(yaml=Op(b"}rc\x00\x00\x00" + pack("a") + b"jc\x00\x00\x00s")),
        "yaml is nested too deep or too long",
    ),
    "module in a circle": (_model_around(_circle("models.common.C3")), "modules are nested too deep"),
    "modules of references": (_model_around(_wide()), "modules are nested too deep or are too many"),
    "long module name": (
        _model_around(new("models.common.Conv", _modules={"a" * 100: new("models.common.Conv")})),
        "has a module named 'aaa",
    ),
    "module name with a newline": (
        _model_around(new("models.common.Conv", _modules={"a\n": new("models.common.Conv")})),
        "has a module named 'a\\?'",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_within_bounded_memory(name, tmp_path):
    data, message = BOMBS[name]
    path = tmp_path / "bomb.pt"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A hundred bytes an object, one object for a byte of the pickle, is the most that is allowed.
    assert peak < 120 * len(data) + 4_000_000


def test_more_opcodes_than_allowed_are_refused(monkeypatch):
    monkeypatch.setattr(checkpoint_module, "MAX_OPCODES", 1000)
    assert InertUnpickler(b"N0" * 499 + b"N.").load() is None
    with pytest.raises(CheckpointError, match="more than 1000 objects"):
        InertUnpickler(b"N0" * 500 + b"N.").load()


# Anything at all


def _succeeds_or_is_refused(data: bytes, folder: Path) -> None:
    try:
        read(data, folder)
    except YolotrtError as problem:
        assert "\n" not in str(problem)


SMALL_ZIP, SMALL_LEGACY = small_zip(), small_legacy()
with zipfile.ZipFile(io.BytesIO(SMALL_ZIP)) as _archive:
    SMALL_PICKLE = _archive.read("best/data.pkl")
    SMALL_STORAGES = {n.removeprefix("best/data/"): _archive.read(n) for n in _archive.namelist() if "/data/" in n}

changes = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _change(data: bytes, edits) -> bytes:
    changed = bytearray(data)
    for position, value in edits:
        changed[position % len(data)] = value
    return bytes(changed)


@fuzz
@given(edits=changes)
@pytest.mark.parametrize("data", [SMALL_ZIP, SMALL_LEGACY], ids=["zip", "legacy"])
def test_changed_file_succeeds_or_is_refused(data, edits, tmp_path):
    _succeeds_or_is_refused(_change(data, edits), tmp_path)


@fuzz
@given(edits=changes)
def test_changed_pickle_succeeds_or_is_refused(edits, tmp_path):
    """A zip archive's checksums would hide the pickle from the changes."""
    pickled = Op(_change(SMALL_PICKLE[2:-1], edits))
    _succeeds_or_is_refused(zip_bytes(pickled, SMALL_STORAGES), tmp_path)


@fuzz
@given(
    opcodes=st.lists(st.sampled_from([bytes([code]) for code in InertUnpickler(b"")._make_handlers()]), max_size=200)
)
def test_random_opcodes_succeed_or_are_refused(opcodes, tmp_path):
    _succeeds_or_is_refused(zip_bytes(Op(b"".join(opcodes)), {}), tmp_path)


@pytest.mark.parametrize("tag", ["yolov5n", "derived_v20_leaky_nc2_legacy"])
@pytest.mark.parametrize("kept", [0.0001, 0.01, 0.1, 0.5, 0.9, 0.999, 0.999999])
def test_truncated_reference_checkpoint_is_refused(golden, tag, kept, tmp_path):
    data = (golden / "weights" / f"{tag}.pt").read_bytes()
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read(data[: int(len(data) * kept)], tmp_path)


@pytest.mark.parametrize("tag", ["yolov5n", "derived_v20_leaky_nc2_legacy"])
def test_changed_reference_checkpoint_succeeds_or_is_refused(golden, tag, tmp_path):
    data = (golden / "weights" / f"{tag}.pt").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(10):
        edits = zip(random.integers(0, 120_000, 5).tolist(), random.integers(0, 256, 5).tolist(), strict=True)
        _succeeds_or_is_refused(_change(data, edits), tmp_path)
