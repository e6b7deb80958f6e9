"""What the detector adds to the engine: letterbox, YoloLayer, NMS, against the engine's own time in the same run.

python benchmarks/overhead.py yolov5n.engine bus.jpg --threads 2
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from yolotrt import Detector
from yolotrt.engines.build import find_backend, open_session
from yolotrt.media.images import read_image

BUDGET_RATIO = 1.10
BUDGET_MS = 2.0


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args()

    detector = Detector(options.engine, threads=options.threads)
    session = open_session(detector.engine, threads=options.threads)
    image = read_image(options.picture)
    batch = np.random.default_rng(0).random((1, 3, *detector.engine.header.imgsz), np.float32)

    detect_ms, engine_ms = interleaved(lambda: detector(image), lambda: session.run(batch), options.runs)
    budget = BUDGET_RATIO * engine_ms + BUDGET_MS
    print(
        f"{platform.processor() or platform.machine()}, {options.threads} threads, OpenCV {cv2.__version__}, "
        f"{detector.engine.header.backend} {find_backend(detector.engine.header.backend).version()}, "
        f"{options.picture.name} {image.shape[1]}x{image.shape[0]}, median of {options.runs}"
    )
    print(f"| Detector(image) | engine alone | ratio | {BUDGET_RATIO:.2f} x engine + {BUDGET_MS:g} ms |")
    print("| --- | --- | --- | --- |")
    print(f"| {detect_ms:.2f} ms | {engine_ms:.2f} ms | {detect_ms / engine_ms:.3f} | {budget:.2f} ms |")


def interleaved(first: Callable[[], object], second: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median milliseconds of two calls that take turns, after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(-5, runs):
        for call, collected in zip((first, second), times, strict=True):
            began = time.perf_counter()
            call()
            if run >= 0:
                collected.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
