"""The files of `torch.save`: their container formats, and float32 arrays out of them.

PyTorch's torch/serialization.py describes both formats: a zip archive (`data.pkl` and one member a storage), and before
PyTorch 1.6 a row of pickles followed by the raw storages. The file is not trusted: whatever it says of sizes, what is
read stays within a multiple of its own size.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from yolotrt.errors import CheckpointError
from yolotrt.files import require_file
from yolotrt.weights.inert_pickle import DAMAGED, STORAGE_BYTES, InertUnpickler, Storage, TensorView, printable
from yolotrt.weights.model import FloatArray

MAX_PICKLE_BYTES = 64 << 20
"""The pickle of the largest official model, yolov5x6, has less than a megabyte."""
MAX_GROWTH = 16
"""Most bytes in memory for a byte in the file. Half precision to float32 doubles; trained weights hardly deflate."""
MAX_DIMENSIONS = 8

_FLOAT_STORAGES: Final = {"FloatStorage": "f4", "HalfStorage": "f2", "DoubleStorage": "f8", "BFloat16Storage": "u2"}
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
"""First pickle of a non-zip file (torch/serialization.py, MAGIC_NUMBER)."""
_LEGACY_PROTOCOL: Final = 1001
_HEAD_BYTES: Final = 512
"""The header of a tar archive, the longest of those that are told apart."""
_ZIP_ERRORS: Final = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(KeyError, OverflowError, RuntimeError, ValueError),
)
"""All that `zipfile` raises for damaged, encrypted and unknown archives."""
_NOT_CHECKPOINTS: Final = (
    (rb"(?s).{6}\x00\x00\{", "is a .safetensors file, not a .pt checkpoint: use it as weights directly"),
    (rb"version https://git-lfs", "is a Git LFS pointer, not the checkpoint itself: run `git lfs pull`"),
    (
        rb"(\xef\xbb\xbf)?\s*<[!?A-Za-z]",
        "is a web page (HTML or XML), so its download failed: download the .pt file itself",
    ),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!", "is a compressed archive: unpack it and name the .pt file in it"),
    (rb"(?s).{257}ustar", "is a tar archive: unpack it, or save it again with PyTorch 1.0 or newer"),
    (rb"\d+\r?\n", "is a .wts file, not a .pt checkpoint: use it as weights directly"),
    (rb"(?s)[\t\n\r -\x7e]+\Z", "is text, not a checkpoint: download or export the .pt file again"),
    (b"", "is not a PyTorch checkpoint: name a .pt file of YOLOv5"),
)
"""Beginnings of the files that are taken for checkpoints, as regular expressions; the last matches them all."""


def read_torch_file(path: Path) -> bytes:
    """The bytes of a file that looks like one of `torch.save`. Of any other only the beginning is read.

    Raises:
        CheckpointError: if it is missing, unreadable or cannot be such a file, with its path and what it is instead.
    """
    require_file(path, "checkpoint", CheckpointError)
    try:
        with path.open("rb") as file:
            problem = _unlike_checkpoint(file.read(_HEAD_BYTES))
            if problem:
                raise CheckpointError(f"{path} {problem}")
            file.seek(0)
            return file.read()
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}: check the disk") from error


def _unlike_checkpoint(head: bytes) -> str:
    """What a file is whose first bytes are not a checkpoint's, and what to do; empty for a possible checkpoint."""
    if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", head):
        return ""
    return next(problem for pattern, problem in _NOT_CHECKPOINTS if re.match(pattern, head))


def open_torch_file(data: bytes) -> tuple[Any, TensorReader]:
    """Open a file in either format.

    Args:
        data: The whole file.

    Returns:
        Its main object, as `InertUnpickler.load` gives it, and the reader of its tensors.

    Raises:
        CheckpointError: if it is damaged or something else, or its pickle asks for what no YOLOv5 checkpoint needs.
    """
    return _open_zip(data) if data.startswith(b"PK") else _open_legacy(data)


class _ZipMembers:
    """The members of a torch zip archive, read with bounded memory and checked against their CRC."""

    def __init__(self, data: bytes) -> None:
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(data))
            members = self._archive.infolist()
        except _ZIP_ERRORS as problem:
            raise CheckpointError(DAMAGED) from problem
        self.names = frozenset(member.filename for member in members)
        if sum(member.file_size for member in members) > MAX_GROWTH * len(data):
            raise CheckpointError(f"it unpacks to more than {MAX_GROWTH} times its size: {DAMAGED}")

    def read(self, name: str) -> bytes:
        """The bytes of a member.

        Raises:
            CheckpointError: if it is missing, damaged, encrypted, or longer or shorter than the archive says.
        """
        try:
            member = self._archive.getinfo(name)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise CheckpointError(DAMAGED)
            with self._archive.open(member) as file:
                # read() without a size inflates everything that is there, however much that is.
                content = file.read(member.file_size + 1)
        except _ZIP_ERRORS as problem:
            raise CheckpointError(DAMAGED) from problem
        if len(content) != member.file_size:
            raise CheckpointError(DAMAGED)
        return content


def _open_zip(data: bytes) -> tuple[Any, TensorReader]:
    """The main object and the tensors of a zip file, the format since PyTorch 1.6."""
    members = _ZipMembers(data)
    folder = _archive_folder(members.names)
    content = members.read(f"{folder}/data.pkl")
    if len(content) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"its data.pkl has more than {MAX_PICKLE_BYTES >> 20} MiB: it is no YOLOv5 checkpoint")
    order_member = f"{folder}/byteorder"
    byteorder = members.read(order_member) if order_member in members.names else b"little"
    root = InertUnpickler(content).load()
    reader = TensorReader(
        lambda key: members.read(f"{folder}/data/{key}"), ">" if byteorder == b"big" else "<", MAX_GROWTH * len(data)
    )
    return root, reader


def _archive_folder(names: frozenset[str]) -> str:
    """The folder in the zip archive that holds `data.pkl`.

    Raises:
        CheckpointError: if there is none, with what the archive seems to be instead.
    """
    if any(re.fullmatch(r"[^/]*/(constants\.pkl|code/.*)", name, re.DOTALL) for name in names):
        raise CheckpointError(
            "it is a TorchScript export, which holds a fixed program instead of the model's layers: "
            "use the .pt file that it was exported from"
        )
    folders = [name.removesuffix("/data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(folders) == 1:
        return folders[0]
    inner = sorted(printable(name) for name in names if name.endswith((".pt", ".pth")))
    raise CheckpointError(
        f"it is a zip archive around {inner[0]}: unpack it and name that file"
        if inner
        else "it is a zip archive but no PyTorch checkpoint (it has no data.pkl): name a .pt file of YOLOv5"
    )


def _open_legacy(data: bytes) -> tuple[Any, TensorReader]:
    """The main object and the tensors of a file in the format before PyTorch 1.6.

    Five pickles (magic number, protocol, system, main object, storage keys), then for each key the number of its
    elements (int64) and the elements, always little-endian.
    """
    unpickler = InertUnpickler(data)
    if unpickler.load() != _LEGACY_MAGIC:
        raise CheckpointError("it is a pickle but no PyTorch checkpoint: name a .pt file of YOLOv5")
    protocol, _, root, keys = (unpickler.load() for _ in range(4))
    if protocol != _LEGACY_PROTOCOL or not isinstance(keys, list):
        raise CheckpointError(DAMAGED)
    places = _legacy_storages(data, unpickler.position, keys, unpickler.storages)
    return root, TensorReader(lambda key: data[places[key]], "<", MAX_GROWTH * len(data))


def _legacy_storages(data: bytes, position: int, keys: list[Any], storages: dict[str, Storage]) -> dict[str, slice]:
    """Where each storage's elements lie in the file."""
    places = {}
    for key in keys:
        if not isinstance(key, str) or key not in storages or position + 8 > len(data):
            raise CheckpointError(DAMAGED)
        (count,) = struct.unpack_from("<q", data, position)
        start = position + 8
        position = start + count * STORAGE_BYTES[storages[key].kind]
        if count != storages[key].count or not start <= position <= len(data):
            raise CheckpointError(DAMAGED)
        places[key] = slice(start, position)
    if places.keys() != storages.keys():
        raise CheckpointError(DAMAGED)
    return places


class TensorReader:
    """Makes float32 arrays of the tensors that a pickle describes.

    Args:
        read_storage: Returns a storage's bytes by its key.
        byteorder: Of the numbers in the file.
        byte_limit: Most bytes that all arrays together may take.
    """

    def __init__(self, read_storage: Callable[[str], bytes], byteorder: Literal["<", ">"], byte_limit: int) -> None:
        self._read_storage = read_storage
        self._byteorder = byteorder
        self._bytes_left = byte_limit
        self._storages: dict[str, npt.NDArray[Any]] = {}

    def read(self, tensor: TensorView) -> FloatArray | None:
        """Return the tensor as a contiguous float32 array of its own, or None if it is not floating point.

        Raises:
            CheckpointError: if it reaches beyond its storage, or the arrays become too large for the file.
        """
        if tensor.storage.kind not in _FLOAT_STORAGES:
            return None
        shape, strides = _checked_layout(tensor)
        self._bytes_left -= 4 * math.prod(shape)
        if self._bytes_left < 0:
            raise CheckpointError(f"its tensors take more than {MAX_GROWTH} times the file's size: {DAMAGED}")
        values = self._storage(tensor.storage)
        view = np.lib.stride_tricks.as_strided(
            values[tensor.offset :], shape, [stride * values.itemsize for stride in strides], writeable=False
        )
        return _as_float32(view, tensor.storage.kind)

    def _storage(self, storage: Storage) -> npt.NDArray[Any]:
        """The numbers of a storage, one-dimensional, in the file's precision."""
        if storage.key not in self._storages:
            data = self._read_storage(storage.key)
            dtype = np.dtype(_FLOAT_STORAGES[storage.kind]).newbyteorder(self._byteorder)
            if not 0 <= storage.count * dtype.itemsize <= len(data):
                raise CheckpointError(DAMAGED)
            self._storages[storage.key] = np.frombuffer(data, dtype, storage.count)
        return self._storages[storage.key]


def _checked_layout(tensor: TensorView) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides (in elements) of a tensor that has elements and stays within its storage.

    Raises:
        CheckpointError: if it does not, or they are no such numbers.
    """
    shape, strides = tensor.shape, tensor.strides
    for sizes in (shape, strides, (tensor.offset,)):
        if not isinstance(sizes, tuple) or any(type(size) is not int or size < 0 for size in sizes):
            raise CheckpointError(DAMAGED)
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(DAMAGED)
    # A dimension of one never steps, and PyTorch may store any stride for it.
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape or last >= tensor.storage.count:
        raise CheckpointError(DAMAGED)
    return shape, strides


def _as_float32(values: npt.NDArray[Any], kind: str) -> FloatArray:
    """A contiguous float32 copy. bfloat16 is the upper half of a float32, which NumPy does not know."""
    if kind == "BFloat16Storage":
        bits = np.array(values, np.uint32, order="C")
        # in place, as NumPy makes a scalar of an array without dimensions; by a uint32, as NumPy 1 refuses an int
        np.left_shift(bits, np.uint32(16), out=bits)
        return bits.view(np.float32)
    with np.errstate(over="ignore"):
        return np.array(values, np.float32, order="C")
