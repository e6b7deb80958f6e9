"""The .safetensors reader and writer, against files of other writers and damaged ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file

from yolotrt.errors import WeightsError, YolotrtError
from yolotrt.weights import load_weights
from yolotrt.weights.model import Metadata, Weights
from yolotrt.weights.safetensors import METADATA_KEY, read_safetensors, write_safetensors

METADATA = Metadata(yaml={"nc": 1}, names=("Hündchen",), strides=(8,), anchors=(((10.0, 13.0),),))
TENSORS = {
    "model.0.conv.weight": np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2),
    "model.24.anchors": np.array([-0.0, 1e-45, 3.4e38], dtype=np.float32),
}
WEIGHTS = Weights(TENSORS, METADATA)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)  # with -0.0 and denormals


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None) -> None:
    """A file written by hand, for types that NumPy does not have."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def assert_same(weights: Weights, expected: Weights) -> None:
    """Equal to the bit: comparing values would not tell -0.0 from 0.0."""
    assert weights.metadata.to_json() == expected.metadata.to_json()
    assert weights.tensors.keys() == expected.tensors.keys()
    for name, array in expected.tensors.items():
        assert weights.tensors[name].dtype == np.float32
        assert weights.tensors[name].shape == array.shape
        assert weights.tensors[name].tobytes() == array.tobytes()


@settings(deadline=None, max_examples=60)
@given(
    arrays=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
        hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), elements=FINITE),
        min_size=1,
        max_size=4,
    )
)
def test_any_finite_arrays_survive_a_round_trip_to_the_bit(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("round_trip") / "model.safetensors"
    weights = Weights(arrays, METADATA)
    write_safetensors(weights, path)
    assert_same(read_safetensors(path), weights)


def test_arrays_that_are_not_contiguous_are_written_by_value(tmp_path):
    weights = Weights({"model.0.conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T}, METADATA)
    write_safetensors(weights, tmp_path / "model.safetensors")
    assert_same(read_safetensors(tmp_path / "model.safetensors"), weights)


def test_the_header_holds_the_metadata_for_other_programs(tmp_path):
    write_safetensors(WEIGHTS, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()[METADATA_KEY])["names"] == ["Hündchen"]


def test_half_precision_stores_float16_and_comes_back_as_float32(tmp_path):
    array = np.array([1 / 3, -65504, 1e-8], dtype=np.float32)
    path = tmp_path / "half.safetensors"
    write_safetensors(Weights({"model.0.conv.bias": array}, METADATA), path, half=True)
    with safe_open(path, framework="numpy") as file:
        assert file.get_tensor("model.0.conv.bias").dtype == np.float16
    assert_same(
        read_safetensors(path), Weights({"model.0.conv.bias": array.astype(np.float16).astype(np.float32)}, METADATA)
    )


@pytest.mark.parametrize("value", [65505.0, -65520.0, 3e38])
def test_half_precision_refuses_values_beyond_its_range_by_name(value, tmp_path):
    weights = Weights({"model.3.bn.running_var": np.array([[1, value]], dtype=np.float32)}, METADATA)
    with pytest.raises(WeightsError, match=r"tensor model.3.bn.running_var holds .* at index 1, beyond \+-65504"):
        write_safetensors(weights, tmp_path / "model.safetensors", half=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_values_are_neither_written_nor_read(value, tmp_path):
    path = tmp_path / "model.safetensors"
    array = np.array([1, value], dtype=np.float32)
    with pytest.raises(WeightsError, match=rf"tensor model.1.bias holds {value} at index 1"):
        write_safetensors(Weights({"model.1.bias": array}, METADATA), path)
    assert not list(tmp_path.iterdir())
    save_file({"model.1.bias": array}, path, metadata={METADATA_KEY: METADATA.to_json()})
    with pytest.raises(WeightsError, match=rf"tensor 'model.1.bias' holds {value} at index 1"):
        read_safetensors(path)


@pytest.mark.parametrize(
    ("dtype", "data", "expected"),
    [
        ("F16", np.array([0.5, -2], "<f2").tobytes(), [0.5, -2]),
        ("F64", np.array([0.1, -2], "<f8").tobytes(), [np.float32(0.1), -2]),
        ("BF16", np.array([0x3F80, 0xC040], "<u2").tobytes(), [1, -3]),
    ],
)
def test_other_floating_point_types_become_float32(dtype, data, expected, tmp_path):
    path = tmp_path / "model.safetensors"
    plain = ("F32", [1], np.array([7], "<f4").tobytes())
    write_raw(path, {"a": (dtype, [2, 1], data), "b": plain}, {METADATA_KEY: METADATA.to_json()})
    weights = read_safetensors(path)
    assert weights.tensors["a"].dtype == np.float32
    assert weights.tensors["a"].tolist() == [[expected[0]], [expected[1]]]
    assert weights.tensors["b"].tolist() == [7]


def test_a_float64_beyond_float32_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, {"a": ("F64", [1], struct.pack("<d", 1e300))}, {METADATA_KEY: METADATA.to_json()})
    with pytest.raises(WeightsError, match="tensor 'a' holds inf"):
        read_safetensors(path)


def test_integers_are_refused_but_for_the_counters_of_training(tmp_path):
    path = tmp_path / "model.safetensors"
    metadata = {METADATA_KEY: METADATA.to_json()}
    integer = ("I64", [], struct.pack("<q", 7))
    write_raw(path, {"model.0.bn.num_batches_tracked": integer}, metadata)
    assert read_safetensors(path).tensors == {}
    write_raw(path, {"model.0.bn.weight": integer}, metadata)
    with pytest.raises(WeightsError, match=r"tensor 'model.0.bn.weight' is of type I64: convert it"):
        read_safetensors(path)


def test_a_file_of_another_writer_is_understood(golden, tmp_path):
    original = load_weights(golden / "weights" / "pv_nc5_v70.pt")
    path = tmp_path / "foreign.safetensors"
    save_file({name: array.astype(np.float16) for name, array in original.tensors.items()}, path)
    foreign = read_safetensors(path)
    assert foreign.metadata.anchors == original.metadata.anchors
    assert foreign.metadata.class_count == 5
    assert foreign.metadata.inferred
    assert foreign.tensors.keys() == {name for name in original.tensors if name != "model.24.anchors"}
    assert foreign.tensors["model.0.conv.weight"].shape == original.tensors["model.0.conv.weight"].shape


def test_a_file_of_another_network_is_refused_by_tensor(tmp_path):
    save_file({"bert.embeddings": np.zeros(3, np.float32)}, tmp_path / "bert.safetensors")
    with pytest.raises(WeightsError, match=r"bert.safetensors: tensor 'bert.embeddings' is not of a YOLOv5 model"):
        read_safetensors(tmp_path / "bert.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "is no intact .safetensors file"),
        (lambda data: data[:40], "is no intact .safetensors file"),
        (lambda data: data[:5], "is no intact .safetensors file"),
        (lambda data: data + b"\0", "is no intact .safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "is no intact .safetensors file"),
        (lambda data: data.replace(b'"F32"', b'"X32"', 1), "is no intact .safetensors file"),
        (lambda data: data.replace(b"H\\\\u00fc", b"H\\\\u00zz"), "metadata is damaged"),
        (lambda data: data.replace(b'\\"imgsz\\":[640', b'\\"imgsz\\":[000'), "metadata is damaged"),
    ],
)
def test_a_malformed_file_is_refused(change, message, tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(WEIGHTS, path)
    data = path.read_bytes()
    path.write_bytes(change(data))
    assert path.read_bytes() != data
    with pytest.raises(WeightsError, match=message) as caught:
        read_safetensors(path)
    assert len(str(caught.value).splitlines()) == 1


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_but_nothing_else(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "safetensors_fuzz" / "model.safetensors"
    write_safetensors(WEIGHTS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = min(len(content), start + data.draw(st.integers(0, 12)))
        content[start:end] = data.draw(st.one_of(st.binary(max_size=12), st.just(bytes(content[start:end][::-1]))))
    path.write_bytes(content)
    try:
        read_safetensors(path)
    except YolotrtError as problem:
        assert len(str(problem).splitlines()) == 1


def test_weights_without_tensors_are_not_written(tmp_path):
    with pytest.raises(WeightsError, match="hold no tensor"):
        write_safetensors(Weights({}, METADATA), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(WEIGHTS, path)
    with pytest.raises(WeightsError):
        write_safetensors(Weights({"a": np.full(1, np.nan, np.float32)}, METADATA), path)
    assert_same(read_safetensors(path), WEIGHTS)
    assert list(tmp_path.iterdir()) == [path]
