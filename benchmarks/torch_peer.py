"""PyTorch on the same GPU, as fast as it goes without a compiler: fp16, channels last, one CUDA graph, raw heads only.

    python benchmarks/torch_peer.py --size n --batch 1 16 --against gpu.json

Weights are random, which the time of a convolution does not depend on. `--against` names the file that
benchmarks/gpu_pipeline.py wrote in the same session: each engine of the same batch is put beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.demo_model.model import DetectionModel, yolov5n_yaml

SIZES = {"n": (0.33, 0.25), "s": (0.33, 0.50), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}
"""Depth and width multiple."""

WARM_UP, REPEATS = 20, 200


def main() -> None:
    """Measure and print one line a batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="n")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--against", type=Path, metavar="FILE")
    options = parser.parse_args()
    engines = json.loads(options.against.read_text(encoding="utf-8"))["results"] if options.against else []
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, yolov5{options.size}"
    )
    for batch in options.batch:
        milliseconds = graph_ms(model(options.size), batch, options.imgsz)
        print(f"batch {batch}: {milliseconds:.3f} ms, {batch / milliseconds * 1e3:.0f} pictures/s")
        for engine in engines:
            if engine.get("batch") == batch:
                ratio = milliseconds * 1e3 / engine["stages_us"]["engine"]
                print(f"  TensorRT, {engine['engine']}: {ratio:.2f} x as fast")


def model(size: str) -> torch.nn.Module:
    """The network in half precision with BatchNorm folded into the convolutions, as YOLOv5 runs it."""
    yaml = yolov5n_yaml(80)
    yaml["depth_multiple"], yaml["width_multiple"] = SIZES[size]
    network = DetectionModel(yaml, [""] * 80).eval()
    for module in network.modules():
        if hasattr(module, "bn"):
            module.conv = torch.nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = torch.nn.Identity()
    return network.half().cuda().to(memory_format=torch.channels_last)


@torch.inference_mode()
def graph_ms(network: torch.nn.Module, batch: int, imgsz: int) -> float:
    """Median milliseconds of a replay of the captured network."""
    torch.backends.cudnn.benchmark = True
    images = torch.rand(batch, 3, imgsz, imgsz, device="cuda").half().to(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # cuDNN chooses its algorithms
            network(images)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        network(images)
    times = []
    for run in range(WARM_UP + REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        if run >= WARM_UP:
            times.append(first.elapsed_time(last))
    return statistics.median(times)


if __name__ == "__main__":
    main()
