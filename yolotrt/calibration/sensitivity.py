"""How much INT8 hurts each convolution, and which ones to keep in high precision.

A layer's contribution is measured with that layer alone in INT8: its input, its kernel and, where the library's 8-bit
kernels round it as well, its output. The error is that of the raw heads against the float network's, as a
signal-to-noise ratio in dB: 10 dB more is a tenth of the error's power. Each cell counts by its objectness in the float
network: nearly all cells are background, where an error of the raw values changes no detection (docs/int8.md).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yolotrt.calibration.activations import record
from yolotrt.calibration.calibrate import scales_folder
from yolotrt.calibration.feed import PictureFeed
from yolotrt.calibration.objects import FLOAT, objectness
from yolotrt.calibration.options import AUTO_KEEP, NO_KEEP, Int8Options
from yolotrt.calibration.table import ScaleTable
from yolotrt.engines.base import CompleteOptions
from yolotrt.engines.definition import BuildHooks, build_plan
from yolotrt.errors import OutputError
from yolotrt.evaluation.dataset import read_dataset
from yolotrt.evaluation.run import require_packages
from yolotrt.files import atomic_write_text
from yolotrt.network import recorder
from yolotrt.network.builder import INPUT_NAME, NetworkBuilder
from yolotrt.network.quantize import ACTIVATION, CONVOLUTION, SIGMOID, Placement, Quantization
from yolotrt.shell import print_beside_progress
from yolotrt.weights import Weights

_log = logging.getLogger(__name__)

Float = npt.NDArray[np.float32]

PICTURES = 8
"""Taken evenly from the calibration pictures."""

TARGET_DB = 30.0
"""``auto`` keeps layers until the error's power is a thousandth of the signal's."""

NEGLIGIBLE_DB = 15.0
"""A layer that is so much better than `TARGET_DB` is not worth keeping."""

NO_ERROR_DB = 120.0
"""The most that is told: about float32's own roundings."""

EVALUATED_LAYERS = 3
"""So many of the worst layers are evaluated alone where labels are given: an evaluation takes much longer."""

MAX_KEPT = 10
"""``auto`` stops there: with more, an fp16 engine is the better choice."""

FLOAT_NETWORK, INT8_NETWORK = "floating point", "whole network in INT8"
KEPT_NETWORK = "with the kept layers in high precision"


@dataclass(frozen=True)
class LayerNoise:
    """One convolution.

    Attributes:
        name: Its name, such as ``model.2.cv1.conv``.
        snr_db: Signal-to-noise ratio of the raw heads with this layer alone in INT8.
    """

    name: str
    snr_db: float


@dataclass(frozen=True)
class Analysis:
    """What the analysis found.

    Attributes:
        layers: All convolutions that can be INT8, the most harmful first.
        snr_db: Of the whole INT8 network, without and with the kept layers.
        keep: Layers to keep in high precision.
        precisions: mAP50-95 where labels are given, 0..1, by what it is of: `FLOAT_NETWORK`, `INT8_NETWORK`,
            `KEPT_NETWORK` where layers are kept, and for a report the worst layers alone.
    """

    layers: tuple[LayerNoise, ...]
    snr_db: tuple[float, float]
    keep: tuple[str, ...]
    precisions: Mapping[str, float] = field(default_factory=dict)

    @property
    def float_and_int8(self) -> tuple[float, float] | None:
        """mAP50-95 of the float network and of the INT8 one that is to be built; None without labels."""
        if not self.precisions:
            return None
        built = self.precisions.get(KEPT_NETWORK, self.precisions[INT8_NETWORK])
        return self.precisions[FLOAT_NETWORK], built


class Heads:
    """Computes raw heads of float and INT8 variants of one model."""

    def __init__(self, weights: Weights, imgsz: tuple[int, int], pictures: Sequence[Float]) -> None:
        self._weights = weights
        self._imgsz = imgsz
        self._pictures = pictures
        levels = len(weights.metadata.strides)
        self._reference = self._compute("fp32", None, FLOAT)[:levels]
        anchors = len(weights.metadata.anchors[0])
        self._objectness = [[objectness(head, anchors) for head in level] for level in self._reference]

    def snr_db(self, quantization: Quantization, placement: Placement) -> float:
        """Signal-to-noise ratio of an INT8 variant's heads; each cell counts by its objectness in the float network."""
        found = self._compute("int8", quantization, placement)
        signal = noise = np.finfo(np.float64).tiny
        for rows in zip(self._reference, found, self._objectness, strict=False):  # prototypes of masks have no cells
            for real, int8, weight in zip(*rows, strict=True):
                signal += float((np.square(real, dtype=np.float64) * weight).sum())
                noise += float((np.square(real - int8, dtype=np.float64) * weight).sum())
        return float(min(10 * (np.log10(signal) - np.log10(noise)), NO_ERROR_DB))

    def _compute(self, precision: str, quantization: Quantization | None, placement: Placement) -> list[list[Float]]:
        """By level, then by picture."""
        from yolotrt.engines.onnx import inference_session

        options = CompleteOptions(precision, self._imgsz, (1, 1, 1), quantization=quantization)
        session = inference_session(build_plan(recorder, self._weights, options, BuildHooks(placement)).data, None)
        heads = [session.run(None, {INPUT_NAME: picture}) for picture in self._pictures]
        return [list(level) for level in zip(*heads, strict=True)]


def analyse(
    weights: Weights, imgsz: tuple[int, int], table: ScaleTable, options: Int8Options, placement: Placement
) -> Analysis:
    """Measure every convolution, choose layers to keep where that is asked for, and write a report if wanted.

    Args:
        weights: The model.
        imgsz: Network input height and width in pixels.
        table: Scales of all tensors.
        options: Pictures, what to keep, where to write the report.
        placement: The library's.

    Raises:
        InputError: if there are too few pictures, or the labels cannot be used.
        BackendUnavailableError: if labels are given and a package for the evaluation is missing.
        OutputError: if the report cannot be written.
    """
    if options.report is not None:
        _require_folder(options.report)
    if options.labels is not None:
        require_packages()
        read_dataset(options.labels, weights.metadata.names)
    is_auto = options.keep == (AUTO_KEEP,)
    feed = PictureFeed.find(options.calib, imgsz)
    cached = scales_folder() / f"{_key(table, feed, placement)}.keep.json"
    keep = _read_choice(cached) if is_auto else None
    if keep is not None and options.report is None and options.labels is None:
        return Analysis((), (np.nan, np.nan), keep)
    heads = Heads(weights, imgsz, list(some_pictures(feed)))
    before = heads.snr_db(Quantization(table.scales), placement)
    layers = []
    if options.report is not None or (keep is None and is_auto and before < TARGET_DB):
        layers = _measure_layers(heads, weights, imgsz, table, placement)
    if not is_auto:
        keep = () if options.keep == (NO_KEEP,) else options.keep
    elif keep is None:
        keep = _choose(heads, layers, table, placement, before)
        _write_choice(keep, cached)
    precisions: dict[str, float] = {}
    if options.labels is not None:
        keep, precisions = _with_labels(heads, weights, imgsz, table, options, placement, layers, keep)
    after = heads.snr_db(Quantization(table.scales, keep), placement) if keep else before
    analysis = Analysis(tuple(layers), (before, after), keep, precisions)
    if options.report is not None:
        write_report(analysis, options.report)
    return analysis


def _key(table: ScaleTable, feed: PictureFeed, placement: Placement) -> str:
    """Names all that a choice depends on."""
    parts = [
        table.source.key(),
        json.dumps(table.groups),
        feed.checksum(),
        json.dumps([sorted(placement.reads), sorted(placement.writes)]),
        str(("by objectness", PICTURES, TARGET_DB, MAX_KEPT)),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _read_choice(path: Path) -> tuple[str, ...] | None:
    """Layers chosen earlier for the very same scales, pictures and placement."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _write_choice(keep: Sequence[str], path: Path) -> None:
    """Remember the choice; a cache that cannot be written only costs time."""
    try:
        atomic_write_text(path, json.dumps(list(keep)))
    except OutputError as problem:
        _log.info("the layers to keep are not cached: %s", problem)


def some_pictures(feed: PictureFeed) -> Iterator[Float]:
    """`PICTURES` of the calibration pictures, letterboxed."""
    chosen = np.linspace(0, len(feed.paths) - 1, min(PICTURES, len(feed.paths))).astype(int)
    for picture in PictureFeed(tuple(feed.paths[index] for index in chosen), feed.imgsz).readable():
        yield picture.copy()


def _measure_layers(
    heads: Heads, weights: Weights, imgsz: tuple[int, int], table: ScaleTable, placement: Placement
) -> list[LayerNoise]:
    """Each convolution alone in INT8, the most harmful first."""
    from tqdm import tqdm

    convolutions = _convolutions(weights, imgsz)
    names = _int8_names(weights, imgsz, table, placement)
    able = [layer for layer in convolutions if layer.name in names]
    print_beside_progress(f"measuring how much INT8 hurts each of {len(able)} layers")
    found = []
    for layer in tqdm(able, desc="measuring layers", unit="layer", disable=None, file=sys.stderr, leave=False):
        alone = _alone(layer, convolutions, table)
        found.append(LayerNoise(layer.name, heads.snr_db(alone, _for_one_layer(placement))))
    return sorted(found, key=lambda row: row.snr_db)


def _int8_names(weights: Weights, imgsz: tuple[int, int], table: ScaleTable, placement: Placement) -> frozenset[str]:
    """The convolutions that are INT8 where none is kept: all but the first and the head's."""
    definition = NetworkBuilder(
        recorder.Network(),
        recorder,
        weights,
        compute_dtype=recorder.float32,
        quantization=Quantization(table.scales),
        placement=placement,
    )
    definition.build_heads(1, *imgsz)
    return frozenset(definition.int8_convolutions)


def _convolutions(weights: Weights, imgsz: tuple[int, int]) -> list[recorder.ConvolutionLayer]:
    return [layer for layer in record(weights, imgsz).layers if isinstance(layer, recorder.ConvolutionLayer)]


def _alone(
    layer: recorder.ConvolutionLayer, convolutions: Sequence[recorder.ConvolutionLayer], table: ScaleTable
) -> Quantization:
    """What makes one convolution INT8 and no other."""
    scales = table.scales
    own = {name: scales[name] for name in (layer.inputs[0].name, layer.output.name)}
    others = tuple(other.name for other in convolutions if other is not layer and not other.output.is_network_output)
    return Quantization(own, others)


def _for_one_layer(placement: Placement) -> Placement:
    """The placement for a convolution alone."""
    return replace(
        placement, reads=frozenset({CONVOLUTION}), writes=placement.writes & {CONVOLUTION, SIGMOID, ACTIVATION}
    )


def _with_labels(
    heads: Heads,
    weights: Weights,
    imgsz: tuple[int, int],
    table: ScaleTable,
    options: Int8Options,
    placement: Placement,
    layers: Sequence[LayerNoise],
    keep: tuple[str, ...],
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Layers to keep, with the rows that the labels ask for; and `Analysis.precisions`."""
    from yolotrt.calibration.accuracy import Accuracy, keep_until_accurate

    assert options.labels is not None
    print_beside_progress(f"measuring mAP50-95 with {options.labels}")
    accuracy, scales = Accuracy(weights, imgsz, options.labels), table.scales
    found = {FLOAT_NETWORK: accuracy.of_float(), INT8_NETWORK: accuracy.of_int8(Quantization(scales), placement)}
    convolutions = _convolutions(weights, imgsz)
    if options.keep == (AUTO_KEEP,):
        names = _int8_names(weights, imgsz, table, placement)
        rows = _rows_by_gain(
            heads, [layer.name for layer in convolutions if layer.name in names], table, placement, keep
        )
        keep = keep_until_accurate(accuracy, rows, scales, keep, placement)
    if keep:
        found[KEPT_NETWORK] = accuracy.of_int8(Quantization(scales, keep), placement)
    by_name = {layer.name: layer for layer in convolutions}
    for row in layers[:EVALUATED_LAYERS] if options.report is not None else ():
        alone = _alone(by_name[row.name], convolutions, table)
        found[f"{row.name} alone in INT8"] = accuracy.of_int8(alone, _for_one_layer(placement))
    return keep, found


def _rows_by_gain(
    heads: Heads,
    names: Sequence[str],
    table: ScaleTable,
    placement: Placement,
    keep: tuple[str, ...],
) -> Iterator[str]:
    """Rows of the yaml with INT8 convolutions (`names`), first the one that gains most if it is kept."""
    rows = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
    gains = {row: heads.snr_db(Quantization(table.scales, (*keep, row)), placement) for row in rows if row not in keep}
    yield from sorted(gains, key=lambda row: -gains[row])


def _choose(
    heads: Heads, layers: Sequence[LayerNoise], table: ScaleTable, placement: Placement, snr_db: float
) -> tuple[str, ...]:
    """The most harmful layers, one by one, until the whole network is good enough."""
    keep: list[str] = []
    for layer in layers:
        if snr_db >= TARGET_DB or len(keep) == MAX_KEPT or layer.snr_db > TARGET_DB + NEGLIGIBLE_DB:
            break
        attempt = heads.snr_db(Quantization(table.scales, (*keep, layer.name)), placement)
        if attempt > snr_db:  # errors can cancel each other: a layer that does not help goes on in INT8
            keep.append(layer.name)
            snr_db = attempt
    if snr_db < TARGET_DB:
        _log.warning(
            "the INT8 network has %.1f dB of the %.0f dB aimed at with %d layers kept in high precision: "
            "compare its detections with those of fp16 before use",
            snr_db,
            TARGET_DB,
            len(keep),
        )
    return tuple(keep)


def write_report(analysis: Analysis, folder: Path) -> None:
    """Write ``layers.csv``, ``report.md`` and, where matplotlib is installed, ``layers.png``.

    Raises:
        OutputError: if a file cannot be written.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["layer", "snr_db", "kept"])
    for row in analysis.layers:
        writer.writerow([row.name, f"{row.snr_db:.2f}", int(_is_kept(row.name, analysis.keep))])
    atomic_write_text(folder / "layers.csv", table.getvalue())
    atomic_write_text(folder / "report.md", _markdown(analysis))
    _plot(analysis, folder / "layers.png")


def _markdown(analysis: Analysis) -> str:
    before, after = analysis.snr_db
    kept = ", ".join(analysis.keep) or "none"
    rows = [
        f"| {row.name} | {row.snr_db:.1f} | {'kept' if _is_kept(row.name, analysis.keep) else ''} |"
        for row in analysis.layers
    ]
    return "\n".join(
        [
            "# What INT8 does to each layer",
            "",
            "Signal-to-noise ratio of the raw heads against the float network, in dB: 10 dB more is a tenth of the",
            "error's power. Cells count by the probability that an object is there. One line a convolution, with that",
            "one alone in INT8, the most harmful first.",
            "",
            f"- whole network in INT8: {before:.1f} dB",
            f"- with the kept layers in high precision: {after:.1f} dB",
            f"- kept: {kept}",
            "",
            *_precision_lines(analysis.precisions),
            "| layer | dB | |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _precision_lines(precisions: Mapping[str, float]) -> list[str]:
    """A table of mAP50-95, where it was measured."""
    if not precisions:
        return []
    rows = [f"| {name} | {value:.4f} |" for name, value in precisions.items()]
    return ["| network | mAP50-95 |", "| --- | --- |", *rows, ""]


def _plot(analysis: Analysis, path: Path) -> None:
    """A bar a layer. Without matplotlib there is no plot, and a message says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _log.warning("matplotlib is not installed, so the report has no plot: run pip install matplotlib")
        return
    from yolotrt.files import atomic_write

    rows = analysis.layers[::-1]
    figure = Figure(figsize=(8, 1.5 + 0.2 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colors = ["tab:orange" if _is_kept(row.name, analysis.keep) else "tab:blue" for row in rows]
    axes.barh([row.name for row in rows], [row.snr_db for row in rows], color=colors)
    for value, style, label in zip(analysis.snr_db, ("--", "-"), ("all in INT8", "with kept layers"), strict=True):
        axes.axvline(value, color="black", linestyle=style, linewidth=1, label=f"{label}: {value:.1f} dB")
    axes.set_xlabel("signal-to-noise ratio of the raw heads with this layer alone in INT8, dB (orange: kept)")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.legend(loc="lower right")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _is_kept(layer: str, keep: Sequence[str]) -> bool:
    return any(layer == name or layer.startswith(f"{name}.") for name in keep)


def _require_folder(folder: Path) -> None:
    """Fail before the work if the report cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(f"cannot write the report into {folder}: {problem.strerror}: name a folder") from problem
