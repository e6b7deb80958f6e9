"""The command `gen_wts.py`: a YOLOv5 checkpoint in, a .wts or .safetensors file out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from yolotrt.errors import InputError
from yolotrt.shell import make_output_robust, print_beside_progress, printable, run_command
from yolotrt.weights.model import Weights

PROGRAM: Final = "yolotrt-gen-wts"

_TASKS: Final = {
    "detect": "detect",
    "seg": "segment",
    "segment": "segment",
    "cls": "classify",
    "classify": "classify",
}
"""The task by the names that tensorrtx's gen_wts.py and this project have for it."""
_STATISTICS: Final = (".running_mean", ".running_var", ".anchors", ".anchor_grid")
"""Ends of the names of buffers: arrays that are stored but not trained."""


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a checkpoint as the command line says.

    Args:
        argv: The arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 2 for bad input, 1 for other failures.
    """
    make_output_robust()
    options = _parser().parse_args(argv)

    def convert() -> int:
        print(printable(_convert(options)))
        return 0

    return run_command(PROGRAM, convert, debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM, description="Convert a YOLOv5 checkpoint (.pt) to .wts or .safetensors. Nothing in it is executed."
    )
    parser.add_argument(
        "-w",
        "--weights",
        required=True,
        type=Path,
        metavar="PT",
        help="the checkpoint; an official one, such as yolov5s.pt, is downloaded if it is not there",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the .wts or .safetensors file to write; by default the checkpoint's name with .wts, in this folder",
    )
    parser.add_argument("-t", "--type", choices=_TASKS, help="the task that the checkpoint must have")
    parser.add_argument("--half", action="store_true", help="store float16 (.safetensors only)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _convert(options: argparse.Namespace) -> str:
    """Convert the checkpoint.

    Returns:
        What was done, in one line.

    Raises:
        YolotrtError: if it cannot be read or written, or has another task than `-t` says.
    """
    from yolotrt.weights import save_weights
    from yolotrt.weights.checkpoint import read_checkpoint

    start = time.perf_counter()
    output = _output_path(options)
    weights = read_checkpoint(_locate(options.weights))
    task = weights.metadata.task
    if options.type and _TASKS[options.type] != task:
        raise InputError(f"{options.weights} is a model for the task {task}, not {options.type}: leave out -t")
    for note in weights.metadata.inferred:
        print_beside_progress(f"{PROGRAM}: note: {note}")
    save_weights(weights, output, half=options.half)
    return f"{_summary(weights)} -> {output} in {time.perf_counter() - start:.1f} s"


def _output_path(options: argparse.Namespace) -> Path:
    """Where to write; checked before the work, as a large checkpoint takes a while.

    Raises:
        InputError: if no such file can be written in the way that is asked for.
    """
    output: Path = options.output or Path(f"{options.weights.stem}.wts")
    if output.suffix.lower() not in (".wts", ".safetensors"):
        raise InputError(f"output {output} has an unknown format: name a .wts or .safetensors file")
    if options.half and output.suffix.lower() == ".wts":
        raise InputError(f"--half does not go with {output}: .wts holds float32 only; name a .safetensors file")
    return output


def _locate(path: Path) -> Path:
    """The checkpoint's path; an official one that is not there is downloaded to it."""
    from yolotrt.weights.official import OFFICIAL_NAMES, fetch_official

    if path.name in OFFICIAL_NAMES and not path.exists():
        return fetch_official(path.name, path.parent)
    return path


def _summary(weights: Weights) -> str:
    """The model in a few words."""
    metadata = weights.metadata
    parameters = sum(array.size for name, array in weights.tensors.items() if not name.endswith(_STATISTICS))
    parts = [
        metadata.task,
        f"{metadata.class_count} classes",
        f"{parameters:,} parameters",
        f"{metadata.imgsz[0]}x{metadata.imgsz[1]}",
    ]
    if metadata.anchors:
        parts.append(f"{len(metadata.anchors[0])} anchors on each of {len(metadata.strides)} levels")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
