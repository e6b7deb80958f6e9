"""The command line, ``python -m yolotrt``: what each command does."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolotrt.arguments import DEFAULT_ENGINE, PROGRAM, Command, parse
from yolotrt.errors import InputError, OutputError
from yolotrt.shell import make_output_robust, printable, run_command

if TYPE_CHECKING:
    from yolotrt.detector import Detector
    from yolotrt.engines.file import EngineHeader
    from yolotrt.media.frames import Span
    from yolotrt.media.run import Run, VideoReader

DEFAULT_OUTPUT = Path("runs/detect")
DEFAULT_RAY_OUTPUT = Path("runs/ray")
DEFAULT_EVAL_OUTPUT = Path("runs/eval")
DEFAULT_BENCHMARK_OUTPUT = Path("runs/benchmark")
DEFAULT_SAMPLES = Path("samples")

LARGE_INPUT_BYTES = 500_000_000
"""About 100 pictures of 640x640: with YOLOv5x the first layer's output alone is nearly seven times as large."""

_log = logging.getLogger(__name__)


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
    options = parse(argv)
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.INFO if options.verbose else logging.WARNING,
        format=f"{PROGRAM}: %(message)s",
        stream=sys.stderr,
    )
    return _COMMANDS[options.command](options)


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


def _detect_on_cluster(options: argparse.Namespace) -> int:
    """Detect on a Ray cluster (-d --ray)."""
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

        message = NO_DISPLAY if options.command is Command.DETECT else NO_DISPLAY_FOR_WEBCAM
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


_COMMANDS: dict[Command, Callable[[argparse.Namespace], int]] = {
    Command.SERIALIZE: serialize,
    Command.DETECT: detect,
    Command.WEBCAM: webcam,
    Command.EVALUATE: evaluate,
    Command.BENCHMARK: benchmark,
    Command.EXPORT_TRITON: export_triton,
    Command.INFO: info,
}
