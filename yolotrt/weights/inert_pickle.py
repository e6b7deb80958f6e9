"""Unpickling without importing or calling anything that the file names.

A pickle is a program: the standard `pickle.Unpickler` calls what the file tells it to call. Even with a restricted
`find_class` it can be crashed (hashing a tuple nested a million deep overflows the C stack) or made to allocate
gigabytes (one memo opcode with a large index). Therefore `InertUnpickler` interprets the opcodes itself: it knows the
few globals that a YOLOv5 checkpoint needs, turns every class into an inert `StandIn`, and refuses everything else by
name. It never copies a container and never hashes anything but strings and small integers, so time and memory stay
proportional to the file.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from yolotrt.errors import CheckpointError

MAX_OPCODES = 2_000_000
"""yolov5n has 28,000; an object costs about a hundred bytes, so this bounds the objects to some 200 MB."""
MAX_NAME_LENGTH = 120

DAMAGED: Final = "it is truncated or damaged: download or copy it again"
"""What every reader of a checkpoint says of content that PyTorch does not write."""

STORAGE_BYTES: Final = {
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
"""Bytes of an element by torch storage class."""


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. Only a name: nothing is imported."""

    module: str
    name: str

    @property
    def full_name(self) -> str:
        """Module and name as the file has them."""
        return f"{self.module}.{self.name}"

    def __str__(self) -> str:
        return printable(self.full_name)


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


_TORCH_NAMES: Final = frozenset(
    (
        *STORAGE_BYTES,
        *("float16", "float32", "float64", "bfloat16", "half", "float", "double"),
        *("uint8", "int8", "int16", "int32", "int64", "bool"),
    )
)
"""Storage classes and data types."""

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
        raise CheckpointError(DAMAGED)
    return {}


def _same_items(arguments: tuple[Any, ...]) -> Any:
    """The items of a list, tuple or set themselves: a copy per opcode would let a small file fill the memory."""
    if not arguments:
        return []
    if len(arguments) == 1 and isinstance(arguments[0], (list, tuple)):
        return arguments[0]
    raise CheckpointError(DAMAGED)


def _tensor(arguments: tuple[Any, ...]) -> TensorView:
    """See torch/_utils.py, `_rebuild_tensor_v2`: storage, offset, size and stride come first."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise CheckpointError(DAMAGED)
    return TensorView(*arguments[:4])


def _parameter(arguments: tuple[Any, ...]) -> TensorView:
    """See torch/_utils.py, `_rebuild_parameter`: the tensor comes first."""
    if not arguments or not isinstance(arguments[0], TensorView):
        raise CheckpointError(DAMAGED)
    return arguments[0]


def _attribute_of_class(arguments: tuple[Any, ...]) -> StandIn:
    """Segmentation models pickle their bound `forward` as ``getattr(Detect, "forward")``; its value is never used."""
    access = Global("builtins", "getattr")
    match arguments:
        case (Global() as owner, str() as attribute) if _is_class(owner) and attribute.isidentifier():
            return StandIn(access)
    raise _refusal(access)


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
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise _refusal(found)
    if module == "torch" and name in _TORCH_NAMES:
        return found
    if found.full_name in _CALLS or found.full_name in _VALUES or _is_class(found):
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


def printable(text: str) -> str:
    """Text from the file, made safe for one line on a terminal."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_NAME_LENGTH])
    return shown if len(text) <= MAX_NAME_LENGTH else f"{shown}..."


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
    """Interprets pickles of protocol 2 to 5, one after the other, without importing or calling anything.

    Attributes:
        position: Index of the byte after the pickles that `load` has interpreted.
        storages: The storages that they refer to, by key.
    """

    def __init__(self, data: bytes) -> None:
        self.position = 0
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
        self._stack, self._outer_stacks, self._memo = [], [], {}
        handlers = self._make_handlers()
        try:
            for _ in range(MAX_OPCODES):
                opcode = self._data[self.position]
                self.position += 1
                if opcode == pickle.STOP[0]:
                    return self._stack.pop()
                handlers[opcode]()
        except (IndexError, KeyError, UnicodeDecodeError) as problem:
            raise CheckpointError(DAMAGED) from problem
        raise CheckpointError(f"it has more than {MAX_OPCODES} objects: it is no YOLOv5 checkpoint")

    def _make_handlers(self) -> dict[int, Callable[[], object]]:
        """What carries out each opcode."""
        handlers: dict[bytes, Callable[[], object]] = {
            pickle.PROTO: lambda: self._take(1),
            pickle.FRAME: lambda: self._take(8),
            pickle.MARK: self._mark,
            pickle.POP: self._pop,
            pickle.POP_MARK: self._pop_mark,
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
        handlers |= {code: partial(self._short_tuple, length) for code, length in _TUPLES.items()}
        for forms, handle in (
            (_NUMBERS, self._push),
            (_LONGS, self._long),
            (_TEXTS, self._text),
            (_BYTES, self._bytes),
            (_GETS, self._get),
            (_PUTS, self._put),
        ):
            handlers |= {code: partial(self._with_number, struct.Struct(form), handle) for code, form in forms.items()}
        return {code[0]: handler for code, handler in handlers.items()}

    # Reading the byte stream

    def _take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if count < 0 or self.position > len(self._data):
            raise CheckpointError(DAMAGED)
        return self._data[start : self.position]

    def _with_number(self, form: struct.Struct, handle: Callable[[Any], None]) -> None:
        (number,) = form.unpack(self._take(form.size))
        handle(number)

    def _take_line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + _MAX_LINE)
        if end < 0:
            raise CheckpointError(DAMAGED)
        line = self._take(end - self.position).decode()
        self.position += 1
        return line

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

    def _get(self, index: int) -> None:
        self._push(self._memo[index])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    # Plain values

    def _long(self, count: int) -> None:
        if count > _MAX_LONG_BYTES:
            raise CheckpointError(DAMAGED)
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _text(self, count: int) -> None:
        self._push(self._take(count).decode())

    def _bytes(self, count: int) -> None:
        self._push(self._take(count))

    def _short_tuple(self, length: int) -> None:
        if length > len(self._stack):
            raise CheckpointError(DAMAGED)
        start = len(self._stack) - length
        self._stack[start:] = [tuple(self._stack[start:])]

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, StandIn):
            raise CheckpointError(DAMAGED)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=False):
                # Other kinds of keys are left out: nothing that is looked up has one, and hashing them can be attacked.
                if _is_plain_key(key):
                    target[key] = value
        elif not isinstance(target, StandIn):
            raise CheckpointError(DAMAGED)

    # Names and objects

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise CheckpointError(DAMAGED)
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
        raise CheckpointError(DAMAGED)

    def _register(self, storage: Storage) -> Storage:
        known = self.storages.setdefault(storage.key, storage)
        if storage.kind not in STORAGE_BYTES or (known.kind, known.count) != (storage.kind, storage.count):
            raise CheckpointError(DAMAGED)
        return known

    def _reduce(self) -> None:
        """Carry out the stand-in for a call, if there is one for this name."""
        arguments, called = self._stack.pop(), self._stack.pop()
        if isinstance(called, StandIn):
            raise _refusal(called.kind)
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise CheckpointError(DAMAGED)
        if called.full_name in _CALLS:
            self._push(_CALLS[called.full_name](arguments))
        elif called.full_name in _VALUES:
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
            raise CheckpointError(DAMAGED)
        if not _is_class(kind) and kind.full_name not in _VALUES:
            raise _refusal(kind)
        self._push(StandIn(kind))

    def _build(self) -> None:
        """Give an object its state: always by reference, as the same state can be given to a million objects."""
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, StandIn):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's attributes, such as a state_dict's `_metadata`, go unused
            raise CheckpointError(DAMAGED)


def _is_plain_key(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, int) and abs(key) < _MAX_KEY)
