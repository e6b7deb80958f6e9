"""The session that computes on the CPU: batches under way at once, in threads of its own."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from yolotrt.engines.file import EngineHeader
from yolotrt.engines.host import HostSession
from yolotrt.engines.onnx import OnnxRuntimeSession
from yolotrt.errors import InferenceError, InputError
from yolotrt.postprocess import NmsOptions

Float = npt.NDArray[np.float32]
OPTIONS = NmsOptions(0.001, 0.6)


class GatedSession(HostSession):
    """Gives heads that depend on the picture, once the gate is open."""

    def __init__(self, header: EngineHeader, workers: int) -> None:
        super().__init__(header, workers=workers)
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.alone: list[bool] = []
        self.inputs: set[int] = set()

    def compute(self, images: Float, outputs: Sequence[Float], *, is_alone: bool) -> None:
        """Wait for the gate."""
        self.alone.append(is_alone)
        self.inputs.add(images.ctypes.data)
        self.begun.release()
        assert self.gate.wait(30)
        if images[0, 0, 0, 0] == 1:  # a white picture
            raise InferenceError("the engine failed")
        for output in outputs:
            output[:] = -20
        outputs[0][:, 4, 0, 0] = outputs[0][:, 5, 0, 0] = 5  # one box in the first cell
        outputs[0][:, 0, 0, 0] = images[:, 0, 32, 32] * 10 - 5  # its place says which picture


@pytest.fixture
def header(tiny_engine) -> EngineHeader:
    return tiny_engine.header


@pytest.fixture
def session(header) -> Iterator[GatedSession]:
    with GatedSession(header, workers=2) as session:
        yield session
        session.gate.set()


def picture(value: int) -> npt.NDArray[np.uint8]:
    return np.full((64, 64, 3), value, np.uint8)


def place(boxes) -> float:
    return float(boxes.xyxy[0, 0])


def test_batches_are_computed_side_by_side_and_each_gets_its_own_result(session, header):
    values = [0, 50, 100, 150, 200, 250]
    pending = [session.submit([picture(value)], OPTIONS) for value in values[:3]]
    for _ in range(2):
        assert session.begun.acquire(timeout=30)  # two at once, with the gate shut
    session.gate.set()
    pending += [session.submit([picture(value)], OPTIONS) for value in values[3:]]
    places = [place(waiting.result()[0]) for waiting in reversed(pending)][::-1]
    assert places == sorted(places) and len(set(places)) == len(values)
    with GatedSession(header, workers=1) as one:
        one.gate.set()
        assert places == [place(one.detect([picture(value)], OPTIONS)[0]) for value in values]
    assert session.timing.pictures == len(values)


def test_memory_does_not_grow_with_the_batches_submitted(session):
    session.gate.set()
    for value in range(100):
        session.submit([picture(value)], OPTIONS)
    session.run(np.zeros((1, 3, *session.header.imgsz), np.float32))
    assert len(session.inputs) <= session.batches_in_flight + 1  # and that of run


def test_a_batch_alone_may_take_all_cores(session):
    session.gate.set()
    for value in (1, 2):
        session.detect([picture(value)], OPTIONS)
    assert session.alone == [True, True]
    session.gate.clear()
    first, second = (session.submit([picture(value)], OPTIONS) for value in (1, 2))
    while len(session.alone) < 4:
        time.sleep(0.001)
    session.gate.set()
    for pending in (first, second):
        pending.result()
    assert session.alone[3] is False


def test_the_raw_outputs_come_after_all_that_is_under_way(session):
    pending = [session.submit([picture(value)], OPTIONS) for value in (1, 2)]
    opener = threading.Timer(0.1, session.gate.set)
    opener.start()
    heads = session.run(np.zeros((1, 3, *session.header.imgsz), np.float32))
    kept = [head.copy() for head in heads]
    for waiting in pending:
        waiting.result()
    session.detect([picture(9)], OPTIONS)
    for head, copy in zip(heads, kept, strict=True):
        np.testing.assert_array_equal(head, copy)


def test_a_failure_comes_with_the_result_of_its_batch_alone(session):
    session.gate.set()
    bad, good = session.submit([picture(255)], OPTIONS), session.submit([picture(7)], OPTIONS)
    for _ in range(2):
        with pytest.raises(InferenceError, match="the engine failed"):
            bad.result()
    assert len(good.result()[0].xyxy) == 1 == len(session.detect([picture(7)], OPTIONS)[0].xyxy)


def test_closing_finishes_what_is_computed_and_drops_what_has_not_begun(session):
    pending = [session.submit([picture(value)], OPTIONS) for value in (1, 2, 3)]
    for _ in range(2):
        assert session.begun.acquire(timeout=30)
    opener = threading.Timer(0.1, session.gate.set)
    opener.start()
    session.close()
    for waiting in pending[:2]:
        assert len(waiting.result()[0].xyxy) == 1
    with pytest.raises(InputError, match="the session was closed before it came to this batch"):
        pending[2].result()
    assert len(session.alone) == 2
    for use in (
        lambda: session.submit([picture(7)], OPTIONS),
        lambda: session.run(np.zeros((1, 3, *session.header.imgsz), np.float32)),
    ):
        with pytest.raises(InputError, match="the session is closed: open a new one"):
            use()
    session.close()


def test_an_interrupted_wait_leaves_the_batch_to_the_next_one(header, monkeypatch):
    with GatedSession(header, workers=1) as session:
        session.gate.set()
        monkeypatch.setattr(session._workers, "submit", lambda _: None)  # no thread is quick enough
        pending = session.submit([picture(7)], OPTIONS)
        compute = session.compute
        monkeypatch.setattr(session, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pending.result()
        monkeypatch.setattr(session, "compute", compute)
        assert len(pending.result()[0].xyxy) == 1


def interrupted(*_args: object, **_kwargs: object) -> None:
    raise KeyboardInterrupt


def test_large_batches_are_not_computed_side_by_side(tiny_dynamic_engine):
    assert tiny_dynamic_engine.header.max_batch == 4
    with OnnxRuntimeSession(tiny_dynamic_engine, threads=8) as session:
        assert session.batches_in_flight == 2  # one is computed, one prepared


@pytest.mark.parametrize("threads", [1, 2, 5, 8])
def test_batches_side_by_side_give_the_same_bits_as_one_alone(tiny_engine, threads):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(12)]
    with OnnxRuntimeSession(tiny_engine, threads=threads) as session:
        assert session.batches_in_flight == min(threads, 4) + 1
        alone = [session.detect([image], OPTIONS)[0] for image in pictures]
        pending = [session.submit([image], OPTIONS) for image in pictures]
        for wanted, waiting in zip(alone, pending, strict=True):
            (found,) = waiting.result()
            np.testing.assert_array_equal(found.xyxy, wanted.xyxy)
            np.testing.assert_array_equal(found.confidence, wanted.confidence)


def test_time_of_batches_side_by_side_counts_once(session):
    pending = [session.submit([picture(value)], OPTIONS) for value in (1, 2)]
    for _ in range(2):
        assert session.begun.acquire(timeout=30)
    began = time.perf_counter()
    time.sleep(0.2)
    session.gate.set()
    for waiting in pending:
        waiting.result()
    waited_ms = (time.perf_counter() - began) * 1e3
    assert 200 <= session.timing.inference_ms <= waited_ms + 150  # they began a moment before
    assert pickle.loads(pickle.dumps(session.timing)).pictures == 2


def test_pictures_are_not_kept_until_their_batch_is_computed(session):
    frame = picture(3)
    seen = weakref.ref(frame)
    session.submit([frame], OPTIONS)
    del frame
    assert seen() is None


def test_a_thread_goes_on_detecting_when_the_program_ends(tiny_engine, tmp_path):
    path = tmp_path / "tiny.engine"
    tiny_engine.save(path)
    program = (
        "import sys, threading, time, numpy as np\n"
        "from yolotrt import Detector\n"
        "def work():\n"
        "    detector = Detector(sys.argv[1])\n"
        "    detector(np.zeros((64, 64, 3), np.uint8))\n"
        "    threading.main_thread().join()\n"
        "    time.sleep(0.3)\n"
        "    print(len(detector([np.zeros((64, 64, 3), np.uint8)] * 5)))\n"
        "threading.Thread(target=work).start()\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr, found.returncode) == ("5\n", "", 0)
