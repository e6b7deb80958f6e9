"""Render road-sign pictures with exact boxes, and a video of a drive past signs.

Usage:
    python tools/demo_model/render.py samples --out samples            what samples/ holds, but its README
    python tools/demo_model/render.py calibration --out calib_images   the same of calib_images/
    python tools/demo_model/render.py evaluation --out DIR             the 200 pictures that figures are measured on
    python tools/demo_model/render.py dataset --out DIR --count N --seed S [--size WIDTH HEIGHT]
    python tools/demo_model/render.py video --out FILE.mp4 [--seed S]

The same command gives the same boxes everywhere and the same bytes with the same OpenCV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import datasets  # noqa: E402
from drive import render_drive  # noqa: E402
from scene import MAX_SIGNS  # noqa: E402

from yolotrt.errors import YolotrtError  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        print(f"{options.out}: {_COMMANDS[options.command](options)}")
    except YolotrtError as problem:
        print(f"render.py: error: {problem}", file=sys.stderr)
        return problem.exit_status
    return 0


def _samples(options: argparse.Namespace) -> str:
    return f"{len(datasets.SAMPLES)} pictures and a video, signs: {datasets.write_samples(options.out)}"


def _calibration(options: argparse.Namespace) -> str:
    return f"{datasets.write_calibration(options.out, options.workers)} pictures"


def _evaluation(options: argparse.Namespace) -> str:
    return _write(options, datasets.EVALUATION)


def _dataset(options: argparse.Namespace) -> str:
    size = (options.size[0], options.size[1])
    return _write(options, datasets.Recipe(options.seed, options.count, (size,), options.max_signs))


def _write(options: argparse.Namespace, recipe: datasets.Recipe) -> str:
    """Write a labelled set and say what is in it."""
    numbers = datasets.write_dataset(options.out, datasets.render_many(recipe, options.workers))
    return f"{recipe.count} pictures, {sum(numbers.values())} signs: {numbers}"


def _video(options: argparse.Namespace) -> str:
    count, codec = render_drive(options.out, options.seed)
    return f"{count} frames, {codec}"


_COMMANDS = {
    "samples": _samples,
    "calibration": _calibration,
    "evaluation": _evaluation,
    "dataset": _dataset,
    "video": _video,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Render road-sign pictures with exact boxes, or a video.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, required=True, help="folder to write; for a video, the MP4 file")
    pool = argparse.ArgumentParser(add_help=False, parents=[out])
    pool.add_argument("--workers", type=int, default=0, help="processes; 0: none besides this one")
    commands.add_parser("samples", parents=[out], help="the sample pictures, labels.json and drive.mp4")
    commands.add_parser("calibration", parents=[pool], help=f"{datasets.CALIBRATION.count} pictures for INT8")
    help_text = f"{datasets.EVALUATION.count} held-out pictures: images/, labels/, data.yaml and instances.json"
    commands.add_parser("evaluation", parents=[pool], help=help_text)
    dataset = commands.add_parser("dataset", parents=[pool], help="images/, labels/, data.yaml and instances.json")
    dataset.add_argument("--count", type=int, required=True, help="number of pictures")
    dataset.add_argument("--seed", type=int, default=0, help="pictures of different seeds differ")
    dataset.add_argument("--size", type=int, nargs=2, default=(640, 640), metavar=("WIDTH", "HEIGHT"), help="pixels")
    dataset.add_argument("--max-signs", type=int, default=MAX_SIGNS, help="0: sign-free pictures, distractors only")
    video = commands.add_parser("video", parents=[out], help="a drive past signs, 10 s, 1280 x 720, 30 frames a second")
    video.add_argument("--seed", type=int, default=datasets.DRIVE_SEED)
    return parser


if __name__ == "__main__":
    sys.exit(main())
