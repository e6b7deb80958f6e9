from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.weights.torch_files import (
    ANCHORS,
    Checkpoint,
    Op,
    assert_refused_within_bounded_memory,
    named,
    new,
    pack,
    read,
    small_legacy,
    small_zip,
    zip_bytes,
)
from yolotrt.errors import CheckpointError, WeightsError
from yolotrt.weights.checkpoint import read_checkpoint

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
BUFFERS = (".running_mean", ".running_var", ".anchors", ".anchor_grid")


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


# What is taken from a model


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


# What is taken from a state_dict


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


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("nn.ReLU()", "ReLU"),
        ("nn.LeakyReLU(0.1)", "LeakyReLU(0.1)"),
        ("nn.LeakyReLU()", "LeakyReLU(0.01)"),
        ("torch.nn.Hardswish(inplace=True)", "Hardswish"),
        (None, "SiLU"),
    ],
)
def test_activation_that_the_yaml_sets_is_used(golden, tmp_path, stored, expected):
    metadata = read_state_dict_with_activation(golden, tmp_path, stored).metadata
    assert metadata.activation == expected


@pytest.mark.parametrize("stored", ["__import__('os').system('true')", "nn.ReLU", "nn.LeakyReLU(1.2.3)", 5])
def test_activation_that_is_no_module_is_refused(golden, tmp_path, stored):
    with pytest.raises(CheckpointError, match=r"its yaml sets the activation .*, which is not understood"):
        read_state_dict_with_activation(golden, tmp_path, stored)


def read_state_dict_with_activation(golden, tmp_path, activation):
    expected = read_checkpoint(golden / "weights" / "pv_nc5_v70.pt")
    checkpoint = Checkpoint()
    state = {name: checkpoint.tensor(array, np.float16) for name, array in expected.tensors.items()}
    root = {"model": state, "yaml": {**expected.metadata.yaml, "activation": activation}}
    return read(zip_bytes(root, checkpoint.storages), tmp_path)


# What is refused


def test_state_dict_of_another_network_is_refused_with_its_path(tmp_path):
    checkpoint = Checkpoint()
    state = {"model.0.conv.weight": checkpoint.tensor(np.ones((4, 3, 3, 3)))}
    with pytest.raises(WeightsError, match=r"^checkpoint .*model\.pt: ") as caught:
        read(zip_bytes({"state_dict": state}, checkpoint.storages), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ({"epoch": 3}, "holds neither a model nor a state_dict: name a .pt"),
        ([1], "holds neither a model nor a state_dict: name a .pt"),
        ({"model": new("models.yolo.Model")}, "its model has no layers"),
    ],
)
def test_file_without_a_model_is_refused_with_what_to_do(root, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(zip_bytes(root, {}), tmp_path)
    assert "model.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def _model_with(**changes) -> bytes:
    checkpoint = Checkpoint()
    detect = checkpoint.detect(**changes)
    return zip_bytes(checkpoint.model(checkpoint.conv(), detect), checkpoint.storages)


def _two_epsilons(second: float) -> bytes:
    checkpoint = Checkpoint()
    layers = checkpoint.conv(), checkpoint.conv(epsilon=second), checkpoint.conv(), checkpoint.detect()
    return zip_bytes(checkpoint.model(*layers), checkpoint.storages)


def test_an_epsilon_that_differs_is_written_down(tmp_path):
    """As in classifiers, whose last layer has PyTorch's own."""
    metadata = read(_two_epsilons(second=1e-5), tmp_path).metadata
    assert (metadata.batch_norm_epsilon, metadata.batch_norm_epsilons) == (1e-3, {"model.1.bn": 1e-5})
    assert (metadata.epsilon_of("model.1.bn"), metadata.epsilon_of("model.2.bn")) == (1e-5, 1e-3)


def test_release_1_has_its_heads_and_its_yaml_elsewhere(tmp_path):
    """Detect reads convolutions that are layers, and the yaml is called md, with its arguments evaluated."""
    checkpoint = Checkpoint()
    detect = new(
        "models.yolo.Detect",
        f=[-1],
        stride=checkpoint.tensor(np.array((8.0,))),
        _buffers={"anchors": checkpoint.tensor(np.array(ANCHORS))},
    )
    head = new(
        "torch.nn.modules.conv.Conv2d",
        _parameters={"weight": checkpoint.parameter(14, 4, 1, 1), "bias": checkpoint.parameter(14)},
    )
    rows = [[-1, 1, "Conv", [4, 3]], [-1, 1, "nn.Conv2d", [14, 1, 1]], [[], 1, "Detect", [2, [[1, 2, 3, 4]]]]]
    root = checkpoint.model(checkpoint.conv(), head, detect, yaml=None, md={"nc": 2, "backbone": rows, "head": []})
    weights = read(zip_bytes(root, checkpoint.storages), tmp_path)
    assert weights.metadata.class_count == 2
    assert weights.metadata.yaml["backbone"] == rows
    assert weights.tensors["model.1.weight"].shape == (14, 4, 1, 1)


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
        (_two_epsilons(second=0.0), r"model\.1\.bn has no valid epsilon"),
        (_two_epsilons(second=float("nan")), r"model\.1\.bn has no valid epsilon"),
    ],
)
def test_model_that_cannot_be_built_is_refused(data, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(data, tmp_path)


# Attacks on time and memory


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


BOMBS = {
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
    assert_refused_within_bounded_memory(*BOMBS[name], tmp_path)
