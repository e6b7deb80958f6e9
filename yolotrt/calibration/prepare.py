"""What an INT8 build does before the build: scales, and layers to keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from yolotrt.calibration.calibrate import FoundTable, find_table
from yolotrt.calibration.feed import PictureFeed
from yolotrt.calibration.options import AUTO_KEEP, AUTO_METHOD, AUTO_METHODS, NO_KEEP, Int8Options
from yolotrt.engines.base import CompleteOptions
from yolotrt.errors import InputError
from yolotrt.network.quantize import ONNX_RUNTIME, TENSORRT, Placement, Quantization
from yolotrt.weights import Weights

CLEARLY_DB = 3.0
"""``objects`` is taken if its signal-to-noise ratio is so much better than that of ``mse``: it cares for the edges of
boxes alone, and faint objects pay for that (docs/int8.md)."""


@dataclass(frozen=True)
class Prepared:
    """An INT8 build that can begin.

    Attributes:
        options: With scales and layers to keep.
        notes: How they were found, for the engine file.
    """

    options: CompleteOptions
    notes: dict[str, Any]


def prepare(
    weights: Weights, weights_sha256: str, complete: CompleteOptions, options: Int8Options, backend: str
) -> Prepared:
    """Find scales and the layers that stay in high precision.

    Args:
        weights: The model.
        weights_sha256: Their checksum.
        complete: The build's options.
        options: What the user said about INT8.
        backend: The backend's name, which decides where INT8 begins and ends.

    Raises:
        InputError: if there are too few pictures, or a table or layer does not fit the model.
        OutputError: if the table or the report cannot be written.
    """
    if weights.metadata.task == "classify":
        raise InputError("INT8 is for detection and segmentation, this model classifies: choose another --precision")
    placement = ONNX_RUNTIME if backend == "onnxruntime" else replace(TENSORRT, high_precision="fp32")
    found = _find_table(weights, weights_sha256, complete.imgsz, options, placement)
    keep = options.keep or ((NO_KEEP,) if found.is_given else (AUTO_KEEP,))
    precisions = None
    if options.report is not None or options.labels is not None or keep == (AUTO_KEEP,):
        from yolotrt.calibration.sensitivity import analyse

        analysis = analyse(weights, complete.imgsz, found.table, replace(options, keep=keep), placement)
        keep, precisions = analysis.keep, analysis.float_and_int8
    keep = () if keep == (NO_KEEP,) else keep
    notes = {
        "method": found.table.source.method,
        "pictures": found.table.pictures,
        "scales": found.origin,
        "scales_key": found.table.source.key(),
        "keep": keep,
    }
    if precisions is not None:
        notes["map50_95"] = {"labels": str(options.labels), "float": precisions[0], "int8": precisions[1]}
    return Prepared(replace(complete, quantization=Quantization(found.table.scales, keep)), notes)


def _find_table(
    weights: Weights, weights_sha256: str, imgsz: tuple[int, int], options: Int8Options, placement: Placement
) -> FoundTable:
    """The scales by the method asked for; ``auto`` is ``objects`` where that is clearly better."""
    find = partial(find_table, weights, weights_sha256, imgsz, zero_points=placement.has_zero_points)
    if options.method != AUTO_METHOD or (options.table is not None and options.table.exists()):
        return find(options)
    from yolotrt.calibration.sensitivity import Heads, some_pictures

    usual, at_objects = (find(replace(options, method=method, table=None)) for method in AUTO_METHODS)
    heads = Heads(weights, imgsz, list(some_pictures(PictureFeed.find(options.calib, imgsz))))
    snr_db = [heads.snr_db(Quantization(row.table.scales), placement) for row in (usual, at_objects)]
    best = at_objects if snr_db[1] > snr_db[0] + CLEARLY_DB else usual
    if options.table is None:
        return best
    best.table.save(options.table)
    return replace(best, origin=f"{best.origin}, written to {options.table}")
