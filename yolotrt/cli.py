"""The command line: ``python -m yolotrt``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yolotrt
from yolotrt.errors import InputError, OutputError, YolotrtError

if TYPE_CHECKING:
    from yolotrt.detections import Detections
    from yolotrt.detector import Detector, Image
    from yolotrt.media.results import ImageSink

PROGRAM = "yolotrt"
DEFAULT_ENGINE = Path("yolotrt.engine")
DEFAULT_OUTPUT = Path("runs/detect")
DEFAULT_SAMPLES = Path("samples")

EXIT_INTERRUPTED = 130
"""What shells give for a program that Ctrl-C ended."""

EPILOG = """examples:
  python gen_wts.py -w yolov5s.pt -o yolov5s.wts        convert a checkpoint
  python -m yolotrt -s --weights yolov5s.wts            build yolotrt.engine
  python -m yolotrt -d pictures/ --save-txt             detect; results go to runs/detect
  python -m yolotrt --info yolotrt.engine               describe a file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit status: 0, 1 for failures, 2 for bad input.
    """
    options = make_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.INFO if options.verbose else logging.WARNING,
        format=f"{PROGRAM}: %(message)s",
        stream=sys.stderr,
    )
    try:
        return int(options.command(options))
    except YolotrtError as error:
        if options.debug:
            raise
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        if options.debug:
            raise
        print(f"{PROGRAM}: error: out of memory: use a smaller --imgsz or --batch", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """All options, in the groups of the commands that they belong to."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="YOLOv5 on TensorRT; on ONNX Runtime where there is no GPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {yolotrt.__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and all log messages")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    _add_commands(parser)
    _add_build_options(parser.add_argument_group("building (-s)"))
    _add_detect_options(parser.add_argument_group("detecting (-d)"))
    parser.add_argument(
        "--engine", type=Path, default=DEFAULT_ENGINE, metavar="FILE", help="engine file (default: %(default)s)"
    )
    return parser


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
        help="detect in pictures: files, folders, globs, .txt lists (default: samples/)",
    )
    group.add_argument(
        "--info", dest="info_file", action=_SetCommand, command=info, metavar="FILE", help="describe a file"
    )


class _SetCommand(argparse.Action):
    """Stores the option's values and chooses its command."""

    def __init__(self, *args: Any, command: Callable[[argparse.Namespace], int], **properties: Any) -> None:
        super().__init__(*args, **properties)
        self._command = command

    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, _option: Any = None) -> None:
        namespace.command = self._command
        setattr(namespace, self.dest, values)


def _add_build_options(group: Any) -> None:
    from yolotrt.engines.base import PRECISIONS
    from yolotrt.engines.build import AUTO, BACKENDS

    group.add_argument("--weights", metavar="FILE", help=".wts, .safetensors or .pt")
    group.add_argument("--precision", choices=PRECISIONS, help="default: fp16 on a GPU, fp32 on a CPU")
    group.add_argument(
        "--imgsz",
        type=int,
        nargs="+",
        metavar="N",
        help="input size in pixels: N, or HEIGHT WIDTH (default: the model's)",
    )
    group.add_argument("--batch", type=int, metavar="N", help="static batch size (default: 1)")
    group.add_argument("--min-batch", type=int, metavar="N", help="smallest size of a dynamic batch")
    group.add_argument("--opt-batch", type=int, metavar="N", help="the batch size to be fastest for")
    group.add_argument("--max-batch", type=int, metavar="N", help="largest size of a dynamic batch")
    group.add_argument("--backend", choices=(AUTO, *BACKENDS), default=AUTO, help="default: the best one here")
    group.add_argument("--workspace", type=int, metavar="MIB", help="limit of TensorRT's scratch memory")
    group.add_argument("--raw-plan", type=Path, metavar="FILE", help="write the bare plan (or ONNX model) as well")


def _add_detect_options(group: Any) -> None:
    group.add_argument("--conf", type=float, default=0.25, metavar="C", help="lowest confidence (default: %(default)s)")
    group.add_argument("--iou", type=float, default=0.45, metavar="I", help="NMS overlap (default: %(default)s)")
    group.add_argument(
        "--max-det", type=int, default=300, metavar="N", help="detections a picture (default: %(default)s)"
    )
    group.add_argument("--classes", type=int, nargs="+", metavar="K", help="only these class indices")
    group.add_argument("--agnostic-nms", action="store_true", help="boxes of different classes suppress each other")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of ONNX Runtime (default: all cores)")
    group.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="DIR",
        help="results folder; a number is added if it exists (default: %(default)s)",
    )
    group.add_argument("--exist-ok", action="store_true", help="write into an existing --out, replacing results there")
    group.add_argument("--no-save", action="store_true", help="write no pictures")
    group.add_argument("--save-txt", action="store_true", help="write YOLO labels: class x y w h, normalised")
    group.add_argument("--save-conf", action="store_true", help="add the confidence to --save-txt")
    group.add_argument("--save-json", type=Path, metavar="FILE", help="write all detections to one JSON file")
    group.add_argument("--show", action="store_true", help="show each picture; any key goes on, q quits")


def serialize(options: argparse.Namespace) -> int:
    """Build an engine file (-s)."""
    from yolotrt.engines.build import build_engine
    from yolotrt.files import atomic_write
    from yolotrt.weights import load_weights

    if options.weights is None:
        raise InputError("no weights given: name a .wts, .safetensors or .pt file with --weights")
    build_options = _build_options(options)
    began = time.perf_counter()
    weights = load_weights(options.weights)
    for conclusion in weights.metadata.inferred:
        print(f"{options.weights}: inferred {conclusion}")
    engine = build_engine(weights, options.engine, backend=options.backend, options=build_options)
    if options.raw_plan is not None:
        with atomic_write(options.raw_plan) as file:
            file.write(engine.plan)
    header = engine.header
    low, _, high = header.batch_range
    print(
        f"{options.engine}: {len(header.model.names)} classes, {header.imgsz[0]}x{header.imgsz[1]}, "
        f"batch {low if low == high else f'{low} to {high}'}, {header.precision}, "
        f"{header.backend} {header.backend_version}, {header.plan_size / 1e6:.1f} MB, "
        f"{time.perf_counter() - began:.1f} s"
    )
    return 0


def _build_options(options: argparse.Namespace) -> Any:
    """The build's options from the command line's."""
    from yolotrt.engines.base import BuildOptions

    dynamic = (options.min_batch, options.opt_batch, options.max_batch)
    if options.batch is not None:
        if any(value is not None for value in dynamic):
            raise InputError("--batch makes a static batch: leave out --min-batch, --opt-batch and --max-batch")
        low = usual = high = options.batch
    else:
        low = options.min_batch or 1
        high = options.max_batch or max(low, options.opt_batch or 1)
        usual = options.opt_batch or high
    size = options.imgsz
    if size is not None and len(size) > 2:
        raise InputError(f"--imgsz takes one or two numbers, not {len(size)}")
    return BuildOptions(
        precision=options.precision,
        imgsz=None if size is None else (size[0], size[-1]),
        min_batch=low,
        opt_batch=usual,
        max_batch=high,
        workspace_mib=options.workspace,
    )


def detect(options: argparse.Namespace) -> int:
    """Detect objects in pictures (-d)."""
    from yolotrt.detector import Detector
    from yolotrt.media.sources import expand_sources

    paths = expand_sources(options.detect_sources or [DEFAULT_SAMPLES])
    _check_engine_exists(options.engine)
    _check_writable(options.save_json)
    with Detector(
        options.engine,
        confidence=options.conf,
        iou=options.iou,
        max_detections=options.max_det,
        classes=options.classes,
        agnostic=options.agnostic_nms,
        threads=options.threads,
    ) as detector:
        return _DetectRun(options, detector, paths).run()


class _DetectRun:
    """One run of ``-d``: pictures through a detector into files."""

    def __init__(self, options: argparse.Namespace, detector: Detector, paths: Sequence[Path]) -> None:
        self._options = options
        self._detector = detector
        self._paths = paths
        self._sink = self._make_sink()
        self._counts: Counter[str] = Counter()
        self._records: list[dict[str, Any]] = []
        self._failures: list[str] = []

    def run(self) -> int:
        """Process all pictures; returns the exit status."""
        from yolotrt.media.results import write_json

        began = time.perf_counter()
        try:
            for path, image, detections in self._results():
                self._deliver(path, image, detections)
        finally:  # what was found before a failure or Ctrl-C is kept
            if self._options.save_json is not None:
                write_json(self._options.save_json, self._records)
        self._summarise(time.perf_counter() - began)
        return 1 if self._failures else 0

    def _make_sink(self) -> ImageSink | None:
        """The folder that results go to; None if nothing is to be written there."""
        from yolotrt.media.results import ImageSink, next_run_folder

        options = self._options
        if options.no_save and not options.save_txt:
            return None
        folder = options.out if options.exist_ok else next_run_folder(options.out)
        return ImageSink(
            folder, save_images=not options.no_save, save_txt=options.save_txt, with_confidence=options.save_conf
        )

    def _results(self) -> Iterator[tuple[Path, Image, Detections]]:
        """Detections of every readable picture, in batches as large as the engine takes."""
        from tqdm import tqdm

        size = self._detector.engine.header.max_batch
        with tqdm(total=len(self._paths), unit="image", disable=None, file=sys.stderr, leave=False) as progress:
            for start in range(0, len(self._paths), size):
                batch = list(self._readable(self._paths[start : start + size]))
                if batch:
                    for (path, image), found in zip(batch, self._detector([i for _, i in batch]), strict=True):
                        yield path, image, found
                progress.update(min(size, len(self._paths) - start))

    def _readable(self, paths: Sequence[Path]) -> Iterator[tuple[Path, Image]]:
        """Pictures that can be read; the others are named and counted."""
        from yolotrt.media.images import read_image

        for path in paths:
            try:
                yield path, read_image(path)
            except YolotrtError as error:
                self._failures.append(str(error))
                _print_beside_progress(f"{PROGRAM}: error: {error}")

    def _deliver(self, path: Path, image: Image, detections: Detections) -> None:
        """Hand one picture's detections to all outputs."""
        from yolotrt.media.results import json_record

        self._counts.update(detections.counts())
        if self._options.save_json is not None:
            self._records.append(json_record(path, detections))
        if self._sink is not None:
            self._sink.write(path, image, detections)
        if self._options.show:
            _show(path, image, detections)

    def _summarise(self, seconds: float) -> None:
        """One line on what was found, one on how long it took."""
        timing = self._detector.timing
        found = ", ".join(f"{number} {name}" for name, number in self._counts.most_common()) or "nothing"
        print(f"{timing.pictures} of {len(self._paths)} pictures: {found}")
        if timing.pictures:
            print(
                f"each: pre {timing.preprocess_ms / timing.pictures:.1f} ms, "
                f"infer {timing.inference_ms / timing.pictures:.1f} ms, "
                f"post {timing.postprocess_ms / timing.pictures:.1f} ms "
                f"({timing.pictures / seconds:.1f} pictures/s with reading and writing)"
            )
        if self._sink is not None and timing.pictures:
            print(f"results: {self._sink.folder}")
        if self._failures:
            print(f"{PROGRAM}: {len(self._failures)} of {len(self._paths)} pictures failed", file=sys.stderr)


def _check_engine_exists(path: Path) -> None:
    if path == DEFAULT_ENGINE and not path.exists():
        raise InputError(
            f"there is no {path} here: build one with python -m yolotrt -s --weights FILE, or use --engine"
        )


def _check_writable(path: Path | None) -> None:
    """Fail before the work rather than after it."""
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory: name a file")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: {folder} is not a writable folder: choose another place")


def _show(path: Path, image: Image, detections: Detections) -> None:
    """Show a picture in a window and wait for a key."""
    import cv2

    from yolotrt.media.drawing import draw

    try:
        cv2.imshow(str(path), draw(image, detections))
        key = cv2.waitKey(0)
        cv2.destroyWindow(str(path))
    except cv2.error as problem:
        raise OutputError(
            "--show needs a display: leave it out and look at the files in the results folder"
        ) from problem
    if key in (ord("q"), 27):
        raise KeyboardInterrupt


def _print_beside_progress(line: str) -> None:
    """Print to stderr without tearing the progress bar."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def info(options: argparse.Namespace) -> int:
    """Describe a file (--info)."""
    from yolotrt.info import describe

    print(describe(Path(options.info_file)))
    return 0
