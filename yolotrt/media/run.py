"""One run of -d or --webcam: sources through a detector to files, a window or a page."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from yolotrt.detector import Detector, PendingDetections
from yolotrt.errors import ImageError, InputError, VideoError
from yolotrt.media.drawing import draw
from yolotrt.media.frames import RECONNECT_S, Allocate, Found, Frame, Image, Span
from yolotrt.media.images import read_image
from yolotrt.media.live import LiveSources
from yolotrt.media.pipeline import QUEUE_CAPACITY, Inbox, Pipeline, StageFunction
from yolotrt.media.results import next_run_folder
from yolotrt.media.sinks import (
    CropSink,
    CsvFile,
    JsonFile,
    JsonLinesFile,
    LabelSink,
    PictureSink,
    ResultNames,
    Sink,
)
from yolotrt.media.sources import is_video, public_name, source_name
from yolotrt.media.video import count_frames, read_video
from yolotrt.shell import print_beside_progress, printable

PROGRAM = "yolotrt"
_LIVE_CAPACITY = 1
"""Frames of a live source that wait between two stages; each is a frame of delay."""
_LIVE_BATCHES = 3
"""Batches of a live source that are under way at most, for the same reason."""
_TICK_S = 0.1
_HELPER_NICENESS = 10
"""Added to the niceness of decoding, drawing and encoding beside an engine on some of the CPU's cores."""

VideoReader = Callable[[Path, Allocate, Span], Iterator[Frame]]
"""Decodes a video file, as `read_video` does."""


@dataclass(frozen=True)
class Outputs:
    """What a run writes.

    Attributes:
        folder: For pictures, videos, labels and crops; a number is added if it exists.
        exist_ok: Whether to write into an existing folder.
        save_media: Whether to write annotated pictures and videos.
        save_txt: Whether to write YOLO labels.
        save_conf: Whether labels have the confidence.
        save_crops: Whether to write what is inside the boxes.
        json: One file with all results, or None.
        jsonl: A file that grows by a line a frame, or None.
        csv: A file that grows by a line a detection, or None.
    """

    folder: Path
    exist_ok: bool = False
    save_media: bool = True
    save_txt: bool = False
    save_conf: bool = False
    save_crops: bool = False
    json: Path | None = None
    jsonl: Path | None = None
    csv: Path | None = None

    @property
    def needs_folder(self) -> bool:
        """Whether anything goes to the folder."""
        return self.save_media or self.save_txt or self.save_crops


class View(Protocol):
    """Shows results while the run goes on."""

    def show(self, found: Found) -> bool:
        """Show a result; False ends the run."""

    def idle(self) -> bool:
        """Called while no result comes; False ends the run."""

    def close(self) -> None:
        """Stop showing."""


class Run:
    """Sources through a detector to outputs and views; what cannot be read is named and left out.

    Args:
        detector: Finds the objects.
        sources: Files (paths), or cameras and streams (text), as `expand_sources` gives them.
        outputs: What to write.
        span: Which frames of videos to take.
        reader: Decodes video files.
        reconnect_s: How long a lost camera or stream is tried again, in seconds.

    Raises:
        InputError: if files and live sources are mixed, or the span does not fit the sources.
    """

    def __init__(
        self,
        detector: Detector,
        sources: Sequence[Path | str],
        outputs: Outputs,
        *,
        span: Span | None = None,
        reader: VideoReader = read_video,
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        self._detector = detector
        self._span = span or Span()
        self._reader = reader
        self._files = [source for source in sources if isinstance(source, Path)]
        live = [source for source in sources if isinstance(source, str)]
        self._live = LiveSources(live, reconnect_s=reconnect_s) if live else None
        _check_sources(self._files, live, self._span)
        self._outputs = outputs
        self._views: list[View] = []
        self._folder: Path | None = None
        self._counts: Counter[str] = Counter()
        self._failures = 0
        self._pictures = self._frames = 0
        self._clips: set[str] = set()
        self._is_ending: Callable[[], bool] = bool

    @property
    def live(self) -> LiveSources | None:
        """The cameras and streams, or None."""
        return self._live

    def add_view(self, view: View) -> None:
        """Show results there as well; it is closed at the end."""
        self._views.append(view)

    def execute(self) -> int:
        """Process everything; Ctrl-C takes nothing more, finishes what is under way and raises KeyboardInterrupt.

        Returns:
            The exit status: 0, 1 if something cannot be read, 2 if nothing can.

        Raises:
            OutputError: if a result cannot be written.
            InferenceError: if the device fails.
        """
        self._folder = self._make_folder()
        pipeline = Pipeline(self._stages(), capacity=_LIVE_CAPACITY if self._live else QUEUE_CAPACITY)
        self._is_ending = lambda: pipeline.is_ending
        try:
            with _first_interrupt(pipeline.end_early) as interrupt, self._closing_views():
                self._warm_up()
                began = time.perf_counter()
                with pipeline:
                    self._deliver(pipeline)
        finally:
            self._remove_empty_folder()
        seconds = time.perf_counter() - began
        if self._pictures + self._frames and (self._live or not interrupt.happened):
            self._summarise(pipeline, seconds)
        if interrupt.happened:
            raise KeyboardInterrupt
        if self._failures and not self._pictures + self._frames:
            return InputError.exit_status
        return 1 if self._failures else 0

    def _warm_up(self) -> None:
        """Have the engine make what it needs before times are taken; a picture alone is done sooner without."""
        if self._live is not None or len(self._files) > 1 or any(map(is_video, self._files)):
            self._detector.warm_up(batches=self._batches_in_flight)

    @property
    def _batches_in_flight(self) -> int:
        """Batches that the detector works on at once; few of live frames, which grow old meanwhile."""
        in_flight = self._detector.batches_in_flight
        return in_flight if self._live is None else min(in_flight, _LIVE_BATCHES)

    def _deliver(self, pipeline: Pipeline) -> None:
        """Count and show the results as they come."""
        from tqdm import tqdm

        views = self._views
        unit = "image" if self._live is None and not any(map(is_video, self._files)) else "frame"
        total = None if self._live else self._expected()
        with tqdm(total=total, unit=unit, disable=None, file=sys.stderr, leave=False) as progress:
            for found in pipeline.results(_TICK_S if self._views else None):
                if found is not None:
                    self._count(found)
                    slowest = pipeline.slowest
                    progress.set_postfix_str(f"{slowest.name} {slowest.ms_per_item:.0f} ms", refresh=False)
                    progress.update()
                answers = [view.idle() if found is None else view.show(found) for view in views]
                if not all(answers):
                    pipeline.end_early()
                    views = []  # what is under way is finished, but no longer shown

    # --- the stages ---

    def _stages(self) -> list[tuple[str, StageFunction]]:
        """What the threads do, in order."""
        stages: list[tuple[str, StageFunction]] = [("decode", self._decode), ("detect", self._detect)]
        if self._outputs.save_media or self._views:
            stages.append(("draw", _draw))
        if self._folder is not None or self._outputs.json or self._outputs.jsonl or self._outputs.csv:
            stages.append(("encode", self._write))
        if self._live is None and self._detector.leaves_cores_free:
            return [(name, stage if name == "detect" else _helping(stage)) for name, stage in stages]
        return stages

    def _decode(self, _inbox: Inbox) -> Generator[Frame, None, None]:
        """All frames; what cannot be read is named and counted."""
        allocate = self._detector.frame_buffer
        if self._live is not None:
            yield from self._live.read(allocate, self._span, self._is_ending, self._note_failure)
            return
        for path in self._files:
            try:
                if is_video(path):
                    yield from self._frames_of(path, allocate)
                else:
                    yield Frame(path, read_image(path))
            except (ImageError, VideoError) as error:
                self._note_failure(error)

    def _frames_of(self, path: Path, allocate: Allocate) -> Iterator[Frame]:
        """The frames of a video's span.

        Raises:
            VideoError: if it cannot be read, or has none: the user would take silence for success.
        """
        frames = self._reader(path, allocate, self._span)
        first = next(frames, None)
        if first is None:
            name = public_name(source_name(path))
            raise VideoError(f"video {name} has no frame between --start and --end: choose an earlier --start")
        yield first
        del first  # its memory is to be used again
        yield from frames

    def _detect(self, inbox: Inbox) -> Generator[Found, None, None]:
        """Detections of frames, in batches as large as the engine takes; of live frames, as large as are there."""
        size = self._detector.engine.header.max_batch
        under_way: deque[_Batch] = deque()
        in_flight = self._batches_in_flight
        batch: list[Frame] = []
        for frame in inbox:
            batch.append(frame)
            is_urgent = self._live is not None and not inbox.is_ready()
            if len(batch) < size and not is_urgent:
                continue
            under_way.append(_Batch.submit(self._detector, batch))
            batch = []
            while len(under_way) >= (1 if is_urgent else in_flight):
                yield from under_way.popleft().results()
        if batch:
            under_way.append(_Batch.submit(self._detector, batch))
        for rest in under_way:
            yield from rest.results()

    def _write(self, inbox: Inbox) -> Generator[Found, None, None]:
        """Results to files; these are finished when the run ends, however it does."""
        with contextlib.ExitStack() as stack:
            sinks: list[Sink] = []
            for sink in self._make_sinks():
                stack.callback(sink.close)
                sinks.append(sink)
            for found in inbox:
                for sink in sinks:
                    sink.write(found)
                yield found

    # --- outputs ---

    def _make_sinks(self) -> Iterator[Sink]:
        """What was asked for; records come before pictures, so that none is written without."""
        outputs = self._outputs
        if outputs.json is not None:
            yield JsonFile(outputs.json)
        if outputs.jsonl is not None:
            yield JsonLinesFile(outputs.jsonl)
        if outputs.csv is not None:
            yield CsvFile(outputs.csv)
        if self._folder is None:
            return
        names = ResultNames()
        if outputs.save_media:
            yield PictureSink(self._folder, names)
        if outputs.save_txt:
            yield LabelSink(self._folder, names, with_confidence=outputs.save_conf)
        if outputs.save_crops:
            yield CropSink(self._folder, names)

    def _make_folder(self) -> Path | None:
        """The folder that results go to; None if nothing is to be written there."""
        if not self._outputs.needs_folder:
            return None
        return self._outputs.folder if self._outputs.exist_ok else next_run_folder(self._outputs.folder)

    def _remove_empty_folder(self) -> None:
        """A run that wrote nothing leaves no folder of its own behind."""
        if self._folder is not None and not self._outputs.exist_ok:
            with contextlib.suppress(OSError):  # it is not empty
                self._folder.rmdir()

    @contextlib.contextmanager
    def _closing_views(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for view in self._views:
                stack.callback(view.close)
            yield

    # --- what was found ---

    def _expected(self) -> int | None:
        """Number of pictures and frames, or None if it cannot be told."""
        counts = [count_frames(path, self._span) if is_video(path) else 1 for path in self._files]
        return None if None in counts else sum(count for count in counts if count is not None)

    def _note_failure(self, error: ImageError | VideoError) -> None:
        self._failures += 1
        print_beside_progress(f"{PROGRAM}: error: {error}")

    def _count(self, found: Found) -> None:
        self._counts.update(found.detections.counts())
        if found.frame.clip is None:
            self._pictures += 1
        else:
            self._frames += 1
            self._clips.add(found.frame.clip.source)

    def _summarise(self, pipeline: Pipeline, seconds: float) -> None:
        """What was found, how long it took, where it is."""
        timing = self._detector.timing
        counts = (f"{number} {printable(name)}" for name, number in self._counts.most_common())
        print(f"{self._what_was_read()}: {', '.join(counts) or 'nothing'}")
        done = self._pictures + self._frames
        unit = "frames" if self._frames else "pictures"
        print(
            f"each: pre {timing.preprocess_ms / timing.pictures:.1f} ms, "
            f"infer {timing.inference_ms / timing.pictures:.1f} ms, "
            f"post {timing.postprocess_ms / timing.pictures:.1f} ms "
            f"({done / seconds:.1f} {unit}/s with reading and writing)"
        )
        if self._frames and self._live is None:
            stages = ", ".join(f"{stage.name} {stage.ms_per_item:.1f} ms" for stage in pipeline.times)
            print(f"stages, at the same time: {stages}; {pipeline.slowest.name} sets the pace")
        for status in self._live.statuses() if self._live else []:
            print(f"{printable(status.name)}: {status.received} frames came in, {status.dropped} dropped")
        places = [self._folder, self._outputs.json, self._outputs.jsonl, self._outputs.csv]
        written = [printable(str(place)) for place in places if place is not None and place.exists()]
        if written:
            print(f"results: {', '.join(written)}")
        if self._failures and self._live is None:
            failed = _count_of(self._failures, len(self._files), "picture" if not self._frames else "source")
            print(f"{PROGRAM}: {failed} could not be read{' to the end' if self._frames else ''}", file=sys.stderr)

    def _what_was_read(self) -> str:
        """Such as ``9 of 10 pictures`` or ``2 pictures and 300 frames of 1 video``."""
        pictures = sum(not is_video(path) for path in self._files)
        parts = [_count_of(self._pictures, pictures, "picture")] if pictures else []
        if self._frames:
            kind = "video" if self._live is None else "source"
            clips = f" of {_count_of(len(self._clips), len(self._clips), kind)}"
            parts.append(_count_of(self._frames, self._frames, "frame") + clips)
        return " and ".join(parts)


@dataclass(frozen=True)
class _Batch:
    """Frames that a detector is working on."""

    frames: list[Frame]
    pending: PendingDetections

    @classmethod
    def submit(cls, detector: Detector, frames: list[Frame]) -> _Batch:
        return cls(frames, detector.submit([frame.image for frame in frames]))

    def results(self) -> Iterator[Found]:
        """Wait for the batch."""
        for frame, detections in zip(self.frames, self.pending.result(), strict=True):
            yield Found(frame, detections)


class _Interrupt:
    """Whether Ctrl-C came."""

    happened = False


@contextlib.contextmanager
def _first_interrupt(action: Callable[[], None]) -> Iterator[_Interrupt]:
    """Meanwhile the first Ctrl-C calls `action`, which has to be quick and without locks; the second one interrupts."""
    interrupt = _Interrupt()

    def handle(_number: int, _stack: Any) -> None:
        if interrupt.happened:
            raise KeyboardInterrupt
        interrupt.happened = True
        action()

    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _helping(stage: StageFunction) -> StageFunction:
    """The same stage in a thread that, like those which it starts, leaves the engine's cores to the engine."""

    def run(inbox: Inbox) -> Generator[Any, None, None]:
        if sys.platform == "linux":  # where threads have a niceness of their own
            thread = threading.get_native_id()
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _HELPER_NICENESS)
        yield from stage(inbox)

    return run


def _draw(inbox: Inbox) -> Generator[Found, None, None]:
    """Results with their picture drawn."""
    for found in inbox:
        drawn: Image = draw(found.frame.pixels, found.detections)
        yield Found(found.frame, found.detections, drawn)


def _check_sources(files: Sequence[Path], live: Sequence[str], span: Span) -> None:
    """Raise InputError if the sources do not go together, or the span has no effect on them."""
    if files and live:
        raise InputError(f"{files[0]} is a file and {live[0]} a live source, which has no end: run them apart")
    if span.start_s and live:
        raise InputError("--start has no effect on a camera or stream, which begins now: leave it out")
    if span != Span() and files and not any(map(is_video, files)):
        raise InputError("--stride, --start and --end have no effect on pictures: leave them out")


def _count_of(part: int, whole: int, what: str) -> str:
    """Such as ``1 picture``, ``9 pictures`` or ``1 of 10 pictures``."""
    number = f"{whole}" if part == whole else f"{part} of {whole}"
    return f"{number} {what}{'' if whole == 1 else 's'}"
