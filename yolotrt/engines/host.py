"""The session of engines that give raw heads in host memory: everything around them is done by NumPy and OpenCV."""

from __future__ import annotations

import abc
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from yolotrt.engines.base import Frame, Pending, Session, Timing
from yolotrt.engines.file import EngineHeader
from yolotrt.errors import InputError
from yolotrt.postprocess import Boxes, Float, NmsOptions, YoloLayer, non_max_suppression, with_masks
from yolotrt.shell import THREAD_PREFIX


class HostDecoder:
    """Turns a network's outputs into boxes, and into masks where it is one for segmentation, with NumPy."""

    def __init__(self, header: EngineHeader) -> None:
        model = header.model
        self._mask_count = header.outputs[-1].shape[1] if model.task == "segment" else 0
        self._network_size = header.imgsz
        self._levels = len(model.strides)
        self._yolo_layer = YoloLayer(model.anchors, model.strides, len(model.names), self._mask_count)

    def boxes(self, outputs: Sequence[Float], options: NmsOptions) -> list[Boxes]:
        """Decode a batch.

        Args:
            outputs: The raw heads of all levels, float32 (batch, anchors x values, height, width), and for segmentation
                the prototypes (batch, coefficients, height, width).
            options: Thresholds.

        Returns:
            Per picture its boxes in network-input pixels, best first.
        """
        found = self.suppressed(self.candidates(outputs, options), options)
        if not self._mask_count:
            return found
        (prototypes,) = outputs[self._levels :]
        return [with_masks(boxes, planes, self._network_size) for boxes, planes in zip(found, prototypes, strict=True)]

    def candidates(self, outputs: Sequence[Float], options: NmsOptions) -> Iterator[Float]:
        """YoloLayer alone: the rows of each picture that are confident enough; `outputs` as for `boxes`."""
        return self._yolo_layer.candidates(outputs[: self._levels], options.confidence)

    def suppressed(self, rows: Iterable[Float], options: NmsOptions) -> list[Boxes]:
        """NMS alone, of what `candidates` gives."""
        return [non_max_suppression(candidates, options, self._mask_count) for candidates in rows]


@dataclass
class _Buffers:
    """What one batch needs.

    Attributes:
        images: Network input, float32 (largest batch, 3, height, width).
        outputs: Of all outputs, float32 (largest batch, ...).
    """

    images: Float
    outputs: list[Float]

    @classmethod
    def make(cls, header: EngineHeader) -> _Buffers:
        batch = header.max_batch
        return cls(np.zeros((batch, 3, *header.imgsz), np.float32), _make_outputs(header))


def _make_outputs(header: EngineHeader) -> list[Float]:
    """Memory for the outputs of the largest batch."""
    return [np.empty((header.max_batch, *info.shape[1:]), np.float32) for info in header.outputs]


class HostSession(Session):
    """Letterbox before and YoloLayer and NMS after an engine that `compute` runs; see `Session`.

    The letterbox is done by the thread that submits, all else by threads of the session. A batch alone gets all cores;
    several under way are computed side by side, which takes less time in all than one after the other on all cores.

    Args:
        header: The engine's description.
        workers: How many batches are computed side by side at most.
    """

    def __init__(self, header: EngineHeader, *, workers: int = 1) -> None:
        self.header = header
        self.timing = Timing()
        self.batches_in_flight = workers + 1  # one is prepared meanwhile
        self._decoder = HostDecoder(header)
        self._free: list[_Buffers] = []
        self._outputs = _make_outputs(header)  # of `run`
        self._under_way: deque[_HostPending] = deque()
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix=f"{THREAD_PREFIX}-engine")
        self._counting = threading.Lock()
        self._waiting = 0  # batches submitted and not finished
        self._computing = 0  # those of them that the engine works on
        self._counted_at = 0.0  # until when the engine's time is counted
        self._is_closed = False

    @abc.abstractmethod
    def compute(self, images: Float, outputs: Sequence[Float], *, is_alone: bool) -> None:
        """Run the engine; several threads may do so at once.

        Args:
            images: float32 (batch, 3, height, width), contiguous.
            outputs: What to write to: of each output float32 (batch, ...).
            is_alone: Whether no other batch waits or is computed, so that this one may take all cores.

        Raises:
            InferenceError: if the engine fails.
        """

    def submit(self, frames: Sequence[Frame], options: NmsOptions) -> Pending:
        """See `Session.submit`; with `batches_in_flight` batches under way it waits for the oldest."""
        from yolotrt.preprocess import Letterbox  # OpenCV, which building an engine does without

        self.check_frame_count(len(frames))
        self.check_in_host_memory(frames)
        self._require_open()
        self._finish_until(self.batches_in_flight - 1)
        began = time.perf_counter()
        buffers = self._free.pop() if self._free else _Buffers.make(self.header)
        for frame, out in zip(frames, buffers.images, strict=False):
            Letterbox.fit(frame.shape[:2], self.header.imgsz).to_input(frame, out)
        self.timing.add(preprocess_ms=(time.perf_counter() - began) * 1e3, pictures=len(frames))
        count = len(frames)
        pending = _HostPending(lambda: self._detect(buffers, count, options))
        with self._counting:
            self._waiting += 1
        self._under_way.append(pending)
        with contextlib.suppress(RuntimeError):  # at the program's end no thread takes it: who wants the result does
            self._workers.submit(pending.finish)
        return pending

    def run(self, images: Float) -> list[Float]:
        """See `Session.run`."""
        self._require_open()
        self.check_input(images)
        self._finish_until(0)
        outputs = [output[: len(images)] for output in self._outputs]
        self.compute(np.ascontiguousarray(images), outputs, is_alone=True)
        return outputs

    def close(self) -> None:
        """Finish what is computed; batches that have not begun are dropped."""
        self._is_closed = True
        for pending in self._under_way:
            pending.drop()
        self._finish_until(0)
        self._workers.shutdown()

    def _detect(self, buffers: _Buffers, count: int, options: NmsOptions) -> list[Boxes]:
        """The boxes of the first `count` letterboxed pictures."""
        # a static or larger smallest batch is filled up: the surplus is stale input whose results nobody reads
        batch = max(count, self.header.batch_range[0])
        outputs = [output[:batch] for output in buffers.outputs]
        try:
            with self._busy() as is_alone:
                self.compute(buffers.images[:batch], outputs, is_alone=is_alone)
            inferred = time.perf_counter()
            boxes = self._decoder.boxes([output[:count] for output in outputs], options)
            self.timing.add(postprocess_ms=(time.perf_counter() - inferred) * 1e3)
        finally:
            self._free.append(buffers)
            with self._counting:
                self._waiting -= 1
        return boxes

    @contextlib.contextmanager
    def _busy(self) -> Iterator[bool]:
        """While the engine computes: counts that time, once for all batches. Yields whether no other batch waits."""
        with self._counting:
            self._count_time(1)
            is_alone = self._waiting <= 1
        try:
            yield is_alone
        finally:
            with self._counting:
                self._count_time(-1)

    def _count_time(self, change: int) -> None:
        """Add the time since the last change to the engine's, if it was at work."""
        now = time.perf_counter()
        if self._computing:
            self.timing.add(inference_ms=(now - self._counted_at) * 1e3)
        self._computing += change
        self._counted_at = now

    def _finish_until(self, count: int) -> None:
        """Wait until no more than `count` batches are under way."""
        while len(self._under_way) > count:
            self._under_way.popleft().finish()

    def _require_open(self) -> None:
        if self._is_closed:
            raise InputError("the session is closed: open a new one")


class _HostPending(Pending):
    """A batch that one of a session's threads computes, or the thread that wants its result if none has begun.

    Args:
        compute: Gives the boxes.
    """

    def __init__(self, compute: Callable[[], list[Boxes]]) -> None:
        self._compute: Callable[[], list[Boxes]] | None = compute
        self._finishing = threading.Lock()
        self._boxes: list[Boxes] = []
        self._failure: Exception | None = None

    def finish(self) -> None:
        """Compute unless that is done; wait if another thread is at it. A failure is kept for `result`."""
        with self._finishing:
            if self._compute is None:
                return
            try:
                self._boxes = self._compute()
            except Exception as problem:  # noqa: BLE001 - raised to whoever takes the result
                self._failure = problem
            self._compute = None

    def drop(self) -> None:
        """Compute it no more, unless that has begun."""
        if self._finishing.acquire(blocking=False):
            if self._compute is not None:
                self._compute = None
                self._failure = InputError("the session was closed before it came to this batch: take results first")
            self._finishing.release()

    def result(self) -> list[Boxes]:
        """See `Pending.result`."""
        self.finish()
        if self._failure is not None:
            raise self._failure
        return self._boxes
