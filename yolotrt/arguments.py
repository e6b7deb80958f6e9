"""What can be said on the command line, and what each option belongs to."""

from __future__ import annotations

import argparse
import difflib
import enum
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yolotrt
from yolotrt.errors import InputError
from yolotrt.shell import printable

PROGRAM = "yolotrt"
DEFAULT_ENGINE = Path("yolotrt.engine")


class Command(enum.Enum):
    """What is to be done; each value is the option that asks for it."""

    SERIALIZE = "-s"
    DETECT = "-d"
    WEBCAM = "--webcam"
    EVALUATE = "--eval"
    BENCHMARK = "--benchmark"
    EXPORT_TRITON = "--export-triton"
    INFO = "--info"


ENGINE_HELP = "engine file that -s writes and -d runs (default: %(default)s)"

USAGE = f"""{PROGRAM} -s [--weights FILE] [--engine FILE] [option ...]
       {PROGRAM} -d [SOURCE ...] [--engine FILE] [option ...]
       {PROGRAM} --webcam [CAMERA] [--serve PORT] [option ...]
       {PROGRAM} --eval DATA [--engine FILE] [option ...]
       {PROGRAM} --benchmark [SOURCE ...] [--engine FILE | --weights FILE] [option ...]
       {PROGRAM} --export-triton DIR [--engine FILE] [option ...]
       {PROGRAM} --info FILE"""

EPILOG = """examples:
  python gen_wts.py -w yolov5s.pt -o yolov5s.wts        convert a checkpoint
  python -m yolotrt -s --weights yolov5s.wts            build yolotrt.engine
  python -m yolotrt -d pictures/ --save-txt             detect; results go to runs/detect
  python -m yolotrt -d drive.mp4 --save-csv all.csv     annotate a video
  python -m yolotrt --webcam --serve 8000               a camera on a local page
  python -m yolotrt --eval data.yaml                    measure accuracy; see runs/eval
  python -m yolotrt --benchmark --batches 1 8           measure speed; see runs/benchmark
  python -m yolotrt --info yolotrt.engine               describe a file
"""


_ELSEWHERE = {
    "--conf-thres": "--conf",
    "--confidence": "--conf",
    "--iou-thres": "--iou",
    "--source": "-d SOURCE",
    "--data": "--eval DATA",
    "--project": "--out",
    "--view-img": "--show",
    "--half": "--precision fp16",
    "--fp16": "--precision fp16",
}
"""What options of YOLOv5's own commands, and other usual names, are called here."""


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line; a page of usage above it would hide what was wrong."""

    def __init__(self, **properties: Any) -> None:
        super().__init__(**properties)
        self._owners: dict[str, tuple[str, Any, Sequence[Command]]] = {}  # option, default, commands; by destination
        self._titled: dict[str, Any] = {}

    def options_of(self, title: str, *commands: Command) -> Callable[..., None]:
        """A function like `add_argument` for the options of some commands, which the help lists under `title`."""
        group = self._titled.get(title) or self._titled.setdefault(title, self.add_argument_group(title))

        def add(*names: str, **properties: Any) -> None:
            action = group.add_argument(*names, **properties)
            self._owners[action.dest] = names[0], action.default, commands

        return add

    def check_options_fit(self, options: argparse.Namespace) -> None:
        """Raise InputError for an option of another command: it would have no effect, and the user thinks it has."""
        for destination, (name, default, commands) in self._owners.items():
            if options.command not in commands and getattr(options, destination) != default:
                used, own = options.command.value, commands[0].value
                raise InputError(f"{name} belongs to {own} and has no effect on {used}: leave it out")

    def refuse(self, options: argparse.Namespace, destinations: Sequence[str], where: str) -> None:
        """Raise InputError if one of these options was given, which have no effect there."""
        for destination in destinations:
            name, default, _ = self._owners[destination]
            if getattr(options, destination) != default:
                raise InputError(f"{name} has no effect {where}: leave it out")

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{PROGRAM}: error: {printable(message)}: see python -m {PROGRAM} --help\n")

    def reject(self, arguments: Sequence[str], *, takes_weights: bool) -> NoReturn:
        """End because of arguments that no option takes, with what was probably meant."""
        name = arguments[0].partition("=")[0]
        similar = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.75)
        meant = _ELSEWHERE.get(name) or (similar[0] if similar else None)
        if name.startswith("--") and meant:
            hint = f" (did you mean {meant}?)"
        elif takes_weights and not arguments[0].startswith("-"):
            hint = " (a weight file is named with --weights)"
        else:
            hint = ""
        self.error(f"unrecognized arguments: {' '.join(arguments)}{hint}")


def make_parser() -> Parser:
    """All options, in the groups of the commands that they belong to."""
    parser = Parser(
        prog=PROGRAM,
        usage=USAGE,
        description="YOLOv5 on TensorRT; on ONNX Runtime where there is no GPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {yolotrt.__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and all log messages")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    _add_commands(parser)
    building = "building (-s)"
    _add_weights_option(parser.options_of(building, Command.SERIALIZE, Command.BENCHMARK))
    _add_build_options(parser.options_of(building, Command.SERIALIZE))
    detecting = "detecting (-d, --webcam; thresholds also --export-triton)"
    _add_threshold_options(parser.options_of(detecting, Command.DETECT, Command.WEBCAM, Command.EXPORT_TRITON))
    _add_detect_options(parser.options_of(detecting, Command.DETECT, Command.WEBCAM))
    _add_file_options(parser.options_of("files (-d)", Command.DETECT))
    _add_ray_options(parser.options_of("many machines (-d --ray)", Command.DETECT))
    _add_triton_options(parser.options_of("serving (--export-triton)", Command.EXPORT_TRITON))
    evaluating = "evaluating (--eval, --benchmark --accuracy)"
    _add_data_options(parser.options_of(evaluating, Command.EVALUATE, Command.BENCHMARK))
    _add_eval_options(parser.options_of(evaluating, Command.EVALUATE))
    _add_benchmark_options(parser.options_of("measuring speed (--benchmark)", Command.BENCHMARK))
    running = (Command.DETECT, Command.WEBCAM, Command.EVALUATE, Command.BENCHMARK)
    _add_run_options(parser.options_of("all but -s", *running))
    parser.add_argument("--engine", type=Path, default=DEFAULT_ENGINE, metavar="FILE", help=ENGINE_HELP)
    return parser


def _add_commands(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("commands (one of them)").add_mutually_exclusive_group(required=True)
    group.add_argument(
        "-s",
        "--serialize",
        dest="command",
        action="store_const",
        const=Command.SERIALIZE,
        help="build an engine from weights",
    )
    add = functools.partial(group.add_argument, action=_SetCommand)
    add(
        "-d",
        "--detect",
        dest="detect_sources",
        command=Command.DETECT,
        nargs="*",
        metavar="SOURCE",
        help="detect in pictures, videos, folders, globs, .txt lists, cameras, URLs (default: samples/)",
    )
    add(
        "--webcam",
        dest="camera",
        command=Command.WEBCAM,
        nargs="?",
        const="0",
        metavar="CAMERA",
        help="show what a camera sees: 0, /dev/video1, a URL, or a video that plays as a camera (default: 0)",
    )
    add(
        "--eval",
        dest="eval_data",
        command=Command.EVALUATE,
        type=Path,
        metavar="DATA",
        help="measure accuracy with labelled pictures: a YOLO data.yaml, or a COCO json",
    )
    add(
        "--benchmark",
        dest="detect_sources",
        command=Command.BENCHMARK,
        nargs="*",
        metavar="SOURCE",
        help="measure speed with pictures (default: samples/)",
    )
    add(
        "--export-triton",
        dest="triton_folder",
        command=Command.EXPORT_TRITON,
        type=Path,
        metavar="DIR",
        help="write a model repository for the Triton Inference Server",
    )
    add(
        "--info",
        dest="info_file",
        command=Command.INFO,
        metavar="FILE",
        help="describe a .pt, .wts, .safetensors or .engine file",
    )


def _add_triton_options(add: Callable[..., None]) -> None:
    add("--triton-name", default="yolov5", metavar="NAME", help="of the model that clients ask (default: %(default)s)")
    add(
        "--triton-python-engine",
        action="store_true",
        help="run the engine in a Python model: the server lacks a backend",
    )
    add(
        "--triton-instances",
        type=int,
        default=2,
        metavar="N",
        help="copies of each Python model (default: %(default)s)",
    )


class _SetCommand(argparse.Action):
    """Stores the option's values and chooses its command."""

    def __init__(self, *args: Any, command: Command, **properties: Any) -> None:
        super().__init__(*args, **properties)
        self._command = command

    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, _option: Any = None) -> None:
        namespace.command = self._command
        earlier = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, earlier + values if isinstance(earlier, list) else values)


def _add_weights_option(add: Callable[..., None]) -> None:
    add("--weights", metavar="FILE", help=".wts, .safetensors or .pt file (default: the demo model, road signs)")


def _add_build_options(add: Callable[..., None]) -> None:
    from yolotrt.engines.base import AUTO_YOLOLAYER, MAX_OPTIMIZATION_LEVEL, PRECISIONS, YOLOLAYERS
    from yolotrt.engines.build import AUTO, BACKENDS

    add(
        "--precision", choices=PRECISIONS, help="default: fp16 on a GPU, fp32 on a CPU; int8 takes calibration pictures"
    )
    add(
        "--imgsz",
        type=int,
        nargs="+",
        metavar="N",
        help="input size in pixels: N, or HEIGHT WIDTH (default: the model's)",
    )
    add("--batch", type=int, metavar="N", help="static batch size (default: 1)")
    add("--min-batch", type=int, metavar="N", help="smallest size of a dynamic batch (default: 1)")
    add("--opt-batch", type=int, metavar="N", help="the batch size to be fastest for (default: the largest)")
    add("--max-batch", type=int, metavar="N", help="largest size of a dynamic batch")
    add("--backend", choices=(AUTO, *BACKENDS), default=AUTO, help="default: the best one that runs here")
    add("--workspace", type=int, metavar="MIB", help="limit of TensorRT's scratch memory")
    add(
        "--optimization-level",
        type=int,
        choices=range(MAX_OPTIMIZATION_LEVEL + 1),
        help="how long TensorRT searches for fast kernels (default: TensorRT's, 3)",
    )
    add("--yololayer", choices=YOLOLAYERS, default=AUTO_YOLOLAYER, help="inside TensorRT's engine or right after it")
    add("--timing-cache", type=Path, metavar="FILE", help="TensorRT's measurements (default: in the user's cache)")
    add("--no-timing-cache", action="store_true", help="neither use nor keep TensorRT's measurements")
    add("--hardware-compatible", action="store_true", help="for all GPUs from compute capability 8.0 on (TensorRT)")
    add("--version-compatible", action="store_true", help="for later versions of TensorRT as well")
    add("--raw-plan", type=Path, metavar="FILE", help="write the bare plan (or ONNX model) as well")
    _add_int8_options(add)


def _add_int8_options(add: Callable[..., None]) -> None:
    from yolotrt.calibration.options import DEFAULT_METHOD, METHODS

    add("--calib", type=Path, metavar="DIR", help="pictures that show INT8 its ranges (default: calib_images/)")
    add("--calib-method", choices=METHODS, help=f"how INT8 chooses ranges (default: {DEFAULT_METHOD})")
    add("--calib-table", type=Path, metavar="FILE", help="INT8 scales: read if the file is there, else written")
    add(
        "--int8-keep",
        nargs="+",
        metavar="LAYER",
        help="layers that stay in high precision, such as model.9; auto: those that INT8 hurts most; none "
        "(default: auto, or none if --calib-table is read)",
    )
    add("--int8-report", type=Path, metavar="DIR", help="measure how much INT8 hurts each layer; table and plot")
    add(
        "--int8-labels",
        type=Path,
        metavar="DATA",
        help="data.yaml or COCO json: what INT8 costs in mAP50-95; auto keeps more until that is little",
    )


def _class(text: str) -> int | str:
    """A class index where the text is a number, else a name."""
    return int(text) if text.isdecimal() else text


def _add_threshold_options(add: Callable[..., None]) -> None:
    add("--conf", type=float, default=0.25, metavar="C", help="least confidence, 0 to 1 (default: %(default)s)")
    add(
        "--iou",
        type=float,
        default=0.45,
        metavar="I",
        help="overlap of boxes above which NMS drops one, 0 to 1 (default: %(default)s)",
    )
    add("--max-det", type=int, default=300, metavar="N", help="detections a picture (default: %(default)s)")
    add("--classes", type=_class, nargs="+", metavar="CLASS", help="only these classes: names or indices")
    add("--agnostic-nms", action="store_true", help="boxes of different classes suppress each other")


def _add_detect_options(add: Callable[..., None]) -> None:
    from yolotrt.media.frames import RECONNECT_S

    add("--save-txt", action="store_true", help="write YOLO labels: class x y w h, normalised")
    add("--save-conf", action="store_true", help="add the confidence to --save-txt")
    add("--save-crops", action="store_true", help="write what is inside each box as a picture")
    add("--save-json", type=Path, metavar="FILE", help="write all detections to one JSON file")
    add("--save-jsonl", type=Path, metavar="FILE", help="write a line of JSON a picture or frame, while it runs")
    add("--save-csv", type=Path, metavar="FILE", help="write a line a detection, while it runs")
    add("--show", action="store_true", help="a window; keys: q quit, s snapshot, space pause, +/- confidence")
    add("--serve", metavar="[HOST:]PORT", help="a page with the live picture (default host: 127.0.0.1)")
    add("--stride", type=int, default=1, metavar="N", help="take every n-th frame")
    add("--end", type=_time, metavar="TIME", help="stop at this time: seconds, or [H:]M:S")
    add(
        "--reconnect",
        type=float,
        default=RECONNECT_S,
        metavar="S",
        help="how long a lost camera or stream is tried again, in seconds (default: %(default)g)",
    )


def _add_file_options(add: Callable[..., None]) -> None:
    add("--no-save", action="store_true", help="write no pictures and videos")
    add("--start", type=_time, default=0.0, metavar="TIME", help="begin videos at this time")
    add("--nvdec", action="store_true", help="decode videos on the GPU (needs PyNvVideoCodec and CuPy)")


_RAY_ONLY = ("concurrency", "gpus_per_worker", "annotate")
_NOT_WITH_RAY = (
    "save_txt", "save_conf", "save_crops", "save_json", "save_jsonl", "save_csv", "show", "serve", "no_save", "nvdec",
)  # fmt: skip


def _add_ray_options(add: Callable[..., None]) -> None:
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="on a Ray cluster: local (this machine), auto or HOST:PORT; Parquet files go to --out (default: runs/ray)",
    )
    add("--concurrency", type=int, metavar="N", help="workers, each with an engine (default: all GPUs, or CPUs)")
    add("--gpus-per-worker", type=float, metavar="G", help="0.5 lets two workers share a GPU (default: 1)")
    add("--annotate", action="store_true", help="workers write annotated pictures to --out, which all must reach")


def _add_data_options(add: Callable[..., None]) -> None:
    add("--images", type=Path, metavar="DIR", help="pictures of a COCO json (default: its folder, or images/ in it)")
    add("--split", choices=("val", "test", "train"), default="val", help="of a data.yaml (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N pictures")
    add("--markdown", type=Path, metavar="FILE", help="write the tables into a section of this file, too")


def _add_eval_options(add: Callable[..., None]) -> None:
    add("--compare", type=Path, metavar="FILE", help="a second engine: is its difference more than chance?")


def _add_benchmark_options(add: Callable[..., None]) -> None:
    from yolotrt.engines.base import PRECISIONS
    from yolotrt.engines.build import BACKENDS

    add("--batches", type=int, nargs="+", default=[1], metavar="N", help="batch sizes (default: 1)")
    add("--precisions", nargs="+", choices=PRECISIONS, metavar="P", help="with --weights: engines to build")
    add("--backends", nargs="+", choices=tuple(BACKENDS), metavar="B", help="with --weights: engines to build")
    add("--repeats", type=int, default=100, metavar="N", help="measured batches of each (default: %(default)s)")
    add("--accuracy", type=Path, metavar="DATA", help="measure accuracy as well, as --eval DATA does")


def _add_run_options(add: Callable[..., None]) -> None:
    add("--threads", type=int, metavar="N", help="CPU threads of ONNX Runtime (default: all cores)")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="results folder; a number is added if it exists (default: runs/detect, runs/eval or runs/benchmark)",
    )
    add("--exist-ok", action="store_true", help="write into an existing --out, replacing results there")


def _time(text: str) -> float:
    """Seconds of ``90``, ``1:30`` or ``0:01:30.5``."""
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or not all(0 <= part < float("inf") for part in parts):
        raise argparse.ArgumentTypeError(f"invalid time value: {text!r}: give seconds, or [H:]M:S")
    return float(sum(part * 60**power for power, part in enumerate(reversed(parts))))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; sources may also stand after other options, as in ``-d --no-save bus.jpg``.

    Raises:
        InputError: if an option has no effect on the command. Other mistakes end the process with status 2.
    """
    parser = make_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        parser.print_usage(sys.stderr)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = parser.parse_known_args(arguments[:end])
    wrong = [argument for argument in rest if argument.startswith("-")]
    rest += arguments[end + 1 :]  # after -- even a name that begins with a dash is a source
    takes_sources = options.command in {Command.DETECT, Command.BENCHMARK}
    if wrong or (rest and not takes_sources):
        parser.reject(wrong or rest, takes_weights=options.command is Command.SERIALIZE)
    if takes_sources:
        options.detect_sources.extend(rest)
    parser.check_options_fit(options)
    if options.command is Command.DETECT and options.ray is None:
        parser.refuse(options, _RAY_ONLY, "without --ray")
    elif options.command is Command.DETECT:
        parser.refuse(options, _NOT_WITH_RAY, "with --ray, which writes Parquet files to --out")
    return options
