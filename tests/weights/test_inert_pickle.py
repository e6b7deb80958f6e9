from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.weights.torch_files import (
    Checkpoint,
    Op,
    assert_refused_within_bounded_memory,
    assert_succeeds_or_is_refused,
    byte_edits,
    call,
    change,
    fuzz,
    legacy_bytes,
    named,
    new,
    pack,
    read,
    small_zip,
    stack_named,
    storage,
    view,
    zip_bytes,
)
from yolotrt.errors import CheckpointError
from yolotrt.weights import inert_pickle
from yolotrt.weights.inert_pickle import InertUnpickler

# What is taken from a pickle


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


def test_pickles_in_a_row_share_no_memo():
    shared = ["b"]
    first, second = ["a"], [shared, shared]
    unpickler = InertUnpickler(pickle.dumps(first, 4) + pickle.dumps(second, 4))
    assert [unpickler.load(), unpickler.load()] == [first, second]


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


@pytest.mark.parametrize(
    "tensor",
    [
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
def test_damaged_reference_is_refused(tensor):
    with pytest.raises(CheckpointError, match="damaged"):
        InertUnpickler(tensor + b".").load()


# Attacks on time, memory and the interpreter

BOMBS = {
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


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_within_bounded_memory(name, tmp_path):
    assert_refused_within_bounded_memory(*BOMBS[name], tmp_path)


def test_more_opcodes_than_allowed_are_refused(monkeypatch):
    monkeypatch.setattr(inert_pickle, "MAX_OPCODES", 1000)
    assert InertUnpickler(b"N0" * 499 + b"N.").load() is None
    with pytest.raises(CheckpointError, match="more than 1000 objects"):
        InertUnpickler(b"N0" * 500 + b"N.").load()


# Anything at all

with zipfile.ZipFile(io.BytesIO(small_zip())) as _archive:
    SMALL_PICKLE = _archive.read("best/data.pkl")
    SMALL_STORAGES = {n.removeprefix("best/data/"): _archive.read(n) for n in _archive.namelist() if "/data/" in n}


@fuzz
@given(edits=byte_edits)
def test_changed_pickle_succeeds_or_is_refused(edits, tmp_path):
    """A zip archive's checksums would hide the pickle from the changes."""
    pickled = Op(change(SMALL_PICKLE[2:-1], edits))
    assert_succeeds_or_is_refused(zip_bytes(pickled, SMALL_STORAGES), tmp_path)


@fuzz
@given(
    opcodes=st.lists(st.sampled_from([bytes([code]) for code in InertUnpickler(b"")._make_handlers()]), max_size=200)
)
def test_random_opcodes_succeed_or_are_refused(opcodes, tmp_path):
    assert_succeeds_or_is_refused(zip_bytes(Op(b"".join(opcodes)), {}), tmp_path)
