"""How close a video run comes to its slowest stage, and whether its memory stays flat.

    python benchmarks/pipeline.py speed VIDEO --engine yolov5n.engine --threads 1 --seconds 10
    python benchmarks/pipeline.py memory --frames 50000

`speed` measures each stage alone, on the same frames, with the same settings as in the run, then the run. The stages
share the machine's cores: a run can only be as fast as its slowest stage if the cores that this stage leaves free
suffice for the others, so give the engine fewer threads than there are cores.

`memory` sends small frames through all stages (reader, drawing, H.264, JSON, JSON Lines, CSV) and a detector that finds
two boxes without computing, and prints the resident memory on the way.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from yolotrt import Detections, Detector
from yolotrt.engines.base import Timing
from yolotrt.media.drawing import draw
from yolotrt.media.frames import Clip, Frame, Span, host_memory
from yolotrt.media.run import Outputs, Run
from yolotrt.media.video import read_video
from yolotrt.media.video_writer import VideoWriter

CLIP_FRAMES = 1000


def speed(options: argparse.Namespace) -> None:
    """Frames a second of each stage alone and of the run."""
    span = Span(end_s=options.seconds)
    detector: Any
    if options.device_ms is None:
        detector = Detector(options.engine, threads=options.threads)
    else:
        detector = StubDetector(options.device_ms / 1e3)
    with tempfile.TemporaryDirectory() as folder:
        frames = list(read_video(options.video, host_memory, span))
        detector.submit([frames[0].image]).result()  # the first call prepares memory
        rounds = [measure(options.video, detector, frames, span, Path(folder)) for _ in range(options.rounds)]
    best = {stage: max(figures[stage] for figures in rounds) for stage in rounds[0]}
    for stage, rate in best.items():
        print(f"{stage:>10}  {rate:7.1f} frames/s")
    slowest = min(rate for stage, rate in best.items() if stage != "run")
    serial = 1 / sum(1 / rate for stage, rate in best.items() if stage != "run")
    print(f"run / slowest stage {best['run'] / slowest:.3f}; one after the other {serial / slowest:.3f}")


def measure(video: Path, detector: Any, frames: list[Frame], span: Span, folder: Path) -> dict[str, float]:
    """One round."""
    figures: dict[str, float] = {}

    def note(stage: str, began: float) -> None:
        figures[stage] = len(frames) / (time.perf_counter() - began)

    began = time.perf_counter()
    for _ in read_video(video, detector.frame_buffer, span):
        pass
    note("decode", began)
    began = time.perf_counter()
    found = detector([frame.image for frame in frames])
    note("detect", began)
    began = time.perf_counter()
    drawn = [draw(frame.image, detections) for frame, detections in zip(frames, found, strict=True)]
    note("draw", began)
    assert frames[0].clip is not None
    began = time.perf_counter()
    writer = VideoWriter(folder / "alone.mp4", frames[0].clip)
    for frame, picture in zip(frames, drawn, strict=True):
        writer.write(frame, picture)
    writer.close()
    note("encode", began)
    began = time.perf_counter()
    Run(detector, [video], Outputs(folder / "run"), span=span).execute()
    note("run", began)
    return figures


class StubDetector:
    """Finds two boxes in every frame and computes nothing; it may wait, as for a GPU."""

    def __init__(self, wait_s: float = 0.0) -> None:
        self._wait_s = wait_s
        self.engine = SimpleNamespace(header=SimpleNamespace(max_batch=1))
        self.timing = Timing()
        self.batches_in_flight = 1
        self.leaves_cores_free = False
        self.frame_buffer = host_memory

    def __call__(self, images: list[Any]) -> list[Detections]:
        """The boxes of all."""
        found: list[Detections] = self.submit(images).result()
        return found

    def warm_up(self, *, batches: int) -> None:
        """Nothing to do."""

    def submit(self, images: list[Any]) -> Any:
        """The boxes."""
        self.timing.pictures += len(images)
        time.sleep(self._wait_s * len(images))
        boxes = np.array([[5, 5, 30, 30], [20, 10, 60, 44]], np.float32)
        scores, classes = np.array([0.9, 0.8], np.float32), np.array([0, 1], np.int32)
        found = [Detections(boxes, scores, classes, ("cat", "dog"), image.shape[:2]) for image in images]
        return SimpleNamespace(result=lambda: found)


class MemoryView:
    """Prints the resident memory every so many frames."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._count = 0

    def show(self, _found: Any) -> bool:
        """Count a frame."""
        self._count += 1
        if self._count % self._every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(f"{self._count:>8} frames  {pages * os.sysconf('SC_PAGE_SIZE') / 2**20:7.1f} MiB", flush=True)
        return True

    def idle(self) -> bool:
        """Nothing to do."""
        return True

    def close(self) -> None:
        """Nothing to do."""


def memory(options: argparse.Namespace) -> None:
    """Resident memory over many frames."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = Clip("x", 48, 64, Fraction(25), Fraction(1, 25))
        writer = VideoWriter(folder / "clip.mp4", clip)
        for index in range(CLIP_FRAMES):
            picture = np.full((48, 64, 3), index % 200, np.uint8)
            writer.write(Frame(folder / "x", picture, clip, index, index), picture)
        writer.close()
        sources: list[Path | str] = [folder / "clip.mp4"] * (options.frames // CLIP_FRAMES)
        records = {kind: folder / f"r.{kind}" for kind in ("json", "jsonl", "csv")}
        detector: Any = StubDetector()
        run = Run(detector, sources, Outputs(folder / "out", **records))
        run.add_view(MemoryView(max(options.frames // 10, 1)))
        run.execute()


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speed")
    command.add_argument("video", type=Path)
    command.add_argument("--engine", type=Path, default=Path("yolotrt.engine"))
    command.add_argument("--threads", type=int)
    command.add_argument("--device-ms", type=float, help="wait so long a frame in place of an engine, as for a GPU")
    command.add_argument("--seconds", type=float, help="of the video (default: all)")
    command.add_argument("--rounds", type=int, default=3, help="the best one of each counts (default: %(default)s)")
    command.set_defaults(function=speed)
    command = commands.add_parser("memory")
    command.add_argument("--frames", type=int, default=50_000)
    command.set_defaults(function=memory)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
