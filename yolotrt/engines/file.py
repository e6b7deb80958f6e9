"""The engine file: a header that says everything about a plan, then the plan.

Layout, as Ultralytics frames its TensorRT engines so that its tools can skip the header: 4 bytes, the header's length
(unsigned, little-endian); the header, UTF-8 JSON; the plan to the end of the file. `EngineHeader.names`, `stride`,
`task`, `batch` and `imgsz` are Ultralytics' keys, the others are ours.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from yolotrt.errors import EngineFileError, OutputError, WeightsError
from yolotrt.files import atomic_write, require_file
from yolotrt.weights import Metadata
from yolotrt.weights.model import MAX_IMAGE_SIZE

FORMAT = "yolotrt-engine"
FORMAT_VERSION = 1

MAX_HEADER_BYTES = 64 * 1024 * 1024
MAX_TENSOR_SIDE = 1 << 24
_LENGTH = struct.Struct("<I")

PLAN_MAGICS = (b"ftrt", b"ptrt", b"vtrt")
"""What TensorRT's plans begin with."""
_PLAN_START_BYTES = 16

REBUILD = "build it again with python -m yolotrt -s"


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the network.

    Attributes:
        name: Its name in the engine.
        dtype: ``float32``, ``float16``, ...
        shape: Dimensions; -1 for a dynamic batch.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineHeader:
    """What an engine file says of itself.

    Attributes:
        model: The model's metadata: graph, class names, anchors, strides, task.
        backend: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        backend_version: Version of the library that built the plan.
        precision: ``fp32``, ``fp16``, ``int8``.
        imgsz: Network input height and width in pixels.
        batch_range: Smallest, usual and largest batch; equal for a static batch.
        inputs: The network's inputs.
        outputs: The network's outputs.
        plan_sha256: SHA-256 of the plan.
        plan_size: Bytes of the plan.
        weights_sha256: SHA-256 over the names and values of the weights.
        yololayer: Where raw heads become boxes: ``host`` (NumPy), ``kernel`` (after the engine), ``plugin`` (inside).
        letterbox: Rule of the input: pad value, colour order, scale of the values.
        device_name: GPU that the plan was built on, empty for a CPU.
        compute_capability: Its compute capability, such as ``8.9``, empty for a CPU.
        build_options: Options of the build, for information.
        created: Time of the build, ISO 8601, UTC.
        yolotrt_version: Version of this package that built it.
    """

    model: Metadata
    backend: str
    backend_version: str
    precision: str
    imgsz: tuple[int, int]
    batch_range: tuple[int, int, int]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    plan_sha256: str
    plan_size: int
    weights_sha256: str = ""
    yololayer: str = "host"
    letterbox: Mapping[str, Any] = field(default_factory=dict)
    device_name: str = ""
    compute_capability: str = ""
    build_options: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    yolotrt_version: str = ""

    @property
    def max_batch(self) -> int:
        """Largest batch that one call takes."""
        return self.batch_range[2]

    @property
    def is_dynamic(self) -> bool:
        """Whether the batch may vary from call to call."""
        return self.batch_range[0] != self.batch_range[2]

    def to_json(self) -> str:
        """The header as JSON, with a checksum over itself."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "names": {str(index): name for index, name in enumerate(self.model.names)},
            "stride": max(self.model.strides, default=32),
            "task": self.model.task,
            "batch": self.max_batch,
            **asdict(self),
            "anchors": self.model.anchors,
            "strides": self.model.strides,
        }
        return json.dumps({**values, "header_sha256": _header_checksum(values)})

    @classmethod
    def from_json(cls, text: str, path: Path) -> EngineHeader:
        """Read what `to_json` wrote.

        Args:
            text: The JSON.
            path: The file that it comes from, for messages.

        Raises:
            EngineFileError: if it is not ours, of a later format, or damaged.
        """
        values = _parse_object(text, path)
        if values.get("format") != FORMAT:
            maker = "Ultralytics" if {"names", "stride", "task", "imgsz"} <= values.keys() else "another program"
            raise EngineFileError(f"engine {path} was made by {maker}: build one from the checkpoint with -s --weights")
        if values.get("format_version") != FORMAT_VERSION:
            raise EngineFileError(
                f"engine {path} has format {values.get('format_version')!r:.20}, this version reads {FORMAT_VERSION}: "
                f"{REBUILD} or update yolotrt"
            )
        checksum = values.pop("header_sha256", None)
        if checksum != _header_checksum(values):
            raise EngineFileError(f"engine {path} has a damaged header: {REBUILD}")
        try:
            header = cls(**_typed(values, {item.name for item in fields(cls)}))
        except (TypeError, ValueError, KeyError, OverflowError, WeightsError) as problem:
            raise EngineFileError(f"engine {path} has an unreadable header ({problem}): {REBUILD}") from problem
        wrong = _first_wrong_field(header)
        if wrong:
            raise EngineFileError(f"engine {path} has an unreadable header (its {wrong} is impossible): {REBUILD}")
        return header


@dataclass(frozen=True)
class EngineFile:
    """A header and its plan.

    Attributes:
        header: What the plan is.
        plan: TensorRT's plan, or an ONNX model for the CPU engine.
        path: Where it was read from or written to; None for one that is only in memory.
    """

    header: EngineHeader
    plan: bytes = field(repr=False)
    path: Path | None = None

    @property
    def label(self) -> str:
        """The engine's name in messages."""
        return str(self.path) if self.path else "(in memory)"

    def save(self, path: str | Path) -> EngineFile:
        """Write the file atomically; returns the same engine with its new path.

        Raises:
            OutputError: if `path` cannot be written, or is a file of another kind.
        """
        path = Path(path)
        require_engine_target(path)
        text = self.header.to_json().encode()
        with atomic_write(path) as file:
            file.write(_LENGTH.pack(len(text)))
            file.write(text)
            file.write(self.plan)
        return EngineFile(self.header, self.plan, path)

    @classmethod
    def load(cls, path: str | Path) -> EngineFile:
        """Read an engine file and check its sums.

        Raises:
            EngineFileError: if it is missing, empty, a directory, not one of ours, truncated or damaged.
        """
        path = require_file(Path(path), "engine", EngineFileError)
        try:
            data = path.read_bytes()
        except OSError as problem:
            raise EngineFileError(f"engine {path} cannot be read: {problem.strerror}") from problem
        text, plan = _split(data, path)
        header = EngineHeader.from_json(text, path)
        if len(plan) != header.plan_size:
            raise EngineFileError(
                f"engine {path} holds {len(plan)} of {header.plan_size} bytes of its plan: copy it again or {REBUILD}"
            )
        if hashlib.sha256(plan).hexdigest() != header.plan_sha256:
            raise EngineFileError(f"engine {path} is damaged (its checksum differs): copy it again or {REBUILD}")
        return cls(header, plan, path)


def require_engine_target(path: Path) -> None:
    """Refuse to replace anything but an engine, such as the checkpoint that the engine is made of.

    Raises:
        OutputError: if `path` is an existing file that is no engine file.
    """
    try:
        if path.is_file() and path.stat().st_size > 0 and not is_engine_file(path):
            raise OutputError(f"cannot write the engine {path}: a file of another kind is there: choose another name")
    except OSError as problem:
        raise OutputError(f"cannot write the engine {path}: {problem.strerror}: choose another name") from problem


def require_plan_target(path: Path) -> None:
    """Refuse to replace anything but a bare plan or an ONNX model.

    Raises:
        OutputError: if `path` is an existing file of another kind.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_PLAN_START_BYTES)
    except FileNotFoundError:
        return
    except OSError as problem:
        raise OutputError(f"cannot write the plan {path}: {problem.strerror}: choose another name") from problem
    if start and not _starts_like_a_plan(start):
        raise OutputError(f"cannot write the plan {path}: a file of another kind is there: choose another name")


def _starts_like_a_plan(start: bytes) -> bool:
    """Whether the bytes are those of a TensorRT plan, or of an ONNX model: a small version number, then the producer.

    The ONNX fields are protobuf (onnx.proto, ModelProto): 1 ir_version, 2 producer_name.
    """
    is_onnx = len(start) >= 3 and start[0] == 0x08 and start[1] < 0x80 and start[2] == 0x12
    return start[:4] in PLAN_MAGICS or is_onnx


def is_engine_file(path: Path) -> bool:
    """Whether the file starts like an engine file (a length and JSON), without reading all of it."""
    with path.open("rb") as file:
        start = file.read(_LENGTH.size + 1)
    return len(start) > _LENGTH.size and start[_LENGTH.size :] == b"{"


def _split(data: bytes, path: Path) -> tuple[str, bytes]:
    """The header's text and the plan."""
    foreign = EngineFileError(f"{path} is no engine file of yolotrt{_what_instead(data)}")
    if len(data) <= _LENGTH.size:
        raise foreign
    (length,) = _LENGTH.unpack_from(data)
    if data[_LENGTH.size : _LENGTH.size + 1] != b"{" or length > MAX_HEADER_BYTES:
        raise foreign
    if _LENGTH.size + length > len(data):
        raise EngineFileError(f"engine {path} ends inside its header: copy it again or {REBUILD}")
    try:
        return data[_LENGTH.size : _LENGTH.size + length].decode(), data[_LENGTH.size + length :]
    except UnicodeDecodeError as problem:
        raise EngineFileError(f"engine {path} has a damaged header: {REBUILD}") from problem


def _what_instead(data: bytes) -> str:
    """What a foreign file seems to be, and what to do with it."""
    if data[:2] == b"PK" or data[:1] == b"\x80":
        return " but seems to be a PyTorch checkpoint: convert it with gen_wts.py, then build with -s --weights"
    if data[:4] in PLAN_MAGICS:
        return " but a bare TensorRT plan without our header: build from the weights with -s"
    return ": build one from the weights with python -m yolotrt -s --weights FILE"


def _parse_object(text: str, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as problem:  # not JSON, or nested without end
        raise EngineFileError(f"engine {path} has a damaged header: {REBUILD}") from problem
    if not isinstance(values, dict):
        raise EngineFileError(f"engine {path} has a damaged header: {REBUILD}")
    return values


def _typed(values: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """JSON values as the constructor's types."""
    typed = {key: value for key, value in values.items() if key in known}
    typed["model"] = Metadata.from_json(json.dumps(values["model"]))
    height, width = values["imgsz"]
    low, usual, high = values["batch_range"]
    typed.update(imgsz=(height, width), batch_range=(low, usual, high))
    for key in ("inputs", "outputs"):
        typed[key] = tuple(TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in values[key])
    return typed


def _first_wrong_field(header: EngineHeader) -> str:
    """Name of the first field whose value no engine has, or an empty string."""
    for item in fields(header):
        if item.type == "str" and not isinstance(getattr(header, item.name), str):
            return item.name
    low, usual, high = header.batch_range
    right = {
        "imgsz": all(type(side) is int and 1 <= side <= MAX_IMAGE_SIZE for side in header.imgsz),
        "batch_range": all(type(size) is int for size in header.batch_range) and 1 <= low <= usual <= high,
        "inputs": len(header.inputs) > 0 and all(map(_is_possible, header.inputs)),
        "outputs": len(header.outputs) > 0 and all(map(_is_possible, header.outputs)),
    }
    return next((name for name, is_right in right.items() if not is_right), "")


def _is_possible(tensor: TensorInfo) -> bool:
    """Whether types are right and sizes positive, but for a dynamic batch."""
    sizes = tensor.shape
    return (
        isinstance(tensor.name, str)
        and isinstance(tensor.dtype, str)
        and len(sizes) > 0
        and all(type(size) is int for size in sizes)
        and (sizes[0] == -1 or sizes[0] > 0)
        and all(0 < size <= MAX_TENSOR_SIDE for size in sizes[1:])
    )


def _header_checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 over the header in a canonical form."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
