"""The command line: ``python -m yolotrt``."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yolotrt
from yolotrt.errors import InputError, OutputError
from yolotrt.shell import make_output_robust, printable, run_command

if TYPE_CHECKING:
    from yolotrt.detector import Detector
    from yolotrt.engines.file import EngineHeader
    from yolotrt.media.frames import Span
    from yolotrt.media.run import Run, VideoReader

PROGRAM = "yolotrt"
DEFAULT_ENGINE = Path("yolotrt.engine")
DEFAULT_OUTPUT = Path("runs/detect")
DEFAULT_RAY_OUTPUT = Path("runs/ray")
DEFAULT_EVAL_OUTPUT = Path("runs/eval")
DEFAULT_BENCHMARK_OUTPUT = Path("runs/benchmark")
DEFAULT_SAMPLES = Path("samples")

LARGE_INPUT_BYTES = 500_000_000
"""About 100 pictures of 640x640: with YOLOv5x the first layer's output alone is nearly seven times as large."""

_log = logging.getLogger(__name__)

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit status: 0, 1 for failures, 2 for bad input.
    """
    make_output_robust()
    return run_command(PROGRAM, lambda: _run(argv), debug="--debug" in (sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str] | None) -> int:
    """Parse the arguments and run their command."""
    options = _parse(argv)
    _check_options_fit(options)
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.INFO if options.verbose else logging.WARNING,
        format=f"{PROGRAM}: %(message)s",
        stream=sys.stderr,
    )
    return int(options.command(options))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; sources may also stand after other options, as in ``-d --no-save bus.jpg``."""
    parser = make_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        parser.print_usage(sys.stderr)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = parser.parse_known_args(arguments[:end])
    wrong = [argument for argument in rest if argument.startswith("-")]
    rest += arguments[end + 1 :]  # after -- even a name that begins with a dash is a source
    takes_sources = options.command in {detect, benchmark}
    if wrong or (rest and not takes_sources):
        parser.reject(wrong or rest, takes_weights=options.command is serialize)
    if takes_sources:
        options.detect_sources.extend(rest)
    return options


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


class _Parser(argparse.ArgumentParser):
    """Answers a mistake with one line; a page of usage above it would hide what was wrong."""

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


def make_parser() -> _Parser:
    """All options, in the groups of the commands that they belong to."""
    parser = _Parser(
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
    building = parser.add_argument_group("building (-s)")
    _add_weights_option(_options_of((serialize, benchmark), building))
    _add_build_options(_options_of((serialize,), building))
    detecting = parser.add_argument_group("detecting (-d, --webcam; thresholds also --export-triton)")
    _add_threshold_options(_options_of((detect, webcam, export_triton), detecting))
    _add_detect_options(_options_of((detect, webcam), detecting))
    _add_file_options(_options_of((detect,), parser.add_argument_group("files (-d)")))
    _add_ray_options(_options_of((detect,), parser.add_argument_group("many machines (-d --ray)")))
    _add_triton_options(_options_of((export_triton,), parser.add_argument_group("serving (--export-triton)")))
    evaluating = parser.add_argument_group("evaluating (--eval, --benchmark --accuracy)")
    _add_data_options(_options_of((evaluate, benchmark), evaluating))
    _add_eval_options(_options_of((evaluate,), evaluating))
    _add_benchmark_options(_options_of((benchmark,), parser.add_argument_group("measuring speed (--benchmark)")))
    _add_run_options(_options_of((detect, webcam, evaluate, benchmark), parser.add_argument_group("all but -s")))
    parser.add_argument("--engine", type=Path, default=DEFAULT_ENGINE, metavar="FILE", help=ENGINE_HELP)
    return parser


Command = Callable[[argparse.Namespace], int]

_COMMANDS_OF_OPTION: dict[str, tuple[str, Any, Sequence[Command]]] = {}
"""By destination: the option, its default and the commands that it belongs to."""


def _options_of(commands: Sequence[Command], group: Any) -> Callable[..., None]:
    """A function like `group.add_argument` that notes whose option it is."""

    def add(*names: str, **properties: Any) -> None:
        action = group.add_argument(*names, **properties)
        _COMMANDS_OF_OPTION[action.dest] = names[0], action.default, commands

    return add


def _check_options_fit(options: argparse.Namespace) -> None:
    """An option of another command is a mistake: it would have no effect, and the user thinks it has."""
    for destination, (name, default, commands) in _COMMANDS_OF_OPTION.items():
        if options.command not in commands and getattr(options, destination) != default:
            used, own = (_COMMAND_NAMES[function] for function in (options.command, commands[0]))
            raise InputError(f"{name} belongs to {own} and has no effect on {used}: leave it out")


def _add_commands(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("commands (one of them)").add_mutually_exclusive_group(required=True)
    group.add_argument(
        "-s", "--serialize", dest="command", action="store_const", const=serialize, help="build an engine from weights"
    )
    group.add_argument(
        "-d",
        "--detect",
        dest="detect_sources",
        action=_SetCommand,
        command=detect,
        nargs="*",
        metavar="SOURCE",
        help="detect in pictures, videos, folders, globs, .txt lists, cameras, URLs (default: samples/)",
    )
    group.add_argument(
        "--webcam",
        dest="camera",
        action=_SetCommand,
        command=webcam,
        nargs="?",
        const="0",
        metavar="CAMERA",
        help="show what a camera sees: 0, /dev/video1, a URL, or a video that plays as a camera (default: 0)",
    )
    group.add_argument(
        "--eval",
        dest="eval_data",
        action=_SetCommand,
        command=evaluate,
        type=Path,
        metavar="DATA",
        help="measure accuracy with labelled pictures: a YOLO data.yaml, or a COCO json",
    )
    group.add_argument(
        "--benchmark",
        dest="detect_sources",
        action=_SetCommand,
        command=benchmark,
        nargs="*",
        metavar="SOURCE",
        help="measure speed with pictures (default: samples/)",
    )
    group.add_argument(
        "--export-triton",
        dest="triton_folder",
        action=_SetCommand,
        command=export_triton,
        type=Path,
        metavar="DIR",
        help="write a model repository for the Triton Inference Server",
    )
    group.add_argument(
        "--info",
        dest="info_file",
        action=_SetCommand,
        command=info,
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

    def __init__(self, *args: Any, command: Callable[[argparse.Namespace], int], **properties: Any) -> None:
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


def serialize(options: argparse.Namespace) -> int:
    """Build an engine file (-s)."""
    from yolotrt.assets import DEMO_WEIGHTS
    from yolotrt.engines.build import build_engine
    from yolotrt.files import atomic_write
    from yolotrt.weights import load_weights

    build_options = _build_options(options)
    if options.weights is None:
        options.weights = DEMO_WEIGHTS
        print(f"no --weights given: taking the demo model, road signs ({DEMO_WEIGHTS.name})")
    _check_build_outputs(options)
    began = time.perf_counter()
    weights = load_weights(options.weights)
    for conclusion in weights.metadata.inferred:
        print(printable(f"{options.weights}: inferred {conclusion}"))
    _warn_of_size(build_options.max_batch or 1, build_options.imgsz or weights.metadata.imgsz)
    replaced = " (replaced)" if options.engine.exists() else ""
    engine = build_engine(weights, options.engine, backend=options.backend, options=build_options)
    if options.raw_plan is not None:
        with atomic_write(options.raw_plan) as file:
            file.write(engine.plan)
    header = engine.header
    low, _, high = header.batch_range
    print(
        f"{printable(str(options.engine))}{replaced}: {len(header.model.names)} classes, "
        f"{header.imgsz[0]}x{header.imgsz[1]}, "
        f"batch {low if low == high else f'{low} to {high}'}, {header.precision}, "
        f"{header.backend} {header.backend_version}, {_gpu_details(header)}{header.plan_size / 1e6:.1f} MB, "
        f"{time.perf_counter() - began:.1f} s"
    )
    if header.precision == "int8":
        _print_int8(header)
    return 0


def _warn_of_size(batch: int, imgsz: tuple[int, int]) -> None:
    """Say before the build that it is a large one: TensorRT may work on it for long without a word."""
    size = batch * 3 * imgsz[0] * imgsz[1] * 4  # float32
    if size >= LARGE_INPUT_BYTES:
        _log.warning(
            "a batch of %d with %dx%d pixels is %.1f GB in float32, and layers take several times as much: "
            "building and running it may take long, or not fit into memory",
            batch,
            *imgsz,
            size / 1e9,
        )


def _gpu_details(header: EngineHeader) -> str:
    """What the build for a GPU found out, for the summary; empty for a CPU."""
    from yolotrt.engines.base import HOST
    from yolotrt.info import convolutions_in_words

    if header.yololayer == HOST:
        return ""
    found = "" if header.precision == "int8" else convolutions_in_words(header)
    return f"{found}{', ' if found else ''}YoloLayer as {header.yololayer}, "


def _print_int8(header: EngineHeader) -> None:
    """What the library made of an INT8 network, and where its scales come from."""
    from yolotrt.info import convolutions_in_words, int8_in_words

    kept, *others = int8_in_words(header)
    print(printable(f"{convolutions_in_words(header)}{kept and f'; {kept}'}"))
    for line in others:
        print(printable(line))


def _check_build_outputs(options: argparse.Namespace) -> None:
    """Fail before the build if an output cannot be written, or would replace another file of the same command."""
    from yolotrt.engines.file import require_plan_target

    used = {Path(options.weights).resolve(): "--weights"}
    targets = (("--engine", options.engine), ("--raw-plan", options.raw_plan), ("--timing-cache", options.timing_cache))
    for name, path in targets:
        if path is None:
            continue
        other = used.setdefault(path.resolve(), name)
        if other != name:
            raise OutputError(f"{name} and {other} are the same file {path}: choose another name")
        _check_writable(path)
    if options.raw_plan is not None:
        require_plan_target(options.raw_plan)


def _build_options(options: argparse.Namespace) -> Any:
    """The build's options from the command line's."""
    from yolotrt.engines.base import BuildOptions

    dynamic = (options.min_batch, options.opt_batch, options.max_batch)
    if options.batch is not None:
        if any(value is not None for value in dynamic):
            raise InputError("--batch makes a static batch: leave out --min-batch, --opt-batch and --max-batch")
        low = usual = high = options.batch
    else:
        if options.max_batch is None and any(value is not None for value in dynamic):
            raise InputError("--min-batch and --opt-batch belong to a dynamic batch: give --max-batch as well")
        low, high = (1 if value is None else value for value in (options.min_batch, options.max_batch))
        usual = options.opt_batch
    size = options.imgsz
    if size is not None and len(size) > 2:
        raise InputError(f"--imgsz takes one or two numbers, not {len(size)}")
    return BuildOptions(
        precision=options.precision,
        imgsz=None if size is None else (size[0], size[-1]),
        min_batch=low,
        max_batch=high,
        opt_batch=usual,
        workspace_mib=options.workspace,
        optimization_level=options.optimization_level,
        timing_cache=options.timing_cache,
        use_timing_cache=not options.no_timing_cache,
        hardware_compatible=options.hardware_compatible,
        version_compatible=options.version_compatible,
        yololayer=options.yololayer,
        int8=_int8_options(options),
    )


def _int8_options(options: argparse.Namespace) -> Any:
    """What the command line says about INT8."""
    from yolotrt.calibration.options import DEFAULT_METHOD, Int8Options

    given = {
        "--calib": options.calib,
        "--calib-method": options.calib_method,
        "--calib-table": options.calib_table,
        "--int8-keep": options.int8_keep,
        "--int8-report": options.int8_report,
        "--int8-labels": options.int8_labels,
    }
    unused = [name for name, value in given.items() if value is not None]
    if unused and options.precision != "int8":
        raise InputError(f"{unused[0]} has an effect on INT8 alone: add --precision int8 or leave it out")
    return Int8Options(
        calib=options.calib,
        method=options.calib_method or DEFAULT_METHOD,
        keep=tuple(options.int8_keep or ()),
        table=options.calib_table,
        report=options.int8_report,
        labels=options.int8_labels,
    )


def detect(options: argparse.Namespace) -> int:
    """Detect objects in pictures, videos and streams (-d)."""
    if options.ray is not None:
        return _detect_on_cluster(options)
    _refuse(options, _RAY_ONLY, "without --ray")
    from yolotrt.detector import Detector
    from yolotrt.media.run import Outputs, Run
    from yolotrt.media.sources import expand_sources

    sources = expand_sources(options.detect_sources or _default_sources())
    _check_detect_options(options)
    with Detector(options.engine, **_detector_options(options)) as detector:
        outputs = Outputs(save_media=not options.no_save, **_output_options(options))
        run = Run(
            detector,
            sources,
            outputs,
            span=_span(options),
            reader=_video_reader(options),
            reconnect_s=options.reconnect,
        )
        _add_views(run, detector, options, window=options.show)
        return run.execute()


_RAY_ONLY = ("concurrency", "gpus_per_worker", "annotate")
_NOT_WITH_RAY = (
    "save_txt", "save_conf", "save_crops", "save_json", "save_jsonl", "save_csv", "show", "serve", "no_save", "nvdec",
)  # fmt: skip


def _refuse(options: argparse.Namespace, destinations: Sequence[str], where: str) -> None:
    """Raise InputError for an option that has no effect."""
    for destination in destinations:
        name, default, _ = _COMMANDS_OF_OPTION[destination]
        if getattr(options, destination) != default:
            raise InputError(f"{name} has no effect {where}: leave it out")


def _detect_on_cluster(options: argparse.Namespace) -> int:
    """Detect on a Ray cluster (-d --ray)."""
    _refuse(options, _NOT_WITH_RAY, "with --ray, which writes Parquet files to --out")
    _check_engine(options)
    options.out = options.out or DEFAULT_RAY_OUTPUT
    from yolotrt.distributed.cluster import load_ray

    load_ray()  # first, so that its absence is said as such
    from yolotrt.distributed.run import DistributedRun, Settings
    from yolotrt.media.sources import is_url, source_name

    folder = source_name(options.out) if is_url(options.out) else str(options.out.absolute())
    if not is_url(options.out):
        _check_folder(options.out)
    detector = {key: value for key, value in _detector_options(options).items() if key != "threads"}
    settings = Settings(
        options.ray,
        folder,
        concurrency=options.concurrency,
        gpus_per_worker=options.gpus_per_worker,
        threads=options.threads,
        annotate=options.annotate,
        span=_span(options),
        detector=detector,
    )
    return DistributedRun(options.engine, options.detect_sources or _default_sources(), settings).execute()


def _video_reader(options: argparse.Namespace) -> VideoReader:
    """How video files are decoded."""
    if options.nvdec:
        from yolotrt.media.nvdec import read_video_on_gpu

        return read_video_on_gpu
    from yolotrt.media.video import read_video

    return read_video


def webcam(options: argparse.Namespace) -> int:
    """Show what a camera sees (--webcam)."""
    from yolotrt.detector import Detector
    from yolotrt.media.run import Outputs, Run
    from yolotrt.media.window import NO_DISPLAY_FOR_WEBCAM, has_display

    if options.serve is None and not has_display():
        raise OutputError(NO_DISPLAY_FOR_WEBCAM)
    _check_detect_options(options)
    with Detector(options.engine, **_detector_options(options)) as detector:
        # -d records; the demo shows, and writes what it is asked for
        outputs = Outputs(save_media=False, **_output_options(options))
        run = Run(detector, [options.camera], outputs, span=_span(options), reconnect_s=options.reconnect)
        _add_views(run, detector, options, window=options.show or options.serve is None)
        return run.execute()


def _detector_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the detector is to be opened with.

    Raises:
        InputError: if a threshold is out of range. The detector checks them as well, but by their names in Python.
    """
    from yolotrt.detector import MAX_DETECTIONS_LIMIT

    for name, value in (("--conf", options.conf), ("--iou", options.iou)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} {value:g} is out of range: choose a value from 0 to 1")
    if not 1 <= options.max_det <= MAX_DETECTIONS_LIMIT:
        raise InputError(f"--max-det {options.max_det} is out of range: choose 1 to {MAX_DETECTIONS_LIMIT}")
    return {
        "confidence": options.conf,
        "iou": options.iou,
        "max_detections": options.max_det,
        "classes": options.classes,
        "agnostic": options.agnostic_nms,
        "threads": options.threads,
    }


def _output_options(options: argparse.Namespace) -> dict[str, Any]:
    """What is to be written, beside pictures and videos."""
    return {
        "folder": options.out,
        "exist_ok": options.exist_ok,
        "save_txt": options.save_txt,
        "save_conf": options.save_conf,
        "save_crops": options.save_crops,
        "json": options.save_json,
        "jsonl": options.save_jsonl,
        "csv": options.save_csv,
    }


def _span(options: argparse.Namespace) -> Span:
    """Which frames of videos to take."""
    from yolotrt.media.frames import Span

    return Span(options.stride, options.start, options.end)


def _add_views(run: Run, detector: Detector, options: argparse.Namespace, *, window: bool) -> None:
    """A window and a page, as asked for."""
    if window:
        from yolotrt.media.window import NO_DISPLAY, NO_DISPLAY_FOR_WEBCAM, Window

        message = NO_DISPLAY if options.command is detect else NO_DISPLAY_FOR_WEBCAM
        run.add_view(Window(detector, options.out, no_display=message))
    if options.serve is not None:
        from yolotrt.media.serve import LivePage

        page = LivePage(options.serve, run.live.statuses if run.live is not None else list)
        print(f"live picture: {page.url} (Ctrl-C ends)", flush=True)
        run.add_view(page)


def _default_sources() -> list[Path]:
    """samples/ of the current folder, or else the pictures that come with the package."""
    from yolotrt.assets import sample_pictures

    folder = DEFAULT_SAMPLES if DEFAULT_SAMPLES.is_dir() else sample_pictures()
    print(f"no source given: taking the sample pictures ({printable(str(folder))})")
    return [folder]


def _check_detect_options(options: argparse.Namespace) -> None:
    """Fail before the work rather than after it."""
    from yolotrt.media.serve import parse_address
    from yolotrt.media.window import NO_DISPLAY, has_display

    options.out = options.out or DEFAULT_OUTPUT
    _check_engine(options)
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads} is out of range: choose at least 1")
    if options.save_conf and not options.save_txt:
        raise InputError("--save-conf adds to the files of --save-txt: give both")
    if options.show and not has_display():
        raise OutputError(NO_DISPLAY)
    if options.reconnect < 0:
        raise InputError(f"--reconnect {options.reconnect:g} is out of range: choose at least 0")
    _span(options)
    if options.serve is not None:
        parse_address(options.serve)
    _check_folder(options.out)
    for kind in ("json", "jsonl", "csv"):
        path = getattr(options, f"save_{kind}")
        if path is not None and path.suffix.lower() != f".{kind}":
            raise OutputError(f"--save-{kind} {path} is no .{kind} file: name one")
        _check_writable(path)


def _check_engine(options: argparse.Namespace) -> None:
    """Say how to get an engine where there is none."""
    if options.engine == DEFAULT_ENGINE and not options.engine.exists():
        raise InputError(
            f"there is no {options.engine} here: build one with python -m yolotrt -s [--weights FILE], or use --engine"
        )


def _check_folder(folder: Path) -> None:
    """Fail before the work if results cannot go into a folder."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write into {folder}: it is no folder: choose another --out")


def _check_writable(path: Path | None) -> None:
    """Fail before the work if a file cannot be written. None is none."""
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory: name a file")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: {folder} is not a writable folder: choose another place")


def evaluate(options: argparse.Namespace) -> int:
    """Measure an engine's accuracy (--eval)."""
    from yolotrt.engines.file import EngineFile
    from yolotrt.evaluation import report, text
    from yolotrt.evaluation.run import Data, compare_evaluations, evaluate_engine, require_packages
    from yolotrt.markdown import write_section
    from yolotrt.media.results import next_run_folder

    require_packages()
    _check_engine(options)
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit {options.limit} leaves no picture: choose at least 1")
    out = options.out or DEFAULT_EVAL_OUTPUT
    _check_folder(out)
    _check_writable(out / report.REPORT_FILE)
    _check_writable(options.markdown)
    data = Data(options.eval_data, options.images, options.split, options.limit)
    files = [EngineFile.load(path) for path in (options.engine, options.compare) if path is not None]
    first, *others = [evaluate_engine(file, data, threads=options.threads) for file in files]
    comparisons = [(other, compare_evaluations(first, other)) for other in others]
    for line in text.summary_lines(first):
        print(printable(line))
    for other, comparison in comparisons:
        for line in text.comparison_lines(first, other, comparison):
            print(printable(line))
    folder = out if options.exist_ok else next_run_folder(out)
    report.write_report(folder, first, next(iter(comparisons), None))
    if options.markdown is not None:
        write_section(options.markdown, "accuracy", text.to_markdown(first, next(iter(comparisons), None)))
    print(f"results: {printable(str(folder))}, report: {printable(str(folder / report.REPORT_FILE))}")
    return 0


def benchmark(options: argparse.Namespace) -> int:
    """Measure engines' speed (--benchmark)."""
    from yolotrt import benchmark as measuring
    from yolotrt.evaluation.run import Data, evaluate_engine, require_packages
    from yolotrt.markdown import write_section
    from yolotrt.media.results import next_run_folder

    if options.accuracy is not None:
        require_packages()
    out = options.out or DEFAULT_BENCHMARK_OUTPUT
    _check_folder(out)
    _check_writable(out / "benchmark.json")
    _check_writable(options.markdown)
    plan = measuring.Plan(tuple(options.batches), options.repeats, options.threads)
    paths = measuring.pictures_of(options.detect_sources or _default_sources())
    engines = _benchmark_engines(options)
    accuracies: list[float | None] = [None] * len(engines)
    if options.accuracy is not None:
        data = Data(options.accuracy, options.images, options.split, options.limit)
        accuracies = [evaluate_engine(engine, data, threads=plan.threads).metrics.map for engine in engines]
    rows = measuring.run(engines, paths, plan, accuracies)
    folder = out if options.exist_ok else next_run_folder(out)
    text = measuring.write_results(folder, rows, plan, len(paths))
    if options.markdown is not None:
        write_section(options.markdown, "benchmark", text)
    for line in text.splitlines():
        print(printable(line))
    print(f"results: {printable(str(folder))}")
    return 0


def _benchmark_engines(options: argparse.Namespace) -> list[Any]:
    """The engine file, or engines of the weights for all backends and precisions that are asked for."""
    from yolotrt.benchmark import engines_for
    from yolotrt.engines.build import find_backend
    from yolotrt.engines.file import EngineFile
    from yolotrt.weights import load_weights

    if options.weights is None:
        if options.precisions or options.backends:
            raise InputError("--precisions and --backends are of engines to build: give --weights, too")
        _check_engine(options)
        return [EngineFile.load(options.engine)]
    best = find_backend("auto")
    weights = load_weights(options.weights)
    precisions = options.precisions or [best.default_precision]
    return list(engines_for(weights, options.backends or [best.name], precisions, options.batches))


def export_triton(options: argparse.Namespace) -> int:
    """Write a model repository for the Triton Inference Server (--export-triton)."""
    from yolotrt.detector import nms_options
    from yolotrt.engines.file import EngineFile
    from yolotrt.triton.repository import ServingOptions, export_repository

    _check_engine(options)
    engine = EngineFile.load(options.engine)
    thresholds = {key: value for key, value in _detector_options(options).items() if key != "threads"}
    serving = ServingOptions(
        options.triton_name,
        nms_options(engine, **thresholds),
        python_engine=options.triton_python_engine,
        instances=options.triton_instances,
    )
    folder = export_repository(engine, options.triton_folder, serving)
    print(
        f"{printable(str(folder))}: model {serving.name}; how to serve it is in {printable(str(folder / 'README.md'))}"
    )
    return 0


def info(options: argparse.Namespace) -> int:
    """Describe a file (--info)."""
    from yolotrt.info import describe

    print(describe(Path(options.info_file)))
    return 0


_COMMAND_NAMES: dict[Callable[[argparse.Namespace], int], str] = {
    serialize: "-s",
    detect: "-d",
    webcam: "--webcam",
    evaluate: "--eval",
    benchmark: "--benchmark",
    export_triton: "--export-triton",
    info: "--info",
}
"""How each command is called."""
