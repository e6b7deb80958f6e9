"""Time and memory of reading and writing weight files, each in a fresh process.

python benchmarks/weight_files.py --values 7250000
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from yolotrt.weights import Metadata, Weights, load_weights, save_weights

TENSORS = 60
MIB = 1 << 20


def main() -> None:
    """Write, then read each format several times; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=7_250_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read or options.write:
        measure(options)
        return
    print("| | seconds, best and worst | MiB at the peak over the imports |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".wts", ".safetensors"):
            path = Path(folder) / f"model{suffix}"
            for action in ("write", "read"):
                runs = [fresh_process(action, path, options.values) for _ in range(options.runs)]
                seconds, mib = [run[0] for run in runs], max(run[1] for run in runs)
                size = f"{path.stat().st_size / 1e6:.0f} MB"
                print(f"| {action} {suffix}, {size} | {min(seconds):.2f} to {max(seconds):.2f} | {mib:.0f} |")


def fresh_process(action: str, path: Path, values: int) -> tuple[float, float]:
    """Seconds and MiB of one action."""
    command = [sys.executable, __file__, f"--{action}", str(path), "--values", str(values)]
    seconds, mib = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(mib)


def measure(options: argparse.Namespace) -> None:
    """Do one action and print its seconds and MiB."""
    weights = random_weights(options.values) if options.write else None
    before = peak_mib()
    began = time.perf_counter()
    if weights is not None:
        save_weights(weights, options.write)
    else:
        load_weights(options.read)
    print(time.perf_counter() - began, peak_mib() - before)


def random_weights(values: int) -> Weights:
    """Equal tensors of random values."""
    rng = np.random.default_rng(0)
    tensors = {f"model.0.m.{i}.weight": rng.standard_normal(values // TENSORS, np.float32) for i in range(TENSORS)}
    return Weights(tensors, Metadata(yaml={"nc": 1}, names=("thing",)))


def peak_mib() -> float:
    """The process's largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


if __name__ == "__main__":
    main()
