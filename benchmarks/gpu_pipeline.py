"""The whole way of a frame on a GPU against the engine alone, and against a plain script, in one run.

    python benchmarks/gpu_pipeline.py yolov5n-b1.engine yolov5n-b16.engine --picture bus.jpg --json gpu.json

Frames are 1920 x 1080, in page-locked memory that the session lends (and, apart, in ordinary and in device memory).
Times are medians after a warm-up. The plain script is what a tutorial does with the same engine: OpenCV's letterbox on
the CPU, blocking copies, NumPy for decoding and NMS.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yolotrt.cuda.device import GpuDevice, find_device
from yolotrt.engines.build import open_session
from yolotrt.engines.file import EngineFile
from yolotrt.engines.gpu_engine import tensor_bytes
from yolotrt.engines.gpu_session import LANES, GpuSession
from yolotrt.media.images import read_image
from yolotrt.postprocess import NmsOptions, YoloLayer, non_max_suppression

FRAME = (1080, 1920)
OPTIONS = NmsOptions()
OVERHEAD_US = 100.0
KERNELS_US = 60.0
THREAD_US = 50.0
THROUGHPUT = 0.90
AGAINST_PLAIN = 5.0
WINDOWS = 10
"""Throughput is the median of so many pieces of time, since a virtual machine's processors are not always its own."""
MOST_UNDER_WAY = 5
"""Batches under way at most, where their number is varied; a session has `LANES` unless it is told otherwise."""


def main() -> int:
    """Measure every engine and print the tables; returns 1 if a budget is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path, required=True, help="what the frames show, scaled to 1920 x 1080")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each throughput measurement")
    parser.add_argument(
        "--soak", type=int, default=0, metavar="FRAMES", help="then watch the memory over so many frames"
    )
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args()

    device = find_device()
    print(header(device))
    with device.current():
        rates = bandwidths(device)
    print(f"\nupload {rates['upload']:.1f} GB/s (page-locked, 6.2 MB), device copy {rates['device']:.0f} GB/s\n")
    picture = cv2.resize(read_image(options.picture), FRAME[::-1])
    results = []
    for path in options.engines:
        engine = EngineFile.load(path)
        results.append(measure(engine, device, picture, options.seconds, rates))
        report(path.name, results[-1])
    if options.soak:
        results.append(soak(EngineFile.load(options.engines[-1]), device, picture, options.soak))
    if options.json:
        options.json.write_text(json.dumps({"rates": rates, "results": results}, indent=1), encoding="utf-8")
    return int(any(not passed for result in results for passed in result.get("budgets", {}).values()))


def header(device: GpuDevice) -> str:
    """Machine and versions."""
    import importlib.metadata

    names = ("tensorrt", "cupy-cuda13x", "numpy", "opencv-python", "opencv-python-headless")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{device.name}, compute capability {device.capability}, {device.library}, {', '.join(versions)}, {today}"


def measure(
    engine: EngineFile, device: GpuDevice, picture: np.ndarray, seconds: float, rates: dict[str, float]
) -> dict[str, Any]:
    """All figures of one engine at its largest batch."""
    batch = engine.header.max_batch
    with open_session(engine) as session:
        frames = [borrowed(session, picture) for _ in range(batch)]
        stages = {name: 1e3 * statistics.median(times) for name, times in session.profile(frames, OPTIONS).items()}
        engine_us = stages["engine"]
        latency = {
            "borrowed": median_us(lambda: session.detect(frames, OPTIONS)),
            "ordinary": median_us(lambda: session.detect([picture] * batch, OPTIONS)),
        }
        if device.library == "cupy":
            import cupy

            on_device = [cupy.asarray(picture) for _ in range(batch)]
            latency["device"] = median_us(lambda: session.detect(on_device, OPTIONS))
        found = session.detect(frames, OPTIONS)
        session.batches_in_flight = MOST_UNDER_WAY
        batches = [[borrowed(session, picture) for _ in range(batch)] for _ in range(MOST_UNDER_WAY)]
        by_lanes = {count: throughput(session, batches[:count], seconds) for count in range(1, MOST_UNDER_WAY + 1)}
        pipelined = by_lanes[LANES]
        without_upload = throughput(session, [on_device] * LANES, seconds) if device.library == "cupy" else None
        plain = plain_script(engine, picture, found[0].class_id) if batch == 1 else None
    kernels_us = sum(stages.get(name, 0.0) for name in ("letterbox", "yololayer", "nms"))
    overhead_us = latency["borrowed"] - engine_us - stages["upload"]
    budgets = {
        f"throughput at least {THROUGHPUT:.0%} of the engine alone": pipelined["fps"]
        >= THROUGHPUT * batch / engine_us * 1e6,
        f"thread at most {THREAD_US:g} us a frame": pipelined["thread_us"] <= THREAD_US,
    }
    if batch == 1:
        budgets[f"letterbox + YoloLayer + NMS at most {KERNELS_US:g} us"] = kernels_us <= KERNELS_US
        budgets[f"latency at most engine + upload + {OVERHEAD_US:g} us"] = overhead_us <= OVERHEAD_US
        assert plain is not None
        budgets[f"at least {AGAINST_PLAIN:g} x the plain script"] = pipelined["fps"] >= AGAINST_PLAIN * plain["fps"]
    height, width = engine.header.imgsz
    return {
        "engine": f"{engine.header.precision}, batch {batch}, {height}x{width}, {engine.header.yololayer}",
        "version": engine.header.backend_version,
        "batch": batch,
        "boxes": len(found[0]),
        "stages_us": stages,
        "floors_us": floors(engine, batch, rates),
        "latency_us": latency,
        "kernels_us": kernels_us,
        "overhead_us": overhead_us,
        "engine_fps": batch / engine_us * 1e6,
        "pipelined": pipelined,
        "pipelined_by_lanes": by_lanes,
        "pipelined_on_device": without_upload,
        "plain": plain,
        "budgets": budgets,
    }


def floors(engine: EngineFile, batch: int, rates: dict[str, float]) -> dict[str, float]:
    """Bytes that must move / measured bandwidth, in microseconds."""
    header = engine.header
    size = {info.name: tensor_bytes(info, 1) for info in header.inputs + header.outputs}
    rows = sum(info.shape[2] * info.shape[3] * 3 for info in header.outputs if len(info.shape) == 4)
    heads = sum(size[info.name] for info in header.outputs)
    uploaded = FRAME[0] * FRAME[1] * 3 / 3  # every third row
    return {
        "upload": batch * uploaded / rates["upload"] / 1e3,
        "letterbox": batch * (uploaded + size[header.inputs[0].name]) / rates["device"] / 1e3,
        "yololayer": batch * (heads + rows * 24) / rates["device"] / 1e3,
        "nms": batch * rows * 24 / rates["device"] / 1e3,
    }


def bandwidths(device: GpuDevice) -> dict[str, float]:
    """GB/s of an upload of one frame, and of a copy inside the device (bytes read and written)."""
    stream = device.stream()
    size = FRAME[0] * FRAME[1] * 3
    host, target = device.page_locked(size), device.allocate(size)
    upload = event_us(device, stream, lambda: device.upload(target.address, host, stream))
    rates = {"upload": size / upload / 1e3}
    if device.library == "cupy":
        import cupy

        large, copy = cupy.zeros(1 << 28, np.uint8), cupy.zeros(1 << 28, np.uint8)
        runtime = cupy.cuda.runtime

        def enqueue() -> None:
            runtime.memcpyAsync(copy.data.ptr, large.data.ptr, large.nbytes, runtime.memcpyDeviceToDevice, stream.ptr)

        rates["device"] = 2 * large.nbytes / event_us(device, stream, enqueue) / 1e3
    else:
        rates["device"] = float("nan")
    return rates


def event_us(device: GpuDevice, stream: Any, enqueue: Callable[[], None], repeats: int = 50) -> float:
    """Median GPU time of something enqueued."""
    return 1e3 * statistics.median(device.milliseconds(enqueue, stream) for _ in range(repeats))


def borrowed(session: GpuSession, picture: np.ndarray) -> np.ndarray:
    """The picture in memory that the session lends."""
    frame = session.frame_buffer(*picture.shape[:2])
    frame[:] = picture
    return frame


def median_us(call: Callable[[], object], runs: int = 300) -> float:
    """Median wall time of a call that waits for its result."""
    times = []
    for run in range(-min(20, runs), runs):
        began = time.perf_counter()
        call()
        if run >= 0:
            times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def throughput(session: GpuSession, batches: Sequence[Sequence[Any]], seconds: float) -> dict[str, float]:
    """Frames a second with all batches under way, and what the thread that drives it computes for each frame."""
    batch, lanes = len(batches[0]), len(batches)
    waiting: deque[Any] = deque()

    def advance(number: int) -> None:
        waiting.append(session.submit(batches[number % lanes], OPTIONS))
        if len(waiting) == lanes:
            waiting.popleft().result()

    for number in range(20):
        advance(number)
    windows = [window(advance, seconds / WINDOWS) for _ in range(WINDOWS)]
    while waiting:
        waiting.popleft().result()
    rate, busy = (statistics.median(values) for values in zip(*windows, strict=True))
    return {"fps": rate * batch, "thread_us": busy / batch * 1e6, "thread_us_batch": busy * 1e6}


def window(advance: Callable[[int], None], seconds: float) -> tuple[float, float]:
    """Batches a second, and seconds that the thread computes for each."""
    count, began, busy = 0, time.perf_counter(), time.thread_time()
    while time.perf_counter() - began < seconds:
        advance(count)
        count += 1
    return count / (time.perf_counter() - began), (time.thread_time() - busy) / count


def plain_script(engine: EngineFile, picture: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """The same engine the way a tutorial runs it; its detections must be the same classes."""
    session = open_session(engine)
    header = engine.header
    model = header.model
    layer = YoloLayer(model.anchors, model.strides, len(model.names))
    height, width = header.imgsz

    def letterbox(image: np.ndarray) -> np.ndarray:
        ratio = min(height / image.shape[0], width / image.shape[1])
        scaled = round(image.shape[1] * ratio), round(image.shape[0] * ratio)
        image = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), scaled)
        top, left = (height - scaled[1]) // 2, (width - scaled[0]) // 2
        bottom, right = height - scaled[1] - top, width - scaled[0] - left
        image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(114, 114, 114))
        image = image.astype(np.float32) / 255.0
        return np.ascontiguousarray(np.expand_dims(image.transpose(2, 0, 1), 0))

    def once() -> np.ndarray:
        heads = session.run(letterbox(picture))
        return non_max_suppression(layer.full(heads)[0], OPTIONS).class_id

    found = once()
    if sorted(found) != sorted(expected):
        print(f"the plain script finds {sorted(found)}, not {sorted(expected)}", file=sys.stderr)
    milliseconds = median_us(once) / 1e3
    session.close()
    return {"ms": milliseconds, "fps": 1e3 / milliseconds}


def soak(engine: EngineFile, device: GpuDevice, picture: np.ndarray, frames: int) -> dict[str, Any]:
    """Memory over many frames, whose sizes, places and batch sizes vary."""
    batch = engine.header.max_batch
    low = engine.header.batch_range[0]
    rng = np.random.default_rng(0)
    pictures = [cv2.resize(picture, (w, h)) for h, w in ((1080, 1920), (720, 1280), (480, 640), (479, 853))]
    samples = []
    with open_session(engine) as session:
        waiting: deque[Any] = deque()
        done = 0
        while done < frames:
            count = int(rng.integers(low, batch + 1))
            chosen = [pictures[rng.integers(4)] for _ in range(count)]
            chosen = [borrowed(session, frame) if rng.random() < 0.3 else frame for frame in chosen]
            waiting.append(session.submit(chosen, OPTIONS))
            if len(waiting) == 3:
                waiting.popleft().result()
            done += count
            if len(samples) < 21 and done >= frames * len(samples) / 20:
                samples.append((done, resident_mib(), device.memory_info()[0] / 2**20))
        while waiting:
            waiting.popleft().result()
    settled = samples[len(samples) // 4 :]  # pools and graphs are made at the beginning
    growth = settled[-1][1] - settled[0][1]
    device_growth = settled[0][2] - settled[-1][2]
    print(
        f"\n{frames} frames: host memory {settled[0][1]:.0f} -> {settled[-1][1]:.0f} MiB, "
        f"device {device_growth:+.1f} MiB"
    )
    return {"soak": samples, "budgets": {"memory is flat": growth < 20 and device_growth <= 0}}


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


def pipelined_cases(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Throughput with other numbers of batches under way, and without the upload."""
    cases = {f"{count} under way": figures for count, figures in result["pipelined_by_lanes"].items()}
    if result["pipelined_on_device"]:
        cases["frames in device memory"] = result["pipelined_on_device"]
    return cases


def report(name: str, result: dict[str, Any]) -> None:
    """Print one engine's tables."""
    stages, floor = result["stages_us"], result["floors_us"]
    print(f"## {name}: {result['engine']}, TensorRT {result['version']}, {result['boxes']} boxes a frame\n")
    print("| stage | GPU time, us | floor (bytes / bandwidth), us |\n| --- | --- | --- |")
    for stage, value in stages.items():
        print(f"| {stage} | {value:.1f} | {floor[stage]:.1f} |" if stage in floor else f"| {stage} | {value:.1f} | |")
    print("\n| | |\n| --- | --- |")
    for place, value in result["latency_us"].items():
        print(f"| latency, {place} memory | {value:.0f} us |")
    print(f"| latency beyond engine and upload | {result['overhead_us']:.0f} us |")
    print(f"| engine alone | {result['engine_fps']:.0f} frames/s |")
    rate = result["pipelined"]["fps"]
    print(f"| pipelined | {rate:.0f} frames/s, {rate / result['engine_fps']:.1%} of the engine alone |")
    for case, figures in pipelined_cases(result).items():
        share = figures["fps"] / result["engine_fps"]
        print(f"| pipelined, {case} | {figures['fps']:.0f} frames/s, {share:.1%}, {figures['thread_us']:.1f} us |")
    print(f"| thread's CPU time | {result['pipelined']['thread_us']:.1f} us a frame |")
    if result["plain"]:
        plain = result["plain"]
        print(f"| plain script | {plain['fps']:.0f} frames/s, {plain['ms']:.2f} ms; ours {rate / plain['fps']:.1f} x |")
    for budget, passed in result["budgets"].items():
        print(f"| {budget} | {'met' if passed else '**missed**'} |")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
