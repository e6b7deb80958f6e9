"""The kernels on a real GPU: equal to the CPU reference, and how fast. Needs CuPy, NumPy and OpenCV only.

    python tests/gpu/kernels_check.py                                   # everything
    compute-sanitizer --tool memcheck  python tests/gpu/kernels_check.py --cases 20 --no-timing
    compute-sanitizer --tool racecheck python tests/gpu/kernels_check.py --cases 20 --no-timing --small

Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

from comparisons import (  # noqa: E402
    COCO_ANCHORS,
    COCO_STRIDES,
    copied_differences,
    crops_error,
    decode,
    decode_error,
    detect_masks,
    exact_overlap_case,
    expected_suppression,
    letterbox_case,
    letterbox_differences,
    mask_case,
    masks_of_found,
    nms_case,
    nms_rows,
    picture,
    random_heads,
    same_boxes,
    suppress,
    uploaded_letterbox_differences,
)

from yolotrt.cuda.device import CupyDevice  # noqa: E402
from yolotrt.cuda.kernels import (  # noqa: E402
    BEST_VALUES,
    CopyKernel,
    LetterboxKernel,
    MaskKernel,
    MaskLayout,
    NmsKernel,
    NmsLayout,
    UploadKernel,
    YoloLayerKernel,
    upload_bytes,
)
from yolotrt.postprocess import NmsOptions, YoloLayer  # noqa: E402

REPEATS = 20
"""Launches in one captured graph; its time is divided by them."""

SAMPLES = 200
LAST_PLACES = 8
"""CUDA's expf is within 2 units in the last place, NumPy's within 3, and roundings follow."""

MASK_TOLERANCE = 2e-5
"""Of values in 0..1: sums of up to 40 products of values around 1, in another order, and two exponentials."""

HEAD_SIZES = [(80, 80), (40, 40), (20, 20)]
ROWS = 25_200


@dataclass(frozen=True)
class Scale:
    """How large the cases are.

    Attributes:
        side: Of a network's input, in random cases of the letterbox; of one in four of them `large_side`.
        large_side: See `side`.
        frames: Heights and widths of certain frames for a network of 640 x 640.
        nms_rows: Rows in random cases of NMS.
        crowds: Rows above the confidence, boxes to keep, and whether they have few distinct corners.
        network: Height and width of the input of networks with masks.
    """

    side: int
    large_side: int
    frames: tuple[tuple[int, int], ...]
    nms_rows: int
    crowds: tuple[tuple[int, int, bool], ...]
    network: tuple[int, int]


USUAL = Scale(
    side=160,
    large_side=700,
    frames=((1080, 1920), (2160, 3840), (1280, 1280), (640, 640), (720, 1280), (479, 637), (4000, 1), (3, 4000)),
    nms_rows=3000,
    crowds=(
        (30_500, 300, False),
        (70_001, 300, True),
        (102_000, 300, False),
        (31_000, 100_000, True),
        (300_000, 300, False),
    ),
    network=(192, 320),
)
SMALL = Scale(side=40, large_side=80, frames=((48, 64),), nms_rows=700, crowds=((1100, 40, True),), network=(32, 64))
"""For racecheck, under which a kernel takes a thousand times as long."""


class CupyMachine:
    """A `comparisons.Machine` on a GPU."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.device = CupyDevice()

    def upload(self, array: np.ndarray):
        buffer = self.cupy.asarray(array, order="C")
        self.cupy.cuda.get_current_stream().synchronize()  # launches may follow on another stream
        return buffer

    def page_lock(self, array: np.ndarray) -> np.ndarray:
        buffer = self.device.page_locked(array.nbytes).view(array.dtype).reshape(array.shape)
        buffer[...] = array
        return buffer

    def address(self, buffer) -> int:
        return buffer.ctypes.data if isinstance(buffer, np.ndarray) else buffer.data.ptr

    def download(self, buffer) -> np.ndarray:
        if isinstance(buffer, np.ndarray):
            self.cupy.cuda.runtime.deviceSynchronize()
            return buffer
        return self.cupy.asnumpy(buffer)


class Report:
    """Prints one line a check and remembers failures."""

    def __init__(self) -> None:
        self.failed = False

    def check(self, name: str, wrong: int, total: int, note: str = "") -> None:
        self.failed |= wrong > 0
        print(f"{'FAIL' if wrong else 'ok  '} {name}: {wrong} of {total} cases differ {note}", flush=True)


def check_letterbox(machine: CupyMachine, report: Report, cases: int, scale: Scale) -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for case in range(cases):
        network, frame = letterbox_case(rng, scale.large_side if case % 4 == 0 else scale.side)
        frames = [picture(rng, *frame), picture(rng, *letterbox_case(rng, scale.side)[1])]
        wrong += letterbox_differences(machine, network, frames, half=bool(case % 2), padding=case % 70) > 0
    report.check("letterbox, random sizes", wrong, cases)
    wrong = sum(
        letterbox_differences(machine, (640, 640), [picture(rng, *size)], half=False) > 0 for size in scale.frames
    )
    report.check("letterbox, common and extreme frames at 640", wrong, len(scale.frames))


def check_upload(machine: CupyMachine, report: Report, cases: int, scale: Scale) -> None:
    rng = np.random.default_rng(6)
    wrong = 0
    for case in range(cases):
        network, frame = letterbox_case(rng, scale.large_side if case % 4 == 0 else scale.side)
        frames = [picture(rng, *frame), picture(rng, *letterbox_case(rng, scale.side)[1])]
        how = {"half": bool(case % 2), "gathered": bool(case // 2 % 2)}
        wrong += uploaded_letterbox_differences(machine, network, frames, **how) > 0
    report.check("upload from page-locked memory and letterbox, random sizes", wrong, cases)
    sizes = 16 * rng.integers(1, 20_000, max(cases // 10, 1))
    wrong = sum(copied_differences(machine, rng.integers(0, 256, size, np.uint8)) > 0 for size in sizes)
    report.check("copy from and to page-locked memory", wrong, len(sizes))


def check_yololayer(machine: CupyMachine, report: Report) -> None:
    rng = np.random.default_rng(1)
    wrong, total, worst = 0, 0, 0.0
    p6 = ((*COCO_ANCHORS, COCO_ANCHORS[2]), (8, 16, 32, 64), [(32, 48), (16, 24), (8, 12), (4, 6)])
    for anchors, strides, sizes in ((COCO_ANCHORS, COCO_STRIDES, [(12, 20), (6, 10), (3, 5)]), p6):
        for classes in (1, 2, 27, 80, 365):
            for half in (False, True):
                heads = random_heads(rng, sizes, 3, classes, 3, half=half)
                layer = YoloLayer(anchors, strides, classes)
                for variant in ("best", "full"):
                    actual = decode(machine, heads, layer, variant)
                    expected = getattr(layer, variant)([head.astype(np.float32) for head in heads])
                    error = decode_error(actual, expected)
                    classes_differ = variant == "best" and not np.array_equal(actual[..., 5], expected[..., 5])
                    wrong += bool(not error <= LAST_PLACES or classes_differ)
                    worst, total = max(worst, error), total + 1
    report.check("yololayer", wrong, total, f"(largest error {worst:.1f} units in the last place)")


def check_nms(machine: CupyMachine, report: Report, cases: int, scale: Scale) -> None:
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(cases):
        rows, options, classes = nms_case(rng, scale.nms_rows)
        results = suppress(machine, rows, options, classes=classes)
        wrong += not all(
            same_boxes(actual, expected_suppression(values, options))
            for actual, values in zip(results, rows, strict=True)
        )
    report.check("nms, random cases", wrong, cases)
    wrong = 0
    for _ in range(cases):
        rows, options = exact_overlap_case(rng)
        wrong += len(suppress(machine, rows, options, classes=1)[0]) != 2
    report.check("nms, overlaps of exactly the threshold", wrong, cases)
    wrong = 0
    for count, limit, crowded in scale.crowds:
        rows = nms_rows(rng, 2, count, classes=3, crowded=crowded)
        rows[..., 4] += 0.01
        options = NmsOptions(0.0, 0.45, limit)
        results = suppress(machine, rows, options, classes=3)
        again = suppress(machine, rows, options, classes=3)
        for actual, repeated, values in zip(results, again, rows, strict=True):
            wrong += not (same_boxes(actual, expected_suppression(values, options)) and same_boxes(actual, repeated))
    report.check("nms, crowds of rows above the confidence", wrong, 2 * len(scale.crowds))


def check_masks(machine: CupyMachine, report: Report, cases: int, scale: Scale) -> None:
    rng = np.random.default_rng(7)
    wrong, worst, total = 0, 0.0, max(cases // 10, 1)
    for case in range(total):
        classes, masks = int(rng.choice([1, 3, 80])), int(rng.choice([1, 8, 32, 40]))
        inputs = mask_case(rng, classes=classes, masks=masks, half=bool(case % 2), network=scale.network)
        options = NmsOptions(0.3, float(rng.choice([0.02, 0.45])), int(rng.choice([1, 20, 300])))
        found, crops = detect_masks(machine, *inputs, options, scale.network, whole_grids=options.max_detections)
        for boxes, actual in zip(masks_of_found(*inputs, found, scale.network), crops, strict=True):
            error = crops_error(actual or (), boxes.masks or ())
            wrong += bool(not error <= MASK_TOLERANCE)
            worst = max(worst, error)
    report.check("masks, random cases", wrong, 3 * total, f"(largest error {worst:.1e})")


def median_us(machine: CupyMachine, enqueue: Callable[[int, object], None]) -> float:
    """Median microseconds of one `enqueue(index, stream)` within a captured graph of many."""
    cupy = machine.cupy
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        enqueue(0, stream)  # loads the module outside the capture
        stream.synchronize()
        stream.begin_capture()
        for index in range(REPEATS):
            enqueue(index, stream)
        graph = stream.end_capture()
        times = []
        for _ in range(SAMPLES + 10):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) * 1000 / REPEATS)
    return float(np.median(times[10:]))


def bandwidth(machine: CupyMachine) -> float:
    """Measured bytes a microsecond of a device-to-device copy, both directions counted."""
    size = 1 << 29
    source, target = machine.cupy.zeros(size, np.uint8), machine.cupy.empty(size, np.uint8)

    def copy(_: int, stream: object) -> None:
        target.data.copy_from_device_async(source.data, size, stream)

    return 2 * size / median_us(machine, copy)


def show(name: str, time_us: float, floor_bytes: float, rate: float) -> None:
    print(f"{name:<52} {time_us:9.2f} us   floor {floor_bytes / rate:7.2f} us ({floor_bytes / 1e6:.2f} MB)", flush=True)


def time_letterbox(machine: CupyMachine, rate: float) -> None:
    rng = np.random.default_rng(3)
    frames = [machine.upload(picture(rng, 1080, 1920)) for _ in range(REPEATS)]  # 124 MB: more than the L2 cache
    for half in (True, False):
        kernel = LetterboxKernel(machine.device, (640, 640), half=half)
        plans = [machine.upload(kernel.plan((1080, 1920), machine.address(frame), 5760)) for frame in frames]
        outputs = [machine.upload(np.zeros((1, 3, 640, 640), np.float16 if half else np.float32)) for _ in frames]
        floor = 720 * 5760 + outputs[0].nbytes  # two of three rows are touched
        for name, spread in (("one frame, cached", 0), (f"{REPEATS} frames in turn", 1)):

            def launch(index: int, stream: object, kernel=kernel, plans=plans, outputs=outputs, spread=spread) -> None:
                slot = index * spread
                kernel.launch(machine.address(plans[slot]), machine.address(outputs[slot]), 1, stream)

            time_us = median_us(machine, launch)
            show(f"letterbox 1080p -> 640 {'fp16' if half else 'fp32'}, {name}", time_us, floor, rate)


def bus_rate(machine: CupyMachine) -> float:
    """Measured bytes a microsecond of a copy from page-locked host memory."""
    size = 1 << 26
    source, target = machine.page_lock(np.zeros(size, np.uint8)), machine.cupy.empty(size, np.uint8)

    def copy(_: int, stream: Any) -> None:  # MemoryPointer's own method refuses to be captured
        runtime = machine.cupy.cuda.runtime
        runtime.memcpyAsync(target.data.ptr, machine.address(source), size, runtime.memcpyHostToDevice, stream.ptr)

    return size / median_us(machine, copy)


def time_upload(machine: CupyMachine, rate: float) -> None:
    rng = np.random.default_rng(8)
    letterbox, upload, copy = (
        LetterboxKernel(machine.device, (640, 640), half=True),
        UploadKernel(machine.device),
        CopyKernel(machine.device),
    )
    for size in ((1080, 1920), (720, 1280)):
        needed = 3 * size[1] * letterbox.needed_rows(size).count
        frames = [machine.page_lock(picture(rng, *size)) for _ in range(REPEATS)]
        room = machine.upload(np.zeros(upload_bytes(needed), np.uint8))
        plans = [
            machine.upload(letterbox.upload_plan(size, machine.address(room), machine.address(frame), gathered=False))
            for frame in frames
        ]

        def launch(index: int, stream: object, plans=plans) -> None:
            upload.launch(machine.address(plans[index]), letterbox.plan_bytes, 1, stream)

        show(f"upload {size[0]}p -> 640", median_us(machine, launch), needed, rate)
    plan = machine.page_lock(np.zeros(letterbox.plan_bytes, np.uint8))
    target = machine.upload(plan)
    time_us = median_us(
        machine,
        lambda _, stream: copy.launch(machine.address(target), machine.address(plan), plan.nbytes, stream),
    )
    show("copy of one plan", time_us, plan.nbytes, rate)


def time_masks(machine: CupyMachine, rate: float) -> None:
    """What a session does: crops and cells go to page-locked memory."""
    rng = np.random.default_rng(9)
    layer, heads, prototypes = mask_case(rng, classes=80, masks=32, half=True, batch=1, network=(640, 640))
    buffers, planes = [machine.upload(head) for head in heads], machine.upload(prototypes)
    heads_at = [machine.address(buffer) for buffer in buffers]
    levels = machine.upload(MaskKernel.levels(heads_at, HEAD_SIZES))
    decoder = YoloLayerKernel(machine.device, COCO_ANCHORS, COCO_STRIDES, 80, "best", half=True, mask_count=32)
    rows = machine.upload(np.zeros((1, ROWS, BEST_VALUES), np.float32))
    decoder.launch(heads_at, HEAD_SIZES, 1, machine.address(rows))
    for count in (20, 300):
        nms = NmsLayout(1, ROWS, count)
        layout = MaskLayout(nms, layer.mask_count, (160, 160), (640, 640))
        kernel = MaskKernel(machine.device, layout, 3, 80, half=True)
        workspace, output, crops = (
            machine.upload(np.zeros(size, np.uint8))
            for size in (nms.workspace_bytes, nms.output_bytes, layout.crops_bytes)
        )
        host_crops, cells = (
            machine.page_lock(np.zeros(size, np.uint8)) for size in (layout.crops_bytes, layout.cells_bytes)
        )
        kept = machine.upload(np.zeros(count, np.int32))
        at = [machine.address(buffer) for buffer in (levels, planes, rows, kept, crops, host_crops, cells)]
        suppression = NmsKernel(machine.device, nms, NmsOptions(0.25, 0.45, count), keeps_rows=True)
        suppression.launch(at[2], machine.address(workspace), machine.address(output), kept_rows=at[3])
        (found,) = nms.detections(machine.download(output))  # which waits: the next launches are on another stream
        stages = {
            "crops": lambda stream, kernel=kernel, at=at: kernel.launch_crops(*at[2:6], stream),
            "cells": lambda stream, kernel=kernel, at=at: kernel.launch_cells(*at[:5], at[6], stream),
        }
        times = {
            name: median_us(machine, lambda _, stream, launch=launch: launch(stream)) for name, launch in stages.items()
        }
        masks = layout.crops(machine.download(host_crops), machine.download(cells), 0, len(found)) or ()
        written = 4 * sum(mask.values.size for mask in masks)
        for name, time_us in times.items():
            show(f"masks of {len(masks)} detections, {name}", time_us, written if name == "cells" else 0, rate)


def time_yololayer(machine: CupyMachine, rate: float) -> None:
    rng = np.random.default_rng(4)
    for batch in (1, 16):
        for half in (True, False):
            heads = [machine.upload(h) for h in random_heads(rng, HEAD_SIZES, 3, 80, batch, half=half)]
            for variant in ("best", "full"):
                kernel = YoloLayerKernel(machine.device, COCO_ANCHORS, COCO_STRIDES, 80, variant, half=half)
                output = machine.upload(np.zeros((batch, ROWS, kernel.row_values), np.float32))
                addresses = [machine.address(head) for head in heads]

                def launch(_: int, stream: object, kernel=kernel, addresses=addresses, output=output, n=batch) -> None:
                    kernel.launch(addresses, HEAD_SIZES, n, machine.address(output), stream)

                floor = sum(head.nbytes for head in heads) + output.nbytes
                name = f"yololayer 640, 80 classes, b{batch}, {'fp16' if half else 'fp32'} heads, {variant}"
                show(name, median_us(machine, launch), floor, rate)


def typical_rows(rng: np.random.Generator, batch: int) -> np.ndarray:
    """A picture of about 20 objects: 100 rows above the confidence, in clusters, 25,100 below."""
    rows = nms_rows(rng, batch, ROWS, classes=80, crowded=False)
    rows[..., 4] *= 0.2
    for picture_rows in rows:
        chosen = rng.choice(ROWS, 100, replace=False)
        objects = picture_rows[rng.choice(ROWS, 20)]
        picture_rows[chosen] = objects[rng.integers(0, 20, 100)]
        picture_rows[chosen, :4] += rng.normal(0, 2, (100, 4))
        picture_rows[chosen, 4] = rng.uniform(0.26, 0.95, 100)
    return rows


def clustered_rows(rng: np.random.Generator, count: int, clusters: int) -> np.ndarray:
    """Every row is a candidate, fewer than max_detections are kept, so that all 30,000 are compared with all kept."""
    rows = nms_rows(rng, 1, count, classes=1, crowded=False)
    corner = rng.integers(0, clusters, count)
    rows[0, :, 0], rows[0, :, 1] = corner % 16 * 40, corner // 16 * 40
    rows[0, :, :2] += rng.random((count, 2))
    rows[0, :, 2:4] = rows[0, :, :2] + 30
    rows[0, :, 4] = rng.uniform(0.3, 0.9, count)
    return rows


def time_nms(machine: CupyMachine, rate: float) -> None:
    rng = np.random.default_rng(5)
    cases = {
        "typical, 100 of 25,200 rows, b1": typical_rows(rng, 1),
        "typical, 100 of 25,200 rows, b16": typical_rows(rng, 16),
        "nothing above the confidence, b1": typical_rows(rng, 1) * np.float32([1, 1, 1, 1, 0, 1]),
        "5,000 candidates, random, b1": nms_rows(rng, 1, 5_000, classes=80, crowded=False) + np.float32(0.26),
        "30,000 candidates, 250 clusters, b1": clustered_rows(rng, 30_000, 250),
        "102,000 rows all above, 250 clusters, b1": clustered_rows(rng, 102_000, 250),
    }
    for name, rows in cases.items():
        layout = NmsLayout(rows.shape[0], rows.shape[1], 300)
        kernel = NmsKernel(machine.device, layout, NmsOptions())
        buffers = (rows, np.zeros(layout.workspace_bytes, np.uint8), np.zeros(layout.output_bytes, np.uint8))
        uploaded = [machine.upload(buffer) for buffer in buffers]

        def launch(_: int, stream: object, kernel=kernel, uploaded=uploaded) -> None:
            kernel.launch(*map(machine.address, uploaded), stream=stream)

        show(f"nms {name}", median_us(machine, launch), rows.nbytes, rate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="random cases of letterbox, upload and nms")
    parser.add_argument("--small", action="store_true", help="small pictures and few rows, for racecheck")
    parser.add_argument("--no-timing", action="store_true", help="compare only")
    options = parser.parse_args()

    machine = CupyMachine()
    if options.no_timing:
        machine.cupy.cuda.set_allocator(None)  # no memory pool, so that a memory checker knows every array's end
    name = machine.cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    driver = machine.cupy.cuda.runtime.driverGetVersion()
    print(f"{name}, compute capability {machine.device.capability}, driver's CUDA {driver}, NumPy {np.__version__}")
    report = Report()
    scale = SMALL if options.small else USUAL
    check_letterbox(machine, report, options.cases, scale)
    check_upload(machine, report, options.cases, scale)
    check_yololayer(machine, report)
    check_nms(machine, report, options.cases, scale)
    check_masks(machine, report, options.cases, scale)
    if not options.no_timing:
        rate = bandwidth(machine)
        print(f"medians of {SAMPLES} graphs of {REPEATS} launches; device copy {rate / 1e3:.0f} GB/s")
        time_letterbox(machine, rate)
        time_yololayer(machine, rate)
        time_nms(machine, rate)
        bus = bus_rate(machine)
        print(f"copy from page-locked memory {bus / 1e3:.0f} GB/s, which the floors of these are from")
        time_upload(machine, bus)
        time_masks(machine, bus)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
