"""Engines of one network in several precisions on a GPU, in turn: which is faster, and layer by layer why.

    python benchmarks/int8_gpu.py s-fp16-b32.engine s-int8-b32.engine --layers layers.json

Only the engines run, at their largest batch, on random pictures, as CUDA graphs; medians of turns. Layers are timed by
TensorRT's profiler, one after the other, so that their sum is more than the engine's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolotrt.cuda.device import GpuDevice, find_device
from yolotrt.engines.file import EngineFile
from yolotrt.engines.gpu_engine import EngineStream
from yolotrt.engines.tensorrt import tensorrt_module
from yolotrt.engines.trt_engine import TrtEngine, shared_engine

REPEATS_A_TURN = 10
PROFILED_RUNS = 20
LONGEST = 12
"""Layers that are printed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--layers", type=Path, help="write every layer's time, types and kernel")
    options = parser.parse_args(arguments)
    trt, device = tensorrt_module(), find_device()
    with device.current():
        runs = [Run(trt, EngineFile.load(path), device) for path in options.engines]
        for _ in range(options.turns):
            for run in runs:
                run.take_turn()
        print(f"{device.name}, TensorRT {trt.__version__}, medians of {options.turns * REPEATS_A_TURN} in turn\n")
        print("| engine | batch | ms a batch | pictures/s | to the first |\n| --- | --- | --- | --- | --- |")
        for path, run in zip(options.engines, runs, strict=True):
            rate = run.batch / run.milliseconds * 1e3
            ratio = rate / (runs[0].batch / runs[0].milliseconds * 1e3)
            print(f"| {path.stem} | {run.batch} | {run.milliseconds:.3f} | {rate:.0f} | {ratio:.2f} |")
        layers = {path.stem: run.layers() for path, run in zip(options.engines, runs, strict=True)}
    for name, rows in layers.items():
        print_layers(name, rows)
    if options.layers:
        options.layers.write_text(json.dumps(layers, indent=1), encoding="utf-8")


class Run:
    """An engine with its input filled."""

    def __init__(self, trt: Any, engine: EngineFile, device: GpuDevice) -> None:
        self._trt = trt
        self._device = device
        self._engine: TrtEngine = shared_engine(trt, engine, device)
        self._run = EngineStream(self._engine)
        self.batch = engine.header.max_batch
        (pictures,) = engine.header.inputs
        shape = self.batch, *pictures.shape[1:]
        values = np.random.default_rng(0).random(shape, np.float32).astype(pictures.dtype)
        device.upload(self._run.tensors[pictures.name].address, values, self._run.stream)
        self._run.enqueue(self.batch)
        device.synchronize(self._run.stream)
        self._graph = self._run.captured(lambda: self._run.enqueue(self.batch))
        self._times: list[float] = []

    @property
    def milliseconds(self) -> float:
        """Median time of a batch."""
        return statistics.median(self._times)

    def take_turn(self) -> None:
        """Time the engine several times; the first time does not count, since others had the caches."""
        stream = self._run.stream
        _, *times = (
            self._device.milliseconds(lambda: self._graph.launch(stream), stream) for _ in range(1 + REPEATS_A_TURN)
        )
        self._times += times

    def layers(self) -> list[dict[str, Any]]:
        """Each layer's median time and what the engine inspector says of it."""
        times: dict[str, list[float]] = defaultdict(list)

        class Profiler(self._trt.IProfiler):  # type: ignore[misc, name-defined]
            def report_layer_time(self, name: str, milliseconds: float) -> None:
                times[name].append(milliseconds)

        context = self._run.new_context(self.batch)
        context.profiler = profiler = Profiler()
        for _ in range(PROFILED_RUNS):
            context.execute_async_v3(self._device.handle(self._run.stream))
            self._device.synchronize(self._run.stream)
        described = {layer.get("Name"): layer for layer in self._engine.layers(context)}
        del context, profiler
        return [describe(name, statistics.median(taken), described.get(name, {})) for name, taken in times.items()]


def describe(name: str, milliseconds: float, layer: dict[str, Any]) -> dict[str, Any]:
    """What is worth knowing of a layer."""

    def formats(end: str) -> list[str]:
        return [f"{tensor.get('Dimensions')} {tensor.get('Format/Datatype', '')}" for tensor in layer.get(end, [])]

    return {
        "name": name,
        "ms": milliseconds,
        "type": layer.get("LayerType", ""),
        "kernel": layer.get("TacticName", ""),
        "inputs": formats("Inputs"),
        "outputs": formats("Outputs"),
    }


def print_layers(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Time by type of layer, and the longest layers."""
    totals: dict[str, tuple[int, float]] = {}
    for row in rows:
        count, total = totals.get(row["type"], (0, 0.0))
        totals[row["type"]] = count + 1, total + row["ms"]
    print(f"\n## {name}: {len(rows)} layers, {sum(row['ms'] for row in rows):.3f} ms one after the other\n")
    print("| type | layers | ms |\n| --- | --- | --- |")
    for kind, (count, total) in sorted(totals.items(), key=lambda item: -item[1][1]):
        print(f"| {kind} | {count} | {total:.3f} |")
    print("\n| longest layers | ms | in | out |\n| --- | --- | --- | --- |")
    for row in sorted(rows, key=lambda row: -row["ms"])[:LONGEST]:
        print(f"| {row['name'][:80]} | {row['ms']:.4f} | {row['inputs']} | {row['outputs']} |")


if __name__ == "__main__":
    sys.exit(main())
