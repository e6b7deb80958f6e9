"""Latency and throughput of engines, stage by stage.

Every configuration (engine and batch size) is measured in the same process: after a warm-up the configurations take
turns in rounds, so that a machine that slows down slows all of them. Nothing is left out of ``file to boxes``; the
stages say where its time goes.

On the CPU each stage is timed by itself on the host's clock. On a GPU the session times its stages with CUDA events
(`Session.profile`), and ``file to boxes`` ends when the boxes are in host memory.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt import markdown
from yolotrt.engines.base import BuildOptions, Session
from yolotrt.engines.build import build_engine, open_session, require_boxes
from yolotrt.engines.file import EngineFile
from yolotrt.engines.host import HostDecoder
from yolotrt.errors import BackendUnavailableError, InputError, YolotrtError
from yolotrt.files import atomic_write, atomic_write_text
from yolotrt.machine import describe_machine
from yolotrt.media.images import read_image
from yolotrt.media.sources import VIDEO_SUFFIXES, expand_sources
from yolotrt.postprocess import NmsOptions
from yolotrt.preprocess import Letterbox
from yolotrt.weights import Weights

Image = npt.NDArray[np.uint8]

FILE_TO_BOXES = "file to boxes"
STAGES = ("decode", "upload", "letterbox", "engine", "yololayer", "nms", "whole")
"""Order of the stages; a machine without a GPU has no upload. `whole` is frames to boxes."""

STAGE_MEANINGS = {
    "decode": "reading the files and decoding them to BGR",
    "upload": "frames to the GPU",
    "letterbox": "scaling, padding, RGB in 0..1",
    "engine": "the network alone",
    "yololayer": "raw heads to candidates",
    "nms": "non-maximum suppression; a GPU writes the boxes to the host",
    "whole": "decoded frames to boxes, as one call",
    FILE_TO_BOXES: "files to boxes in pixels of the pictures, as one call: everything above",
}

ROUNDS = 5
WARM_UP = 5
"""Batches before the first measured one: memory is allocated, caches fill, clocks rise."""
TURN_WARM_UP = 2
"""Batches before the measured ones of each turn: the caches hold another configuration's data."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        batches: Batch sizes.
        repeats: Measured batches of each configuration.
        threads: CPU threads of ONNX Runtime; None takes one a physical core.
        options: Thresholds of the detection.
    """

    batches: tuple[int, ...] = (1,)
    repeats: int = 100
    threads: int | None = None
    options: NmsOptions = field(default_factory=NmsOptions)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: if one is out of range.
        """
        if not self.batches or min(self.batches) < 1:
            raise InputError(f"batch sizes {list(self.batches)}: choose numbers of at least 1")
        if self.repeats < ROUNDS:
            raise InputError(f"{self.repeats} repeats say nothing about percentiles: choose at least {ROUNDS}")


@dataclass(frozen=True)
class Row:
    """One configuration's times.

    Attributes:
        label: Name of the engine in tables.
        backend: Its backend.
        precision: Its precision.
        batch: Batch size.
        stages: By stage: milliseconds of each measured batch.
        accuracy: mAP50-95 of the engine, if it was measured.
    """

    label: str
    backend: str
    precision: str
    batch: int
    stages: Mapping[str, Sequence[float]]
    accuracy: float | None = None

    def percentile(self, stage: str, percent: float) -> float:
        """Milliseconds a batch."""
        return float(np.percentile(self.stages[stage], percent))

    @property
    def latency_ms(self) -> float:
        """Median of file to boxes, milliseconds a batch."""
        return self.percentile(FILE_TO_BOXES, 50)

    @property
    def pictures_per_second(self) -> float:
        """Throughput from file to boxes, over all measured batches."""
        times = self.stages[FILE_TO_BOXES]
        return self.batch * len(times) / sum(times) * 1e3

    def speed_against(self, base: Row) -> float:
        """How many times as fast as `base` it is, a picture, by medians, which some slow batches do not move."""
        return (base.latency_ms / base.batch) / (self.latency_ms / self.batch)


def pictures_of(sources: Sequence[str | Path]) -> list[Path]:
    """The picture files of sources; videos among them are left out.

    Raises:
        InputError: if a source does not exist, or there is no picture.
    """
    files = (source for source in expand_sources(sources) if isinstance(source, Path))
    pictures = [path for path in files if path.suffix.lower() not in VIDEO_SUFFIXES]
    if not pictures:
        raise InputError("no source is a picture, and only these are measured: name pictures")
    return pictures


def engines_for(
    weights: Weights, backends: Sequence[str], precisions: Sequence[str], batches: Sequence[int]
) -> Iterator[EngineFile]:
    """Build one engine for each backend and precision, in memory, for all the batch sizes.

    A combination that the backend does not offer is left out with a warning.

    Raises:
        InputError: if none can be built.
    """
    low, high = min(batches), max(batches)
    problem: YolotrtError | None = None
    built = 0
    for backend in backends:
        for precision in precisions:
            options = BuildOptions(precision=precision, min_batch=low, max_batch=high)
            try:
                engine = build_engine(weights, backend=backend, options=options)
            except YolotrtError as error:
                problem = error
                _log.warning("%s %s is left out: %s", backend, precision, error)
                continue
            built += 1
            yield engine
    if not built:
        raise InputError(f"no engine could be built: {problem}")


def run(
    engines: Sequence[EngineFile], paths: Sequence[Path], plan: Plan, accuracies: Sequence[float | None] = ()
) -> list[Row]:
    """Measure all engines with all batch sizes that they take.

    Args:
        engines: The engines.
        paths: Pictures; batches take them in turn.
        plan: What to measure.
        accuracies: By engine: its mAP50-95, or None.

    Raises:
        InputError: if no engine takes any of the batch sizes, or one is a classifier's.
        ImageError: if a picture cannot be read.
    """
    from yolotrt.shell import progress

    for engine in engines:
        require_boxes(engine, "--benchmark times the way to boxes")
    runs: list[_Run] = []
    try:
        for index, engine in enumerate(engines):
            low, _, high = engine.header.batch_range
            sizes = [size for size in plan.batches if low <= size <= high]
            if sizes:
                session = open_session(engine, threads=plan.threads)
                accuracy = accuracies[index] if accuracies else None
                runs.extend(_Run(session, engine, size, paths, plan.options, accuracy) for size in sizes)
        if not runs:
            ranges = ", ".join(
                f"{engine.header.batch_range[0]} to {engine.header.batch_range[2]}" for engine in engines
            )
            raise InputError(f"no engine takes a batch of {list(plan.batches)}, they take {ranges}: choose --batches")
        for turn in progress(range(-1, ROUNDS), "round"):
            for one in runs:
                one.warm_up(WARM_UP if turn < 0 else TURN_WARM_UP)
                one.measure(_share(plan.repeats, turn))
    finally:
        for one in runs:
            one.session.close()
    return [one.row() for one in runs]


def _share(repeats: int, turn: int) -> int:
    """How many of the repeats belong to one of the rounds; none to the one before the first, numbered -1."""
    return repeats * (turn + 1) // ROUNDS - repeats * turn // ROUNDS if turn >= 0 else 0


class _Run:
    """One engine with one batch size."""

    def __init__(
        self,
        session: Session,
        engine: EngineFile,
        batch: int,
        paths: Sequence[Path],
        options: NmsOptions,
        accuracy: float | None,
    ) -> None:
        self.session = session
        self._engine = engine
        self._batch = batch
        self._paths = paths
        self._options = options
        self._accuracy = accuracy
        self._next = 0
        self._times: dict[str, list[float]] = {}
        self._stages = _GpuStages(session) if hasattr(session, "profile") else _HostStages(session)

    def warm_up(self, batches: int) -> None:
        """Work without timing."""
        for _ in range(batches):
            self._measure_once(self._next_paths())

    def measure(self, batches: int) -> None:
        """Time some batches."""
        for _ in range(batches):
            for stage, milliseconds in self._measure_once(self._next_paths()).items():
                self._times.setdefault(stage, []).append(milliseconds)
        if batches:
            frames = [read_image(path) for path in self._next_paths()]
            for stage, times in self._stages.of_turn(frames, self._options, batches).items():
                self._times.setdefault(stage, []).extend(times)

    def _next_paths(self) -> list[Path]:
        """The pictures of the next batch."""
        paths = [self._paths[(self._next + place) % len(self._paths)] for place in range(self._batch)]
        self._next += self._batch
        return paths

    def _measure_once(self, paths: Sequence[Path]) -> dict[str, float]:
        """Milliseconds of every stage for one batch."""
        clock = _Clock()
        frames = clock.time("decode", lambda: [read_image(path) for path in paths])
        stages = self._stages.of_batch(frames, self._options)
        clock.time("whole", lambda: self.session.detect(frames, self._options))
        clock.time(FILE_TO_BOXES, lambda: self._file_to_boxes(paths))
        return {**clock.times, **stages}

    def _file_to_boxes(self, paths: Sequence[Path]) -> list[npt.NDArray[np.float32]]:
        """What a user waits for."""
        frames = [read_image(path) for path in paths]
        found = self.session.detect(frames, self._options)
        return [
            Letterbox.fit((frame.shape[0], frame.shape[1]), self.session.header.imgsz).inverse(boxes.xyxy)
            for frame, boxes in zip(frames, found, strict=True)
        ]

    def row(self) -> Row:
        """The times so far."""
        header = self._engine.header
        ordered = {stage: self._times[stage] for stage in (*STAGES, FILE_TO_BOXES) if stage in self._times}
        label = self._engine.path.name if self._engine.path else f"{header.backend} {header.precision}"
        return Row(label, header.backend, header.precision, self._batch, ordered, self._accuracy)


class _Clock:
    """Times calls on the host's clock."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    def time(self, stage: str, call: Callable[[], Any]) -> Any:
        """Run `call` and note its milliseconds under `stage`."""
        began = time.perf_counter()
        result = call()
        self.times[stage] = (time.perf_counter() - began) * 1e3
        return result


class _Stages:
    """Times the stages of a session: with every batch, or once a turn."""

    def of_batch(self, _frames: Sequence[Image], _options: NmsOptions) -> dict[str, float]:
        """Milliseconds by stage for one batch."""
        return {}

    def of_turn(self, _frames: Sequence[Image], _options: NmsOptions, _repeats: int) -> dict[str, list[float]]:
        """Milliseconds by stage for one batch, measured `repeats` times."""
        return {}


class _HostStages(_Stages):
    """The stages of a session that computes on the CPU, one after the other."""

    def __init__(self, session: Session) -> None:
        header = session.header
        self._session = session
        self._input = np.zeros((header.max_batch, 3, *header.imgsz), np.float32)
        self._decoder = HostDecoder(header)

    def of_batch(self, frames: Sequence[Image], options: NmsOptions) -> dict[str, float]:
        """See `_Stages.of_batch`."""
        clock = _Clock()
        images = self._input[: len(frames)]
        clock.time("letterbox", lambda: self._letterbox(frames))
        outputs = clock.time("engine", lambda: self._session.run(images))
        rows = clock.time("yololayer", lambda: list(self._decoder.candidates(outputs, options)))
        clock.time("nms", lambda: self._decoder.suppressed(rows, options))
        return clock.times

    def _letterbox(self, frames: Sequence[Image]) -> None:
        for frame, out in zip(frames, self._input, strict=False):
            size = (frame.shape[0], frame.shape[1])
            Letterbox.fit(size, self._session.header.imgsz).to_input(frame, out)


class _GpuStages(_Stages):
    """The stages of a session that times itself with CUDA events. It captures its graphs anew for that: once a turn."""

    def __init__(self, session: Session) -> None:
        self._session: Any = session

    def of_turn(self, frames: Sequence[Image], options: NmsOptions, repeats: int) -> dict[str, list[float]]:
        """See `_Stages.of_turn`; `whole` is left to the host's clock, which also sees the launches."""
        profile = self._session.profile(frames, options, repeats)
        return {stage: times for stage, times in profile.items() if stage in STAGES and stage != "whole"}


# --- what comes out ---


def header_lines(machine: Mapping[str, str], plan: Plan, pictures: int) -> list[str]:
    """Machine and method as a Markdown list."""
    method = (
        f"{plan.repeats} batches of each configuration after {WARM_UP} to warm up, in {ROUNDS} rounds in turn; "
        f"{pictures} pictures; confidence {plan.options.confidence:g}, IoU {plan.options.iou:g}; "
        f"CPU threads: {plan.threads or 'one a physical core'}"
    )
    return [f"- {name}: {value}" for name, value in {**machine, "method": method}.items()]


def to_markdown(rows: Sequence[Row], machine: Mapping[str, str], plan: Plan, pictures: int) -> str:
    """Header, table of configurations and tables of stages."""
    base = rows[0]
    has_accuracy = any(row.accuracy is not None for row in rows)
    head = ["engine", "batch", "p50 ms", "p90 ms", "p99 ms", "pictures/s", "ratio to the first"]
    lines = [
        [
            row.label,
            str(row.batch),
            *(f"{row.percentile(FILE_TO_BOXES, percent):.2f}" for percent in (50, 90, 99)),
            f"{row.pictures_per_second:.1f}",
            f"{row.speed_against(base):.2f}x",
            *([_accuracy(row)] if has_accuracy else []),
        ]
        for row in rows
    ]
    parts = [
        *header_lines(machine, plan, pictures),
        "",
        f"From file to boxes, a batch; the ratio is of median times a picture, to {base.label}, batch {base.batch}.",
        "",
        markdown.table(head + ["mAP50-95"] * has_accuracy, lines),
    ]
    for row in rows:
        parts += ["", f"{row.label}, batch {row.batch}, milliseconds a batch:", "", _stage_table(row)]
    return "\n".join(parts)


def _accuracy(row: Row) -> str:
    return "-" if row.accuracy is None else f"{row.accuracy:.3f}"


def _stage_table(row: Row) -> str:
    """One configuration's stages."""
    return markdown.table(
        ["stage", "p50", "p90", "p99", "what it includes"],
        [
            [stage, *(f"{row.percentile(stage, percent):.2f}" for percent in (50, 90, 99)), STAGE_MEANINGS[stage]]
            for stage in row.stages
        ],
    )


def to_record(rows: Sequence[Row], machine: Mapping[str, str], plan: Plan, pictures: int) -> dict[str, Any]:
    """Everything for programs, each single time included."""
    return {
        "machine": dict(machine),
        "repeats": plan.repeats,
        "rounds": ROUNDS,
        "warm_up": WARM_UP,
        "threads": plan.threads,
        "pictures": pictures,
        "includes": STAGE_MEANINGS,
        "rows": [
            {
                "engine": row.label,
                "backend": row.backend,
                "precision": row.precision,
                "batch": row.batch,
                "map": row.accuracy,
                "pictures_per_second": row.pictures_per_second,
                "ratio": row.speed_against(rows[0]),
                "stages_ms": {
                    stage: {
                        **{f"p{percent}": row.percentile(stage, percent) for percent in (50, 90, 99)},
                        "times": [round(value, 4) for value in times],
                    }
                    for stage, times in row.stages.items()
                },
            }
            for row in rows
        ],
    }


def write_results(folder: Path, rows: Sequence[Row], plan: Plan, pictures: int) -> str:
    """Write benchmark.json, benchmark.md and, where matplotlib is installed, benchmark.png; returns the Markdown.

    Raises:
        OutputError: if a file cannot be written.
    """
    machine = describe_machine()
    text = to_markdown(rows, machine, plan, pictures)
    atomic_write_text(folder / "benchmark.json", json.dumps(to_record(rows, machine, plan, pictures), indent=1))
    atomic_write_text(folder / "benchmark.md", f"# Benchmark\n\n{text}\n")
    _write_plot(folder / "benchmark.png", rows)
    return text


def _write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Latency against batch. Without matplotlib there is no plot, and a message says so."""
    from yolotrt.evaluation import plots

    try:
        picture = plots.to_png(plots.latency([_point(row) for row in rows]))
    except (BackendUnavailableError, ImportError) as problem:
        _log.warning("the benchmark has no plot: %s", problem)
        return
    with atomic_write(path) as file:
        file.write(picture)


def _point(row: Row) -> tuple[str, int, float, float | None]:
    """Engine, batch, latency in ms and accuracy."""
    return row.label, row.batch, row.latency_ms, row.accuracy
