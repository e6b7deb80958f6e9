"""Reading YOLOv5 checkpoints (.pt) without PyTorch and without running anything that the file contains.

A YOLOv5 checkpoint is a pickle of whole Python objects, and a pickle is a program: the standard `pickle.Unpickler`
calls what the file tells it to call. Even with a restricted `find_class` it can be crashed (hashing a tuple nested a
million deep overflows the C stack) or made to allocate gigabytes (one memo opcode with a large index). Therefore
`InertUnpickler` interprets the opcodes itself: it knows the few globals that a YOLOv5 checkpoint needs, turns every
class into an inert `StandIn`, and refuses everything else by name. It never copies a container and never hashes
anything but strings and small integers, so time and memory stay proportional to the file.

The two container formats are described in PyTorch's torch/serialization.py: a zip archive (`data.pkl` and one member a
storage), and before PyTorch 1.6 a row of pickles followed by the raw storages.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from yolotrt.errors import CheckpointError, WeightsError
from yolotrt.files import require_file
from yolotrt.weights.model import (
    BATCH_NORM_EPSILON,
    MAX_CLASSES,
    MAX_STRIDE,
    Anchors,
    FloatArray,
    Metadata,
    Weights,
)

MAX_PICKLE_BYTES = 64 << 20
"""The pickle of the largest official model, yolov5x6, has less than a megabyte."""
MAX_OPCODES = 2_000_000
"""yolov5n has 28,000; an object costs about a hundred bytes, so this bounds the objects to some 200 MB."""
MAX_GROWTH = 16
"""Most bytes in memory for a byte in the file. Half precision to float32 doubles; trained weights hardly deflate."""
MAX_MODULES = 20_000
MAX_MODULE_DEPTH = 32
MAX_DIMENSIONS = 8
MAX_TENSORS = 100_000
MAX_NAME_LENGTH = 120
MAX_YAML_DEPTH = 16
MAX_YAML_SIZE = 1_000_000
"""Values and letters; yolov5x6.yaml has some 4,000."""

_DAMAGED: Final = "it is truncated or damaged: download or copy it again"
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
"""First pickle of a non-zip file (torch/serialization.py, MAGIC_NUMBER)."""
_LEGACY_PROTOCOL: Final = 1001


def read_checkpoint(path: Path) -> Weights:
    """Read a YOLOv5 checkpoint of any release: a training checkpoint, a bare model or a state_dict.

    Of a training checkpoint the averaged model (`ema`) is taken where there is one. Arrays come out as float32 under
    YOLOv5's state_dict names; integer tensors (`num_batches_tracked`) are left out. Anchors are taken from the last
    layer's `anchors` buffer, which is in cells, times its stride (models/yolo.py, Detect); stored grids are ignored, as
    YOLOv5 6.0 stored them without the -0.5 offset.

    Args:
        path: A file written by `torch.save`, in the zip or the older format.

    Returns:
        float32 arrays and what YOLOv5 knows about them. A state_dict carries no metadata; they are inferred from the
        shapes and `Metadata.inferred` says so.

    Raises:
        CheckpointError: if the file is no such checkpoint, is damaged, or refers to a class or function that a YOLOv5
            checkpoint has no use for. Nothing from the file is run in any case.
        WeightsError: if a state_dict's shapes are not those of a YOLOv5 model.
    """
    data = _read_file(path)
    try:
        root, reader = _open_container(data)
        weights = _extract(root, reader)
    except CheckpointError as problem:
        raise CheckpointError(f"checkpoint {path}: {problem}") from problem
    except MemoryError as problem:
        raise CheckpointError(f"checkpoint {path} does not fit into memory: use a machine with more") from problem
    digest = hashlib.sha256(data).hexdigest()
    return replace(weights, metadata=replace(weights.metadata, source_sha256=digest))


# ---------------------------------------------------------------------------------------------------------------------
# What a pickle becomes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. Only a name: nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return _printable(f"{self.module}.{self.name}")


@dataclass(slots=True, eq=False)
class StandIn:
    """An object of a class that is not there: its class's name and the state that the file gives it."""

    kind: Global
    state: Any = None

    def get(self, attribute: str) -> Any:
        """The value of an attribute, or None."""
        return self.state.get(attribute) if isinstance(self.state, dict) else None

    def table(self, attribute: str) -> dict[Any, Any]:
        """The value of an attribute that should be a dictionary, or an empty one."""
        value = self.get(attribute)
        return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of numbers in the file: its key, its torch storage class's name and its number of elements."""

    key: str
    kind: str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorView:
    """A tensor as the file describes it; nothing is checked before `TensorReader.read`."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any


_STORAGE_BYTES: Final = {
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "DoubleStorage": 8,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
_FLOAT_STORAGES: Final = {"FloatStorage": "f4", "HalfStorage": "f2", "DoubleStorage": "f8", "BFloat16Storage": "u2"}

_DTYPES: Final = frozenset(
    f"torch.{name}"
    for name in (
        *("float16", "float32", "float64", "bfloat16", "half", "float", "double"),
        *("uint8", "int8", "int16", "int32", "int64", "bool"),
    )
)

_CLASS_PACKAGES: Final = ("models", "utils", "yolov5", "torch.nn", "torchvision.transforms", "__main__")
"""Where the classes of YOLOv5's modules live. `torchvision.transforms`: classification models keep their test
transforms; `yolov5`: the pip package of that name."""

_VALUES: Final = frozenset(
    (
        *("argparse.Namespace", "types.SimpleNamespace", "collections.Counter", "_codecs.encode", "torch.device"),
        *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
        *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *("numpy.dtype", "numpy.ndarray", "torchvision.transforms.functional.InterpolationMode"),
    )
)
"""Options, dates and scores that a training run leaves behind. They are accepted and thrown away."""


def _new_dictionary(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """An empty dictionary; its items follow as opcodes of their own."""
    if len(arguments) > 1:
        raise CheckpointError(_DAMAGED)
    return {}


def _same_items(arguments: tuple[Any, ...]) -> Any:
    """The items of a list, tuple or set themselves: a copy per opcode would let a small file fill the memory."""
    if not arguments:
        return []
    if len(arguments) == 1 and isinstance(arguments[0], (list, tuple)):
        return arguments[0]
    raise CheckpointError(_DAMAGED)


def _tensor(arguments: tuple[Any, ...]) -> TensorView:
    """See torch/_utils.py, `_rebuild_tensor_v2`: storage, offset, size and stride come first."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise CheckpointError(_DAMAGED)
    return TensorView(*arguments[:4])


def _parameter(arguments: tuple[Any, ...]) -> TensorView:
    """See torch/_utils.py, `_rebuild_parameter`: the tensor comes first."""
    if not arguments or not isinstance(arguments[0], TensorView):
        raise CheckpointError(_DAMAGED)
    return arguments[0]


def _attribute_of_class(arguments: tuple[Any, ...]) -> StandIn:
    """Segmentation models pickle their bound `forward` as ``getattr(Detect, "forward")``; its value is never used."""
    access = Global("builtins", "getattr")
    if len(arguments) != 2 or not isinstance(arguments[0], Global) or not _is_class(arguments[0]):
        raise _refusal(access)
    if not isinstance(arguments[1], str) or not arguments[1].isidentifier():
        raise _refusal(access)
    return StandIn(access)


_CALLS: Final[dict[str, Callable[[tuple[Any, ...]], Any]]] = {
    "collections.OrderedDict": _new_dictionary,
    "collections.defaultdict": _new_dictionary,
    "builtins.dict": _new_dictionary,
    "builtins.set": _same_items,
    "builtins.frozenset": _same_items,
    "builtins.list": _same_items,
    "builtins.tuple": _same_items,
    "torch.Size": _same_items,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "builtins.getattr": _attribute_of_class,
}
"""Everything that a file can have called, and what is done instead."""


def _is_class(name: Global) -> bool:
    """Whether this is a class of YOLOv5 or PyTorch for which a stand-in is made."""
    return any(name.module == package or name.module.startswith(f"{package}.") for package in _CLASS_PACKAGES)


def _find_global(module: str, name: str) -> Global:
    """The allowed global of that name. Dotted names would mean attribute look-ups and are refused.

    Raises:
        CheckpointError: if it is not allowed; the message names it.
    """
    module = "builtins" if module == "__builtin__" else module  # Python 2's name, which pickle protocol 2 writes
    found = Global(module, name)
    full_name = f"{module}.{name}"
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise _refusal(found)
    if module == "torch" and (name in _STORAGE_BYTES or full_name in _DTYPES):
        return found
    if full_name in _CALLS or full_name in _VALUES or _is_class(found):
        return found
    raise _refusal(found)


def _refusal(name: Global) -> CheckpointError:
    """The error for a global that is not allowed, or not in this place."""
    if name.module.split(".")[0] == "ultralytics":
        return CheckpointError(
            f"it needs {name} of the ultralytics package, so it is YOLOv8 or later, or an anchor-free YOLOv5 'u' "
            "model, which are other networks: use a checkpoint of the YOLOv5 repository, such as yolov5s.pt"
        )
    return CheckpointError(
        f"it asks for {name}, which no YOLOv5 checkpoint needs; nothing of the file was run: "
        "get the checkpoint from a source that you trust"
    )


def _printable(text: str) -> str:
    """Text from the file, made safe for one line on a terminal."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_NAME_LENGTH])
    return shown if len(text) <= MAX_NAME_LENGTH else f"{shown}..."


# ---------------------------------------------------------------------------------------------------------------------
# The pickle machine
# ---------------------------------------------------------------------------------------------------------------------

_CONSTANTS: Final = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_NUMBERS: Final = {pickle.BININT: "<i", pickle.BININT1: "B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
_LONGS: Final = {pickle.LONG1: "B", pickle.LONG4: "<i"}
_TEXTS: Final = {pickle.BINUNICODE: "<I", pickle.SHORT_BINUNICODE: "B", pickle.BINUNICODE8: "<Q"}
_BYTES: Final = {pickle.BINBYTES: "<I", pickle.SHORT_BINBYTES: "B", pickle.BINBYTES8: "<Q"}
_GETS: Final = {pickle.BINGET: "B", pickle.LONG_BINGET: "<I"}
_PUTS: Final = {pickle.BINPUT: "B", pickle.LONG_BINPUT: "<I"}
_TUPLES: Final = {pickle.EMPTY_TUPLE: 0, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_MAX_LONG_BYTES: Final = 16
"""The longest integer in a checkpoint is the legacy magic number with ten bytes."""
_MAX_LINE: Final = 1024
"""More than any module's name."""
_MAX_KEY: Final = 2**60
"""Below it Python's integer hash is the integer itself, so a file cannot choose keys that collide."""


class InertUnpickler:
    """Interprets a pickle of protocol 2 to 5 without importing or calling anything.

    Attributes:
        position: Index of the byte after the pickle, once `load` has returned.
        storages: The storages that the pickle refers to, by key.
    """

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.position = position
        self.storages: dict[str, Storage] = {}
        self._data = data
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Interpret the pickle that starts at `position`.

        Returns:
            Plain Python values, `StandIn`, `TensorView` and `Global` objects.

        Raises:
            CheckpointError: if the pickle is damaged, too large, or asks for something that is not allowed.
        """
        handlers = self._make_handlers()
        try:
            for _ in range(MAX_OPCODES):
                opcode = self._data[self.position]
                self.position += 1
                if opcode == pickle.STOP[0]:
                    return self._stack.pop()
                handlers[opcode]()
        except (IndexError, KeyError, UnicodeDecodeError) as problem:
            raise CheckpointError(_DAMAGED) from problem
        raise CheckpointError(f"it has more than {MAX_OPCODES} objects: it is no YOLOv5 checkpoint")

    def _make_handlers(self) -> dict[int, Callable[[], None]]:
        """The method that carries out each opcode."""
        handlers: dict[bytes, Callable[[], None]] = {
            pickle.PROTO: lambda: self._skip(1),
            pickle.FRAME: lambda: self._skip(8),
            pickle.MARK: self._mark,
            pickle.POP: self._pop,
            pickle.POP_MARK: self._discard_to_mark,
            pickle.DUP: lambda: self._push(self._stack[-1]),
            pickle.EMPTY_LIST: lambda: self._push([]),
            pickle.EMPTY_SET: lambda: self._push([]),
            pickle.EMPTY_DICT: lambda: self._push({}),
            pickle.TUPLE: lambda: self._push(tuple(self._pop_mark())),
            pickle.FROZENSET: lambda: self._push(self._pop_mark()),
            pickle.APPEND: lambda: self._append([self._stack.pop()]),
            pickle.APPENDS: lambda: self._append(self._pop_mark()),
            pickle.ADDITEMS: lambda: self._append(self._pop_mark()),
            pickle.SETITEM: lambda: self._set_items([self._stack.pop(-2), self._stack.pop()]),
            pickle.SETITEMS: lambda: self._set_items(self._pop_mark()),
            pickle.MEMOIZE: lambda: self._put(len(self._memo)),
            pickle.GLOBAL: lambda: self._push(_find_global(self._take_line(), self._take_line())),
            pickle.STACK_GLOBAL: self._stack_global,
            pickle.BINPERSID: lambda: self._push(self._find_persistent(self._stack.pop())),
            pickle.REDUCE: self._reduce,
            pickle.NEWOBJ: self._new_object,
            pickle.NEWOBJ_EX: self._new_object_with_keywords,
            pickle.BUILD: self._build,
        }
        handlers |= {code: partial(self._push, value) for code, value in _CONSTANTS.items()}
        handlers |= {code: partial(self._number, struct.Struct(form)) for code, form in _NUMBERS.items()}
        handlers |= {code: partial(self._long, struct.Struct(form)) for code, form in _LONGS.items()}
        handlers |= {code: partial(self._text, struct.Struct(form)) for code, form in _TEXTS.items()}
        handlers |= {code: partial(self._bytes, struct.Struct(form)) for code, form in _BYTES.items()}
        handlers |= {code: partial(self._get, struct.Struct(form)) for code, form in _GETS.items()}
        handlers |= {code: partial(self._numbered_put, struct.Struct(form)) for code, form in _PUTS.items()}
        handlers |= {code: partial(self._short_tuple, length) for code, length in _TUPLES.items()}
        return {code[0]: handler for code, handler in handlers.items()}

    # Reading the byte stream

    def _take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if count < 0 or self.position > len(self._data):
            raise CheckpointError(_DAMAGED)
        return self._data[start : self.position]

    def _take_number(self, form: struct.Struct) -> Any:
        return form.unpack(self._take(form.size))[0]

    def _take_line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + _MAX_LINE)
        if end < 0:
            raise CheckpointError(_DAMAGED)
        line = self._take(end - self.position).decode()
        self.position += 1
        return line

    def _skip(self, count: int) -> None:
        self._take(count)

    # The stack and the memo

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> None:
        self._stack.pop()

    def _mark(self) -> None:
        self._outer_stacks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._outer_stacks.pop()
        return items

    def _discard_to_mark(self) -> None:
        self._pop_mark()

    def _get(self, form: struct.Struct) -> None:
        self._push(self._memo[self._take_number(form)])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _numbered_put(self, form: struct.Struct) -> None:
        self._put(self._take_number(form))

    # Plain values

    def _number(self, form: struct.Struct) -> None:
        self._push(self._take_number(form))

    def _long(self, form: struct.Struct) -> None:
        count = self._take_number(form)
        if count > _MAX_LONG_BYTES:
            raise CheckpointError(_DAMAGED)
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _text(self, form: struct.Struct) -> None:
        self._push(self._take(self._take_number(form)).decode())

    def _bytes(self, form: struct.Struct) -> None:
        self._push(self._take(self._take_number(form)))

    def _short_tuple(self, length: int) -> None:
        if length > len(self._stack):
            raise CheckpointError(_DAMAGED)
        start = len(self._stack) - length
        self._stack[start:] = [tuple(self._stack[start:])]

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, StandIn):
            raise CheckpointError(_DAMAGED)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            # Other kinds of keys are left out: nothing that is looked up has one, and hashing them can be attacked.
            target.update(
                (key, value) for key, value in zip(items[::2], items[1::2], strict=False) if _is_plain_key(key)
            )
        elif not isinstance(target, StandIn):
            raise CheckpointError(_DAMAGED)

    # Names and objects

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise CheckpointError(_DAMAGED)
        self._push(_find_global(module, name))

    def _find_persistent(self, reference: Any) -> Global | Storage:
        """What a reference out of the pickle stands for; see torch/serialization.py, `persistent_load`."""
        match reference:
            case ("module", Global() as kind, _, _):
                return kind
            case ("storage", Global(module="torch", name=kind), str() as key, _, int() as count, *view):
                if view not in ([], [None]):
                    raise CheckpointError("it holds storage views of PyTorch 0.3: save it again with a newer PyTorch")
                return self._register(Storage(key, kind, count))
        raise CheckpointError(_DAMAGED)

    def _register(self, storage: Storage) -> Storage:
        known = self.storages.setdefault(storage.key, storage)
        if storage.kind not in _STORAGE_BYTES or (known.kind, known.count) != (storage.kind, storage.count):
            raise CheckpointError(_DAMAGED)
        return known

    def _reduce(self) -> None:
        """Carry out the stand-in for a call, if there is one for this name."""
        arguments, called = self._stack.pop(), self._stack.pop()
        if isinstance(called, StandIn):
            raise _refusal(called.kind)
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise CheckpointError(_DAMAGED)
        name = f"{called.module}.{called.name}"
        if name in _CALLS:
            self._push(_CALLS[name](arguments))
        elif name in _VALUES:
            self._push(StandIn(called))
        else:
            raise _refusal(called)

    def _new_object_with_keywords(self) -> None:
        self._stack.pop()
        self._new_object()

    def _new_object(self) -> None:
        """Make a stand-in for an object of a known class; the arguments of `__new__` are not looked at."""
        arguments, kind = self._stack.pop(), self._stack.pop()
        if not isinstance(kind, Global) or not isinstance(arguments, tuple):
            raise CheckpointError(_DAMAGED)
        if not _is_class(kind) and f"{kind.module}.{kind.name}" not in _VALUES:
            raise _refusal(kind)
        self._push(StandIn(kind))

    def _build(self) -> None:
        """Give an object its state: always by reference, as the same state can be given to a million objects."""
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, StandIn):
            target.state = state
        elif not isinstance(
            target, dict
        ):  # the `_metadata` of a state_dict, an OrderedDict with attributes, is not used
            raise CheckpointError(_DAMAGED)


def _is_plain_key(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and abs(key) < _MAX_KEY)


# ---------------------------------------------------------------------------------------------------------------------
# The two file formats
# ---------------------------------------------------------------------------------------------------------------------


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
            raise CheckpointError(f"its tensors take more than {MAX_GROWTH} times the file's size: {_DAMAGED}")
        values = self._storage(tensor.storage)
        view = np.lib.stride_tricks.as_strided(
            values[tensor.offset :], shape, [stride * values.itemsize for stride in strides], writeable=False
        )
        return _as_float32(view, tensor.storage.kind)

    def _storage(self, storage: Storage) -> npt.NDArray[Any]:
        """The numbers of a storage, one-dimensional, in the file's precision."""
        if storage.key not in self._storages:
            data = self._read_storage(storage.key)
            if not 0 <= storage.count * _STORAGE_BYTES[storage.kind] <= len(data):
                raise CheckpointError(_DAMAGED)
            dtype = np.dtype(_FLOAT_STORAGES[storage.kind]).newbyteorder(self._byteorder)
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
            raise CheckpointError(_DAMAGED)
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(_DAMAGED)
    # A dimension of one never steps, and PyTorch may store any stride for it.
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True))
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape or last >= tensor.storage.count:
        raise CheckpointError(_DAMAGED)
    return shape, strides


def _as_float32(values: npt.NDArray[Any], kind: str) -> FloatArray:
    """A contiguous float32 copy. bfloat16 is the upper half of a float32, which NumPy does not know."""
    if kind == "BFloat16Storage":
        bits = np.array(values, np.uint32, order="C")
        bits <<= 16  # in place, as NumPy turns an array without dimensions into a scalar otherwise
        return bits.view(np.float32)
    with np.errstate(over="ignore"):
        return np.array(values, np.float32, order="C")


def _read_file(path: Path) -> bytes:
    """The bytes of a file that looks like a checkpoint.

    Raises:
        CheckpointError: if it cannot be one, with what it is instead.
    """
    require_file(path, "checkpoint", CheckpointError)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is not a regular file: name a .pt file")
    try:
        with path.open("rb") as file:
            problem = _unlike_checkpoint(file.read(512))
            if problem:
                raise CheckpointError(f"{path} {problem}")
            file.seek(0)
            return file.read()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise CheckpointError(f"checkpoint {path} does not fit into memory: use a machine with more") from error


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


def _unlike_checkpoint(head: bytes) -> str:
    """What a file is whose first bytes are not a checkpoint's, and what to do; empty for a possible checkpoint."""
    if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", head):
        return ""
    return next((problem for pattern, problem in _NOT_CHECKPOINTS if re.match(pattern, head)), "")


def _open_container(data: bytes) -> tuple[Any, TensorReader]:
    """The main object of a file in either format, and the reader of its tensors."""
    return _open_zip(data) if data.startswith(b"PK") else _open_legacy(data)


class _ZipMembers:
    """The members of a torch zip archive, read with bounded memory and checked against their CRC."""

    def __init__(self, data: bytes) -> None:
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(data))
            members = self._archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as problem:
            raise CheckpointError(_DAMAGED) from problem
        self.names = frozenset(member.filename for member in members)
        if sum(member.file_size for member in members) > MAX_GROWTH * len(data):
            raise CheckpointError(f"it unpacks to more than {MAX_GROWTH} times its size: {_DAMAGED}")

    def read(self, name: str) -> bytes:
        """The bytes of a member.

        Raises:
            CheckpointError: if it is missing, damaged, encrypted, or longer or shorter than the archive says.
        """
        try:
            member = self._archive.getinfo(name)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise CheckpointError(_DAMAGED)
            with self._archive.open(member) as file:
                # read() without a size inflates everything that is there, however much that is.
                content = file.read(member.file_size + 1)
        except (
            *(KeyError, zipfile.BadZipFile, zlib.error, EOFError, OSError),
            *(ValueError, RuntimeError, struct.error, OverflowError),
        ) as problem:
            raise CheckpointError(_DAMAGED) from problem
        if len(content) != member.file_size:
            raise CheckpointError(_DAMAGED)
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
    inner = sorted(_printable(name) for name in names if name.endswith((".pt", ".pth")))
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
    position, pickles = 0, []
    for index in range(5):
        unpickler = InertUnpickler(data, position)
        pickles.append(unpickler.load())
        position = unpickler.position
        if index == 0 and pickles[0] != _LEGACY_MAGIC:
            raise CheckpointError("it is a pickle but no PyTorch checkpoint: name a .pt file of YOLOv5")
        if index == 3:
            storages = unpickler.storages
    if pickles[1] != _LEGACY_PROTOCOL or not isinstance(pickles[4], list):
        raise CheckpointError(_DAMAGED)
    places = _legacy_storages(data, position, pickles[4], storages)
    return pickles[3], TensorReader(lambda key: data[places[key]], "<", MAX_GROWTH * len(data))


def _legacy_storages(data: bytes, position: int, keys: list[Any], storages: dict[str, Storage]) -> dict[str, slice]:
    """Where each storage's elements lie in the file."""
    places = {}
    for key in keys:
        if not isinstance(key, str) or key not in storages or position + 8 > len(data):
            raise CheckpointError(_DAMAGED)
        (count,) = struct.unpack_from("<q", data, position)
        start = position + 8
        position = start + count * _STORAGE_BYTES[storages[key].kind]
        if count != storages[key].count or not start <= position <= len(data):
            raise CheckpointError(_DAMAGED)
        places[key] = slice(start, position)
    if places.keys() != storages.keys():
        raise CheckpointError(_DAMAGED)
    return places


# ---------------------------------------------------------------------------------------------------------------------
# From the pickled model to weights
# ---------------------------------------------------------------------------------------------------------------------

_MODEL_KEYS: Final = ("ema", "model", "state_dict", "model_state_dict")
_WRAPPERS: Final = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AutoShape": "model",
    "DetectMultiBackend": "model",
}
_TASKS: Final = {"Detect": "detect", "Segment": "segment", "Classify": "classify"}
_CLASSIFICATION_IMAGE_SIZE: Final = 224
"""Default of YOLOv5's classify/train.py."""
_BATCH_NORMS: Final = ("BatchNorm2d", "SyncBatchNorm")
_ACTIVATION_ALIASES: Final = {"Swish": "SiLU", "MemoryEfficientSwish": "SiLU", "MemoryEfficientMish": "Mish"}
"""Other implementations of the same function in YOLOv5's utils/activations.py."""
_LEAKY_SLOPE: Final = 0.01
"""PyTorch's default for LeakyReLU."""


def _extract(root: Any, reader: TensorReader) -> Weights:
    """The weights in the main object of a checkpoint."""
    model = _pick_model(root)
    try:
        return _from_modules(model, reader) if isinstance(model, StandIn) else _from_state_dict(model, root, reader)
    except WeightsError as problem:
        if isinstance(model, dict):
            raise
        raise CheckpointError(f"{problem}") from problem


def _pick_model(root: Any) -> StandIn | dict[Any, Any]:
    """The averaged model of a training checkpoint, or its model, or a state_dict.

    Raises:
        CheckpointError: if there is none of them.
    """
    if isinstance(root, StandIn):
        return root
    if isinstance(root, dict):
        candidates = [root.get(key) for key in _MODEL_KEYS]
        # Between releases 4.0 and 5.0 `ema` was a pair of model and number of updates.
        candidates = [value[0] if isinstance(value, tuple) and value else value for value in candidates]
        for candidate in candidates:
            if isinstance(candidate, StandIn):
                return candidate
        for candidate in (*candidates, root):
            if isinstance(candidate, dict) and any(isinstance(value, TensorView) for value in candidate.values()):
                return candidate
    raise CheckpointError("it holds neither a model nor a state_dict: name a .pt file that YOLOv5's train.py wrote")


def _from_state_dict(state: dict[Any, Any], root: Any, reader: TensorReader) -> Weights:
    """Weights from named tensors alone; what they do not tell is inferred from their shapes."""
    from yolotrt.weights.infer import infer_metadata

    tensors = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, TensorView):
            array = reader.read(value)
            if array is not None:
                tensors[_state_dict_name(name)] = array
    metadata = infer_metadata(tensors)
    names = root.get("names")
    if names is not None:
        notes = [note for note in metadata.inferred if not note.startswith("class names")]
        known = _class_names(names, metadata.class_count, notes)
        metadata = replace(metadata, names=known, inferred=tuple(notes))
    if isinstance(root.get("yaml"), dict):
        metadata = replace(metadata, yaml=_json_yaml(root["yaml"], metadata.class_count))
    return Weights(tensors, metadata)


def _state_dict_name(name: str) -> str:
    """The name as `Model.state_dict` has it: saved through wrappers it begins with `module.` or a second `model.`."""
    if not re.fullmatch(r"[A-Za-z0-9_.]{1,500}", name):
        raise CheckpointError(f"it has a tensor named {_printable(name)!r}: it is no YOLOv5 checkpoint")
    return re.sub(r"^(?:module\.|model\.)*(?=\d+\.)", "model.", name)


@dataclass(frozen=True)
class _ModuleTree:
    """YOLOv5's model as a list of named modules, depth first, in the order of `named_modules`."""

    root: StandIn
    modules: Mapping[str, StandIn]

    @property
    def layers(self) -> list[StandIn]:
        """The layers of the yaml in order, `model.0` first."""
        container = self.modules.get("model")
        layers = list(container.table("_modules").values()) if container else []
        if not layers or not all(isinstance(layer, StandIn) for layer in layers):
            raise CheckpointError("its model has no layers: name a .pt file that YOLOv5's train.py wrote")
        return layers

    @property
    def class_names(self) -> frozenset[str]:
        """Names of all classes of the modules."""
        return frozenset(module.kind.name for module in self.modules.values())


def _from_modules(model: StandIn, reader: TensorReader) -> Weights:
    """Weights from a whole pickled model."""
    tree = _module_tree(model)
    head = tree.layers[-1]
    if head.kind.name not in _TASKS:
        raise CheckpointError(
            f"its last layer is {head.kind}, which YOLOv5 does not have: only Detect, Segment and Classify can be built"
        )
    tensors = dict(_read_tensors(tree, reader))
    activation, activations = _activations(tree)
    prefix = f"model.{len(tree.layers) - 1}."
    task = _TASKS[head.kind.name]
    strides = () if task == "classify" else _strides(tree, head, reader)
    anchors = () if task == "classify" else _anchors(tensors.get(f"{prefix}anchors"), strides)
    class_count = _class_count(tensors, prefix, task, anchors)
    notes: list[str] = []
    metadata = Metadata(
        yaml=_model_yaml(tree, task, tensors, class_count, notes),
        names=_class_names(tree.root.get("names"), class_count, notes),
        strides=strides,
        anchors=anchors,
        task=task,
        version=_version(tree, head),
        activation=activation,
        activations=activations,
        batch_norm_epsilon=_batch_norm_epsilon(tree),
        imgsz=_image_size(task, strides),
        inferred=tuple(notes),
    )
    return Weights(tensors, metadata)


def _module_tree(model: StandIn) -> _ModuleTree:
    """All modules of a model, without the wrappers around it.

    Raises:
        CheckpointError: if there are too many, they are nested too deep (or in a circle) or have impossible names.
    """
    for _ in range(MAX_MODULE_DEPTH):
        inner = model.table("_modules").get(_WRAPPERS.get(model.kind.name, ""))
        if not isinstance(inner, StandIn):
            break
        model = inner
    modules: dict[str, StandIn] = {}
    waiting: list[tuple[str, int, StandIn]] = [("", 0, model)]
    while waiting:
        name, depth, module = waiting.pop()
        modules[name] = module
        children = module.table("_modules")
        if depth > MAX_MODULE_DEPTH or len(modules) + len(waiting) + len(children) > MAX_MODULES:
            raise CheckpointError("its modules are nested too deep or are too many: it is no YOLOv5 checkpoint")
        for key, child in reversed(children.items()):
            if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,64}", key):
                raise CheckpointError(f"it has a module named {_printable(str(key))!r}: it is no YOLOv5 checkpoint")
            if isinstance(child, StandIn):
                waiting.append((f"{name}.{key}" if name else key, depth + 1, child))
    return _ModuleTree(model, modules)


def _read_tensors(tree: _ModuleTree, reader: TensorReader) -> Iterator[tuple[str, FloatArray]]:
    """The floating-point parameters and buffers of all modules, as `state_dict` names them.

    Raises:
        CheckpointError: if there are too many, or one is damaged.
    """
    seen = 0
    for name, module in tree.modules.items():
        hidden = module.get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, (list, tuple)) else ()
        parameters, buffers = module.table("_parameters"), module.table("_buffers")
        seen += len(parameters) + len(buffers) * (1 + len(hidden))
        if seen > MAX_TENSORS:
            raise CheckpointError("it has too many tensors: it is no YOLOv5 checkpoint")
        stored = [*parameters.items(), *((key, value) for key, value in buffers.items() if key not in hidden)]
        for key, value in stored:
            array = reader.read(value) if isinstance(value, TensorView) else None
            if array is not None:
                yield _state_dict_name(f"{name}.{key}" if name else str(key)), array


def _strides(tree: _ModuleTree, head: StandIn, reader: TensorReader) -> tuple[int, ...]:
    """Input pixels per cell of each level.

    Raises:
        CheckpointError: if the model does not say, or the values are no whole numbers.
    """
    for owner in (head, tree.root):
        stored = owner.get("stride")
        values = reader.read(stored) if isinstance(stored, TensorView) else None
        if values is not None and values.ndim == 1:
            if not all(1 <= value <= MAX_STRIDE and float(value).is_integer() for value in values):
                break
            return tuple(int(value) for value in values)
    raise CheckpointError("its detection layer has no valid strides: save it again from YOLOv5 after a forward pass")


def _anchors(cells: FloatArray | None, strides: tuple[int, ...]) -> Anchors:
    """Anchors in pixels from the `anchors` buffer, (levels, anchors, 2) in cells of each level."""
    if (
        cells is None
        or cells.ndim != 3
        or cells.shape[0] != len(strides)
        or cells.shape[2] != 2
        or not _positive(cells)
    ):
        raise CheckpointError("its detection layer has no anchors for its strides: it is no YOLOv5 checkpoint")
    return tuple(
        tuple((float(width) * stride, float(height) * stride) for width, height in level)
        for level, stride in zip(cells.tolist(), strides, strict=True)
    )


def _positive(values: FloatArray) -> bool:
    return bool(np.all(np.isfinite(values) & (values > 0)))


def _class_count(tensors: Mapping[str, FloatArray], prefix: str, task: str, anchors: Anchors) -> int:
    """Number of classes, from the shape of the last layer's weights, as a yaml may still say that of another data set.

    Detect has anchors x (5 + classes) outputs, Segment anchors x (5 + classes + mask coefficients) (models/yolo.py).

    Raises:
        CheckpointError: if the shapes do not give one.
    """
    if task == "classify":
        rows = _row_count(tensors, f"{prefix}linear.weight")
        classes, rest = rows, 0
    else:
        per_anchor, rest = divmod(_row_count(tensors, f"{prefix}m.0.weight"), len(anchors[0]))
        masks = _row_count(tensors, f"{prefix}proto.cv3.conv.weight") if task == "segment" else 0
        classes = per_anchor - 5 - masks
    if rest or not 1 <= classes <= MAX_CLASSES:
        raise CheckpointError(f"the shape of its last layer does not give a number of classes: {_DAMAGED}")
    return classes


def _row_count(tensors: Mapping[str, FloatArray], name: str) -> int:
    """Number of outputs of a convolution or linear layer."""
    if name not in tensors or tensors[name].ndim < 2:
        raise CheckpointError(f"it has no tensor {name}: {_DAMAGED}")
    return int(tensors[name].shape[0])


def _class_names(stored: Any, count: int, notes: list[str]) -> tuple[str, ...]:
    """One printable name for every class, such as `class3` where there is none.

    Older releases have a list, newer ones a dictionary by index.
    """
    known: dict[Any, Any] = {}
    if isinstance(stored, (list, tuple)):
        known = dict(enumerate(stored))
    elif isinstance(stored, dict):
        known = stored
    if len(known) != count:
        notes.append(f"class names: the file has {len(known)} for {count} classes")
    return tuple(_class_name(known.get(index, known.get(str(index))), index) for index in range(count))


def _class_name(stored: Any, index: int) -> str:
    return _printable(str(stored)) if isinstance(stored, (str, int, float)) else f"class{index}"


def _version(tree: _ModuleTree, head: StandIn) -> str:
    """YOLOv5's release, as far as its classes tell.

    6.0 replaced Focus and SPP by a convolution and SPPF and was the last to store `anchor_grid`; 6.2 named the model
    class after its task; 4.0 brought C3 and SiLU, 3.0 Hardswish (YOLOv5's release notes).
    """
    classes = tree.class_names
    if tree.root.kind.name == "SegmentationModel":
        return "v7.0+"
    if tree.root.kind.name in ("DetectionModel", "ClassificationModel"):
        return "v6.2+"
    if "Focus" in classes:
        if "C3" in classes:
            return "v4.0-v5.0"
        return "v3.0-v3.1" if "Hardswish" in classes else "v1.0-v2.0"
    if "SPPF" in classes:
        return "v6.0" if "anchor_grid" in head.table("_buffers") else "v6.1+"
    return ""


def _activations(tree: _ModuleTree) -> tuple[str, dict[str, str]]:
    """The most frequent activation, and by module name those that differ from it."""
    labels = {name: _activation_label(module) for name, module in tree.modules.items() if name.endswith(".act")}
    if not labels:
        return "SiLU", {}
    default, _ = Counter(labels.values()).most_common(1)[0]
    return default, {name: label for name, label in labels.items() if label != default}


def _activation_label(module: StandIn) -> str:
    """An activation's name as `Metadata.activation` has it, such as ``LeakyReLU(0.1)``."""
    name = _ACTIVATION_ALIASES.get(module.kind.name, module.kind.name)
    if name != "LeakyReLU":
        return name
    slope = module.get("negative_slope")
    return f"LeakyReLU({slope if isinstance(slope, (int, float)) else _LEAKY_SLOPE:g})"


def _batch_norm_epsilon(tree: _ModuleTree) -> float:
    """The epsilon that all BatchNorm2d share; YOLOv5's own if there are none (a fused model).

    Raises:
        CheckpointError: if they differ.
    """
    first_name, first = "", None
    for name, module in tree.modules.items():
        if module.kind.name not in _BATCH_NORMS:
            continue
        epsilon = module.get("eps")
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise CheckpointError(f"{name} has no valid epsilon: {_DAMAGED}")
        if first is None:
            first_name, first = name, epsilon
        elif epsilon != first:
            raise CheckpointError(
                f"{first_name} has epsilon {first:g} but {name} has {epsilon:g}: train all layers with the same one"
            )
    return BATCH_NORM_EPSILON if first is None else first


def _image_size(task: str, strides: tuple[int, ...]) -> tuple[int, int]:
    """What YOLOv5 trains a model of this kind with: 1280 pixels for P6, which has a level of stride 64."""
    side = _CLASSIFICATION_IMAGE_SIZE if task == "classify" else 1280 if max(strides) >= 64 else 640
    return side, side


# ---------------------------------------------------------------------------------------------------------------------
# The model's yaml
# ---------------------------------------------------------------------------------------------------------------------


def _model_yaml(
    tree: _ModuleTree, task: str, tensors: Mapping[str, FloatArray], class_count: int, notes: list[str]
) -> Mapping[str, Any]:
    """The yaml that the model was made from, or one inferred from shapes: YOLOv5's classification models keep none."""
    from yolotrt.weights.infer import infer_metadata

    stored = tree.root.get("yaml")
    if isinstance(stored, dict) and task != "classify":
        return _json_yaml(stored, class_count)
    notes.append("model description: the file has none, so it was concluded from the tensors' shapes")
    return infer_metadata(tensors).yaml


def _json_yaml(stored: dict[Any, Any], class_count: int) -> dict[str, Any]:
    """A copy of JSON types only, with the true number of classes."""
    plain = _json_value(stored, MAX_YAML_DEPTH, [MAX_YAML_SIZE])
    return {**plain, "nc": class_count}


def _json_value(value: Any, depth: int, budget: list[int]) -> Any:
    """`value` as JSON has it; what JSON has no type for becomes its class's name.

    Args:
        value: What the unpickler made.
        depth: How deep it may be nested.
        budget: How many values and letters there may be, counted down. References let a small file look endless.

    Raises:
        CheckpointError: if it is nested too deep or has too many values.
    """
    budget[0] -= 1 + (len(value) if isinstance(value, str) else 0)
    if depth < 0 or budget[0] < 0:
        raise CheckpointError("its model's yaml is nested too deep or too long: it is no YOLOv5 checkpoint")
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)):
        return [_json_value(item, depth - 1, budget) for item in value]
    if isinstance(value, dict):
        return {
            str(_json_value(key, depth - 1, budget)): _json_value(item, depth - 1, budget)
            for key, item in value.items()
        }
    return str(value.kind) if isinstance(value, StandIn) else type(value).__name__
