"""From weights and pictures to scales: reuses a table that fits, else observes the float network."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from yolotrt.calibration.activations import ActivationSource, Float, OnnxActivations, record
from yolotrt.calibration.feed import PictureFeed
from yolotrt.calibration.objects import ObjectFinder, inside
from yolotrt.calibration.observers import Histogram, threshold
from yolotrt.calibration.options import OBJECTS, Int8Options
from yolotrt.calibration.table import ScaleTable, TableSource, check_complete, scale_problem
from yolotrt.cuda.compile import cache_folder
from yolotrt.errors import InputError, OutputError, WeightsError
from yolotrt.network.builder import INPUT_NAME
from yolotrt.network.quantize import INT8_MAX, scale_groups
from yolotrt.network.ranges import lowest_values
from yolotrt.preprocess import LETTERBOX_RULE
from yolotrt.shell import print_beside_progress
from yolotrt.weights import Weights

PICTURE_SCALE = 1 / INT8_MAX
"""Pixel values lie in 0..1, whatever the pictures show."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundTable:
    """Scales, and where they come from.

    Attributes:
        table: The scales.
        origin: In words, for the user.
        is_given: Whether it is the user's own file, for which no pictures are needed.
    """

    table: ScaleTable
    origin: str
    is_given: bool = False


def find_table(
    weights: Weights,
    weights_sha256: str,
    imgsz: tuple[int, int],
    options: Int8Options,
    activations: ActivationSource | None = None,
    *,
    zero_points: bool = False,
) -> FoundTable:
    """The scales of a model.

    `options.table`, where it exists, is taken as it is. Otherwise a table made from the very same weights, pictures,
    letterbox, size and method is taken from the cache; otherwise the pictures are observed.

    Args:
        weights: The model.
        weights_sha256: Their checksum.
        imgsz: Network input height and width in pixels.
        options: Pictures, table and a method that is not ``auto``.
        activations: Computes the float network; None takes ONNX Runtime on the CPU.
        zero_points: Whether the library has them, which makes other ranges the best ones.

    Raises:
        InputError: if there are too few pictures, or the table does not fit.
        OutputError: if `options.table` cannot be written.
    """
    if options.table is not None and options.table.exists():
        table = ScaleTable.load(options.table)
        table.check_belongs_to(weights_sha256, imgsz, scale_groups(record(weights, imgsz)), options.table)
        return FoundTable(table, f"read from {options.table}", is_given=True)
    feed = PictureFeed.find(options.calib, imgsz)
    source = TableSource(weights_sha256, imgsz, options.method, feed.checksum(), LETTERBOX_RULE, zero_points)
    cached = scales_folder() / f"{source.key()[:32]}.json"
    known = _from_cache(cached, source, weights)
    if known is None:
        observed = activations or OnnxActivations(weights, imgsz)
        finder = ObjectFinder(weights, imgsz) if options.method == OBJECTS else None
        lowest = lowest_values(record(weights, imgsz)) if zero_points else {}
        table, origin = calibrate(observed, feed, source, finder, lowest), "calibrated now"
        _keep(table, cached)
    else:
        table, origin = known, f"from an earlier calibration with the same pictures, {cached}"
    if options.table is not None:
        table.save(options.table)
        origin += f", written to {options.table}"
    return FoundTable(table, origin)


def scales_folder() -> Path:
    """Where tables are kept: $YOLOTRT_CACHE_DIR, or the user's cache folder."""
    return cache_folder().parent / "scales"


def calibrate(
    activations: ActivationSource,
    feed: PictureFeed,
    source: TableSource,
    finder: ObjectFinder | None = None,
    lowest: Mapping[str, float] | None = None,
) -> ScaleTable:
    """Observe the float network, where `finder` finds objects or everywhere, and choose scales; see `make_table`."""
    print_beside_progress(f"calibrating with {len(feed.paths)} pictures ({source.method})")
    histograms, pictures = observe(activations, feed, finder)
    return make_table(histograms, activations.groups, source, pictures, lowest)


def observe(
    activations: ActivationSource, feed: PictureFeed, finder: ObjectFinder | None = None
) -> tuple[dict[str, Histogram], int]:
    """Count the values of all tensors over all pictures; memory does not depend on their number.

    Args:
        activations: Computes the float network.
        feed: The pictures.
        finder: Only values where it finds objects count; None counts all.

    Returns:
        A histogram for each observed tensor, and the number of pictures.

    Raises:
        InputError: if there are too few pictures.
        WeightsError: if a tensor is not finite.
    """
    from tqdm import tqdm

    histograms: dict[str, Histogram] = {}
    pictures = 0
    with tqdm(
        total=len(feed.paths), desc="calibrating", unit="image", disable=None, file=sys.stderr, leave=False
    ) as progress:
        for images in feed.batches():
            select = _everything if finder is None else _values_inside(finder.find(images))
            for name, values in activations.observe(images):
                floor = np.float32(activations.floors.get(name, -np.inf))
                try:
                    histograms.setdefault(name, Histogram()).add(np.maximum(select(values), floor))
                except ValueError as problem:
                    raise WeightsError(
                        f"tensor {name} is {problem} in the float network: the weights cannot be used"
                    ) from problem
            pictures += 1
            progress.update()
    return histograms, pictures


def _everything(values: Float) -> Float:
    return values


def _values_inside(boxes: Float) -> Callable[[Float], Float]:
    """Takes a tensor's values (1, channels, rows, columns) where boxes are."""

    def select(values: Float) -> Float:
        return values[..., inside(boxes, *values.shape[-2:])]

    return select


def make_table(
    histograms: dict[str, Histogram],
    groups: Sequence[Sequence[str]],
    source: TableSource,
    pictures: int,
    lowest: Mapping[str, float] | None = None,
) -> ScaleTable:
    """One scale a group, of the values of all its tensors together.

    Args:
        histograms: Values by tensor.
        groups: Names of tensors that share a scale.
        source: What the table is made from.
        pictures: How many were observed.
        lowest: Where ranges with zero points begin, by tensor; the others are symmetric.

    Raises:
        InputError: if a scale is impossible.
    """
    rows = []
    for group in groups:
        values = Histogram()
        for name in group:
            if name in histograms:
                values.merge(histograms[name])
        method = "mse" if source.method == OBJECTS else source.method
        scale = threshold(values, method, (lowest or {}).get(group[0])) / INT8_MAX
        if INPUT_NAME in group:
            scale = PICTURE_SCALE
        if scale == 0.0:
            _log.warning("tensor %s is 0 in all pictures: its scale is arbitrary", group[0])
            scale = 1 / INT8_MAX
        problem = scale_problem(scale)
        if problem:
            raise InputError(f"the scale of tensor {group[0]} would be {problem}: choose another --precision")
        rows.append((float(f"{scale:.7g}"), tuple(group)))
    table = ScaleTable(source, pictures, tuple(rows))
    check_complete(table.scales, groups, "the calibration")
    return table


def _from_cache(path: Path, source: TableSource, weights: Weights) -> ScaleTable | None:
    """The cached table, if it is there and what its name says."""
    if not path.exists():
        return None
    try:
        table = ScaleTable.load(path)
        if table.source.key() != source.key():
            raise InputError(f"scale table {path} was made from something else")
        check_complete(table.scales, scale_groups(record(weights, source.imgsz)), f"scale table {path}")
    except InputError as problem:
        _log.warning("%s: calibrating again", str(problem).partition(": calibrate")[0])
        return None
    return table


def _keep(table: ScaleTable, path: Path) -> None:
    """Write the table into the cache; a cache that cannot be written only costs time."""
    try:
        table.save(path)
    except OutputError as problem:
        _log.info("the scales are not cached: %s", problem)
