"""INT8 against fp32 on the CPU engine: both engines of each model in turn, in one process.

python benchmarks/int8_speed.py yolov5n.pt yolov5s.pt --threads 2

Scales are made up: they do not change the speed. ``--cpu-time`` counts the process's CPU time in place of the clock's,
which on a busy machine is the steadier figure (with ``--threads 1``). ``--profile`` adds a table of ONNX Runtime's node
types.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from yolotrt import load_weights
from yolotrt.calibration.activations import record
from yolotrt.engines.base import CompleteOptions
from yolotrt.engines.onnx import OnnxRuntimeBackend, inference_session
from yolotrt.network.builder import INPUT_NAME
from yolotrt.network.quantize import Quantization, scale_groups
from yolotrt.weights import Weights

SCALE = 0.05
WARM_UP = 5
RUNS_A_TURN = 10
PROFILED_RUNS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of the process in place of the clock's")
    parser.add_argument("--profile", action="store_true", help="time of each node type as well")
    options = parser.parse_args(arguments)
    kind = "CPU time" if options.cpu_time else "time"
    print(
        f"ONNX Runtime {OnnxRuntimeBackend().version()}, {options.threads} threads, "
        f"{kind}, median of {options.runs} in turn"
    )
    print("| model | fp32 | int8 | fp32 / int8 | |")
    print("| --- | --- | --- | --- | --- |")
    for path in options.weights:
        weights = load_weights(path)
        plans = build_plans(weights)
        image = np.random.default_rng(0).random((1, 3, *weights.metadata.imgsz), np.float32)
        clock = time.process_time if options.cpu_time else time.perf_counter
        fp32, int8 = interleaved_ms([plan for plan, _ in plans], image, options.threads, options.runs, clock)
        print(f"| {path.stem} | {fp32:.2f} ms | {int8:.2f} ms | {fp32 / int8:.2f} | {plans[1][1]} |", flush=True)
        if options.profile:
            for plan, _ in plans:
                print_profile(plan, image, options.threads)


def build_plans(weights: Weights) -> list[tuple[bytes, str]]:
    """The fp32 and the INT8 engine's ONNX models, and what became of the convolutions."""
    imgsz = weights.metadata.imgsz
    scales = {name: SCALE for group in scale_groups(record(weights, imgsz)) for name in group}
    plans = [
        OnnxRuntimeBackend().build(weights, CompleteOptions(precision, imgsz, (1, 1, 1), quantization=quantization))
        for precision, quantization in (("fp32", None), ("int8", Quantization(scales)))
    ]
    return [(plan.data, in_words(plan.findings.get("convolutions", {}))) for plan in plans]


def in_words(convolutions: Mapping[str, int]) -> str:
    """Such as ``56 of 60 convolutions int8``."""
    return f"{convolutions['int8']} of {sum(convolutions.values())} convolutions int8" if convolutions else ""


def interleaved_ms(
    models: Sequence[bytes], image: np.ndarray, threads: int, runs: int, clock: Callable[[], float]
) -> list[float]:
    """Median milliseconds of each model; they take turns of several runs.

    The first runs of a turn do not count: the other session's threads wait for work on all cores for a while.
    """
    sessions = [inference_session(model, threads) for model in models]
    times: list[list[float]] = [[] for _ in sessions]
    while len(times[-1]) < runs:
        for session, collected in zip(sessions, times, strict=True):
            for run in range(-WARM_UP, RUNS_A_TURN):
                began = clock()
                session.run(None, {INPUT_NAME: image})
                if run >= 0:
                    collected.append((clock() - began) * 1e3)
    return [statistics.median(collected) for collected in times]


def print_profile(model: bytes, image: np.ndarray, threads: int) -> None:
    """Milliseconds of each node type: each node's best of `PROFILED_RUNS`, summed."""
    import onnxruntime

    best: dict[str, float] = defaultdict(lambda: float("inf"))
    kinds = {}
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(folder, "profile")  # noqa: PTH118
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED_RUNS):
            session.run(None, {INPUT_NAME: image})
        events = json.loads(Path(session.end_profiling()).read_text())
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            best[event["name"]] = min(best[event["name"]], event["dur"] / 1e3)
            kinds[event["name"]] = event["args"]["op_name"]
    totals: dict[str, float] = defaultdict(float)
    for name, duration in best.items():
        totals[kinds[name]] += duration
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    print(f"{sum(totals.values()):.2f} ms: " + ", ".join(f"{kind} {duration:.2f}" for kind, duration in ranked))


if __name__ == "__main__":
    main()
