"""Many clients of a Triton server with a repository of --export-triton: pictures a second, times, batches.

    python benchmarks/serving.py yolov5n.engine pictures/ --server 127.0.0.1 --clients 8 --seconds 60

Half of the clients ask over HTTP, half over gRPC, each as fast as it gets answers. Every answer is compared with the
detector's (boxes within 1e-3 pixels).
"""

from __future__ import annotations

import argparse
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

from yolotrt import Detections, Detector
from yolotrt.media.sources import expand_sources

TOLERANCE = 1e-3


class Client(threading.Thread):
    """Asks until the time is over."""

    def __init__(
        self, library: Any, address: str, model: str, cases: list[tuple[bytes, Detections]], end: float
    ) -> None:
        super().__init__()
        self._library, self._address, self._model, self._cases, self._end = library, address, model, cases, end
        self.seconds: list[float] = []
        self.failures: list[str] = []

    def run(self) -> None:
        """Ask and compare."""
        with self._library.InferenceServerClient(self._address) as client:
            while time.monotonic() < self._end:
                data, expected = self._cases[len(self.seconds) % len(self._cases)]
                began = time.monotonic()
                try:
                    image = self._library.InferInput("IMAGE", [1, 1], "BYTES")
                    image.set_data_from_numpy(np.array([[data]], dtype=object))
                    answer = client.infer(self._model, [image])
                    self._compare(answer, expected)
                except Exception as problem:  # noqa: BLE001 - counted
                    self.failures.append(f"{type(problem).__name__}: {problem}")
                self.seconds.append(time.monotonic() - began)

    def _compare(self, answer: Any, expected: Detections) -> None:
        count = int(answer.as_numpy("COUNT")[0, 0])
        boxes = answer.as_numpy("BOXES")[0, : max(count, 0)]
        if count != len(expected) or not np.allclose(boxes, expected.xyxy, atol=TOLERANCE):
            raise ValueError("the answer is not the detector's")


def counters(address: str, model: str) -> tuple[float, float]:
    """Pictures and batches of a model so far."""
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    names = (f'nv_inference_{name}{{model="{model}"' for name in ("count", "exec_count"))
    pictures, batches = (sum(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in names)
    return pictures, batches


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("pictures")
    parser.add_argument("--server", default="127.0.0.1")
    parser.add_argument("--ports", type=int, nargs=3, default=[8000, 8001, 8002], metavar=("HTTP", "GRPC", "METRICS"))
    parser.add_argument("--model", default="yolov5")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    http, grpc, metrics = (f"{options.server}:{port}" for port in options.ports)
    files = [path for path in expand_sources([options.pictures]) if isinstance(path, Path)]
    with Detector(options.engine) as detector:
        cases = [(path.read_bytes(), detector(path)) for path in files]
    before = counters(metrics, f"{options.model}_engine")
    end = time.monotonic() + options.seconds
    kinds = [(tritonclient.http, http), (tritonclient.grpc, grpc)]
    clients = [Client(*kinds[n % 2], options.model, cases[n:] + cases[:n], end) for n in range(options.clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    pictures, batches = np.subtract(counters(metrics, f"{options.model}_engine"), before)
    times = np.concatenate([client.seconds for client in clients]) * 1e3
    failures = [failure for client in clients for failure in client.failures]
    print(f"{len(times)} requests, {len(failures)} failed{': ' + failures[0] if failures else ''}")
    print(f"{len(times) / options.seconds:.1f} pictures/s, p50 {np.percentile(times, 50):.0f} ms, ", end="")
    print(f"p99 {np.percentile(times, 99):.0f} ms; {pictures / batches:.2f} pictures a batch of the engine")


if __name__ == "__main__":
    main()
