from __future__ import annotations

import io
import os
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given

from tests.weights.torch_files import (
    Checkpoint,
    Op,
    assert_refused_within_bounded_memory,
    assert_succeeds_or_is_refused,
    byte_edits,
    change,
    fuzz,
    pack,
    read,
    small_legacy,
    small_zip,
    storage,
    storages_in,
    view,
    zip_bytes,
)
from yolotrt.errors import CheckpointError
from yolotrt.weights.checkpoint import read_checkpoint
from yolotrt.weights.inert_pickle import InertUnpickler
from yolotrt.weights.torch_file import TensorReader, read_torch_file

# Numbers

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


def test_deflated_members_and_big_endian_storages_are_read(tmp_path):
    checkpoint = Checkpoint()
    model = checkpoint.model()
    swapped = {}
    storages = storages_in(model)
    for key, content in checkpoint.storages.items():
        size = len(content) // storages[key].count
        swapped[key] = b"".join(content[i : i + size][::-1] for i in range(0, len(content), size))
    found = read(zip_bytes(model, swapped, zipfile.ZIP_DEFLATED, byteorder=b"big"), tmp_path)
    expected = read(zip_bytes(model, checkpoint.storages), tmp_path)
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)


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


# Files of other kinds


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
        read_torch_file(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is a directory: name a file"):
        read_torch_file(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_torch_file(tmp_path / "pipe.pt")


# Damaged files, and attacks on memory

FOUR = np.arange(4, dtype=np.float32).tobytes()


def _tensor_zip(tensor: Op) -> bytes:
    return zip_bytes({"model.0.weight": tensor}, {"0": FOUR})


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


@pytest.mark.parametrize("key", ["missing", "../data.pkl"])
def test_tensor_without_a_storage_is_refused(key, tmp_path):
    with pytest.raises(CheckpointError, match="damaged"):
        read(_tensor_zip(view(storage(key, 4), (4,), (1,))), tmp_path)


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
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_within_bounded_memory(name, tmp_path):
    assert_refused_within_bounded_memory(*BOMBS[name], tmp_path)


@fuzz
@given(edits=byte_edits)
@pytest.mark.parametrize("data", [small_zip(), small_legacy()], ids=["zip", "legacy"])
def test_changed_file_succeeds_or_is_refused(data, edits, tmp_path):
    assert_succeeds_or_is_refused(change(data, edits), tmp_path)


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
        changes = zip(random.integers(0, 120_000, 5).tolist(), random.integers(0, 256, 5).tolist(), strict=True)
        assert_succeeds_or_is_refused(change(data, changes), tmp_path)
