"""The .wts text format of tensorrtx, with our metadata in a line that tensorrtx does not read.

The first line is the count of entries. Each entry is a line ``name length value value ...`` whose values are the
big-endian bytes of a float32 in hexadecimal. tensorrtx's loader (yolov5/src/model.cpp, loadWeights) reads that many
entries and stops; after them stands one line ``#yolotrt {json}`` with `Metadata` and the shapes of the arrays.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from yolotrt.errors import WeightsError
from yolotrt.files import atomic_write, require_file
from yolotrt.weights.infer import infer_metadata, is_detect_buffer, last_layer, network_tensors
from yolotrt.weights.model import FloatArray, Metadata, Weights

METADATA_MARK = b"#yolotrt "

_DIGITS = 8
_PITCH = _DIGITS + 1  # a value and the space after it
_BLOCK_VALUES = 1 << 18  # bounds the temporary arrays to a few MiB
_READ_AHEAD = 1 << 20
_AGAIN = "make the file again with gen_wts.py"

_COUNT = re.compile(rb"[ \t]*([0-9]{1,9})[ \t]*\r?\n?")
# tensorrtx's own writer puts two spaces after the length.
_ENTRY_HEAD = re.compile(rb"(\S+)[ \t]+(0|[1-9][0-9]{0,11})(?:[ \t]+|$)")
_VALUE = re.compile(rb"[0-9a-fA-F]{1,8}")


@dataclass(frozen=True)
class _Entry:
    """Where the reader stands, for error messages."""

    path: Path
    position: int
    count: int
    name: str = ""

    def error(self, problem: str, remedy: str = _AGAIN) -> WeightsError:
        """An error about this entry; entry 1 stands on line 2."""
        name = f"{self.name[:120]}, " if self.name else ""
        return WeightsError(
            f"{self.path}: entry {self.position} of {self.count} ({name}line {self.position + 1}) {problem}: {remedy}"
        )


def write_wts(weights: Weights, path: str | Path) -> None:
    """Write `weights` as a .wts file that tensorrtx can load too.

    For tensorrtx the anchors in pixels and the strides are added as ``model.N.anchor_grid`` and ``model.N.strides``
    (yolov5/gen_wts.py there); N is the detection layer. YOLOv5's own buffers of that layer are left out: the metadata
    say the same.

    Raises:
        WeightsError: if there is no tensor, a name has blanks, or a value is NaN or infinite.
        OutputError: if the file cannot be written.
    """
    path = Path(path)
    tensors = {name: array for name, array in weights.tensors.items() if not is_detect_buffer(name)}
    if not tensors:
        raise WeightsError(f"cannot write {path}: the weights hold no tensor: check the checkpoint")
    for name, array in tensors.items():
        _require_writable(name, array, path)
    entries = {**tensors, **_detect_buffers(tensors, weights.metadata)}
    with atomic_write(path) as file:
        file.write(b"%d\n" % len(entries))
        for name, array in entries.items():
            file.write(f"{name} {array.size}".encode())
            for block in _hexadecimal(array):
                file.write(b" ")
                file.write(block)
            file.write(b"\n")
        file.write(METADATA_MARK + _metadata_json(weights.metadata, tensors).encode() + b"\n")


def read_wts(path: str | Path) -> Weights:
    """Read a .wts file, ours or a bare one of tensorrtx.

    Args:
        path: The file. Values may have fewer than 8 digits, as ``%x`` prints them, and lines may end in CR LF.

    Returns:
        float32 arrays with their shapes; flat arrays and inferred metadata for a bare file.

    Raises:
        WeightsError: if the file is missing or malformed, holds NaN or infinity, or, without metadata, is no known
            YOLOv5 model. The message names the entry and the line.
    """
    path = require_file(Path(path), "weights", WeightsError)
    try:
        with path.open("rb", buffering=_READ_AHEAD) as file:
            count = _read_count(file, path)
            tensors = _read_entries(file, path, count)
            metadata_line = _read_metadata_line(file, path, count)
    except OSError as problem:
        raise WeightsError(f"{path} cannot be read: {problem.strerror or problem}: check the disk") from problem
    try:
        if metadata_line is None:
            return Weights(network_tensors(tensors), infer_metadata(tensors))
        return _with_metadata(tensors, metadata_line)
    except WeightsError as problem:
        raise WeightsError(f"{path}: {problem}") from problem


def require_finite(array: FloatArray, what: str) -> None:
    """Refuse NaN and infinity.

    Args:
        array: Any shape.
        what: The tensor, for the message.

    Raises:
        WeightsError: with the index (into the flattened array) of the first such value.
    """
    finite = np.isfinite(array)
    if not finite.all():
        index = int(np.argmin(finite))
        value = float(array.ravel()[index])
        raise WeightsError(
            f"{what} holds {value} at index {index}: training diverged, the model is broken: use another checkpoint"
        )


def _require_writable(name: str, array: FloatArray, path: Path) -> None:
    """Refuse what a reader could not read back."""
    if not _is_name(name):
        raise WeightsError(f"cannot write {path}: {name[:120]!r} is no tensor name (blanks, or nothing): rename it")
    require_finite(array, f"cannot write {path}: tensor {name}")


def _is_name(name: str) -> bool:
    """Whether it can stand in a .wts: not empty, no blanks (the space is the only printable one), no controls."""
    return bool(name) and " " not in name and name.isprintable()


def _detect_buffers(tensors: Mapping[str, FloatArray], metadata: Metadata) -> dict[str, FloatArray]:
    """The two entries that only tensorrtx reads."""
    layer = last_layer(tensors)
    if not metadata.strides or layer is None:
        return {}
    return {
        f"model.{layer}.anchor_grid": np.array(metadata.anchors, dtype=np.float32),  # (levels, anchors, 2)
        f"model.{layer}.strides": np.array(metadata.strides, dtype=np.float32),
    }


def _hexadecimal(array: FloatArray) -> Iterator[bytes]:
    """The values, separated by spaces, in blocks."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK_VALUES):
        yield binascii.hexlify(flat[start : start + _BLOCK_VALUES].astype(">f4").tobytes(), b" ", _DIGITS // 2)


def _metadata_json(metadata: Metadata, tensors: Mapping[str, FloatArray]) -> str:
    """The metadata with the key ``shapes`` added."""
    values = json.loads(metadata.to_json())
    values["shapes"] = {name: list(array.shape) for name, array in tensors.items()}
    return json.dumps(values, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _read_count(file: BinaryIO, path: Path) -> int:
    """The count of entries, which is the first line."""
    line = file.readline(80)
    match = _COUNT.fullmatch(line)
    if not match or not int(match[1]):
        raise WeightsError(
            f"{path} is no .wts file: line 1 is {line.rstrip()[:40]!r} instead of the count of entries: {_AGAIN}"
        )
    return int(match[1])


def _read_entries(file: BinaryIO, path: Path, count: int) -> dict[str, FloatArray]:
    """All entries as flat arrays."""
    tensors: dict[str, FloatArray] = {}
    for position in range(1, count + 1):
        entry = _Entry(path, position, count)
        line = file.readline()
        if not line.strip() or line.startswith(METADATA_MARK):
            raise entry.error("is missing: the file is truncated or its count is wrong")
        name, array = _parse_entry(line, entry)
        if name in tensors:
            raise entry.error(f"repeats the name {name[:120]}")
        tensors[name] = array
    return tensors


def _parse_entry(line: bytes, entry: _Entry) -> tuple[str, FloatArray]:
    """The name and the values (flat) of one line."""
    is_complete = line.endswith(b"\n")
    line = line.rstrip()
    head = _ENTRY_HEAD.match(line)
    if not head:
        raise entry.error(f"does not begin with a name and a length but with {line[:40]!r}")
    try:
        name = head[1].decode()
    except UnicodeDecodeError:
        raise entry.error(f"has a name that is not UTF-8: {head[1][:40]!r}") from None
    if not _is_name(name):
        raise entry.error(f"has an unprintable name: {name[:40]!r}")
    entry = _Entry(entry.path, entry.position, entry.count, name)
    length = int(head[2])
    array = _decode_padded(line, head.end(), length)
    if array is None:
        array = _decode_tokens(line[head.end() :].split(), length, is_complete, entry)
    require_finite(array, f"{entry.path}: entry {entry.position} of {entry.count}, tensor {name[:120]},")
    return name, array


def _decode_padded(line: bytes, start: int, length: int) -> FloatArray | None:
    """`length` values of 8 digits, one space between them, or None if the line is laid out in another way."""
    if len(line) - start != max(_PITCH * length - 1, 0):
        return None
    separators = np.frombuffer(line, np.uint8)[start + _DIGITS :: _PITCH]
    if (separators != ord(" ")).any():
        return None
    array = np.empty(length, np.float32)
    for first in range(0, length, _BLOCK_VALUES):
        block = array[first : first + _BLOCK_VALUES]
        # Eight digits as one 64-bit item, so that one strided copy drops the spaces.
        digits = np.ndarray((block.size,), np.uint64, line, start + _PITCH * first, (_PITCH,))
        try:
            block[:] = np.frombuffer(binascii.unhexlify(digits.tobytes()), ">f4")
        except binascii.Error:
            return None
    return array


def _decode_tokens(tokens: list[bytes], length: int, is_complete: bool, entry: _Entry) -> FloatArray:
    """Values of any number of digits and blanks, as tensorrtx's loader accepts them; says what is wrong with others."""
    # The last value of a file that was cut off may look like an unpadded one.
    is_cut = not is_complete and bool(tokens) and len(tokens[-1]) < _DIGITS
    if len(tokens) != length or is_cut:
        truncated = "" if is_complete else " and the file ends there, so it is truncated"
        raise entry.error(f"declares {length} values and has {len(tokens) - is_cut}{truncated}")
    if max(map(len, tokens), default=0) <= _DIGITS:
        with contextlib.suppress(binascii.Error):
            data = binascii.unhexlify(b"".join(token.rjust(_DIGITS, b"0") for token in tokens))
            return np.frombuffer(data, ">f4").astype(np.float32)
    index, wrong = next((i, token) for i, token in enumerate(tokens) if not _VALUE.fullmatch(token))
    raise entry.error(f"has the value {wrong[:20]!r} at index {index}, which is no hexadecimal float32")


def _read_metadata_line(file: BinaryIO, path: Path, count: int) -> bytes | None:
    """The JSON after the entries, or None if the file has none; nothing but blank lines may follow."""
    metadata: bytes | None = None
    for number, line in enumerate(file, start=count + 2):
        if not line.strip():
            continue
        if metadata is not None or not line.startswith(METADATA_MARK):
            raise WeightsError(
                f"{path}: line {number} ({line[:40]!r}) stands after the last of the {count} declared entries: {_AGAIN}"
            )
        metadata = line[len(METADATA_MARK) :].strip()
    return metadata


def _with_metadata(tensors: dict[str, FloatArray], line: bytes) -> Weights:
    """The tensors in their shapes, without those entries that only tensorrtx reads."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise WeightsError(f"the metadata line is not UTF-8: {_AGAIN}") from None
    metadata = Metadata.from_json(text)
    shapes = json.loads(text).get("shapes")
    tensors = {name: array for name, array in tensors.items() if not is_detect_buffer(name)}
    if not isinstance(shapes, dict) or shapes.keys() != tensors.keys():
        raise WeightsError(f"the metadata line does not give the shapes of exactly the file's tensors: {_AGAIN}")
    return Weights({name: _shaped(name, array, shapes[name]) for name, array in tensors.items()}, metadata)


def _shaped(name: str, array: FloatArray, shape: object) -> FloatArray:
    """The flat array in the shape that the metadata line gives."""
    # A negative side has a meaning of its own for reshape.
    if isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape):
        with contextlib.suppress(ValueError, OverflowError):  # another size, or more axes than NumPy has
            return array.reshape(shape)
    raise WeightsError(f"tensor {name[:120]} has {array.size} values, not the shape {str(shape)[:60]}: {_AGAIN}")
