"""What a user can say about INT8."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from yolotrt.errors import InputError

RULES = ("max", "percentile", "entropy", "mse")
"""How the largest representable value of a tensor is chosen; see `yolotrt.calibration.observers`."""

OBJECTS = "objects"
"""``mse`` of the values where objects are; see `yolotrt.calibration.objects`."""

AUTO_METHOD = "auto"
"""The second of `AUTO_METHODS` if its signal-to-noise ratio is clearly higher; see `yolotrt.calibration.prepare`."""

AUTO_METHODS = ("mse", OBJECTS)

METHODS = (AUTO_METHOD, *RULES, OBJECTS)

DEFAULT_METHOD = AUTO_METHOD

AUTO_KEEP = "auto"
NO_KEEP = "none"


@dataclass(frozen=True)
class Int8Options:
    """How the scales of an INT8 engine are found.

    Attributes:
        calib: Folder (or glob, list, picture) of calibration pictures; None takes ``calib_images/``.
        method: One of `METHODS`.
        keep: Layers that stay in high precision, by name; ``("auto",)`` finds them by a sensitivity analysis,
            ``("none",)`` keeps none. Empty is ``auto``, or ``none`` where the scales are read from `table`.
        table: A file of scales: read where it exists, else written; None uses the user's cache.
        report: Folder for a report on each layer's sensitivity; None makes none.
        labels: Labelled pictures (YOLO data.yaml or COCO json): mAP50-95 with and without INT8 is measured on them, and
            ``auto`` keeps rows until little of it is lost; None leaves it out.
    """

    calib: Path | None = None
    method: str = DEFAULT_METHOD
    keep: tuple[str, ...] = ()
    table: Path | None = None
    report: Path | None = None
    labels: Path | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: if one is not known.
        """
        if self.method not in METHODS:
            raise InputError(f"calibration method {self.method!r} is not known: choose one of {', '.join(METHODS)}")
        if {AUTO_KEEP, NO_KEEP} & set(self.keep) and len(self.keep) > 1:
            raise InputError("--int8-keep takes auto, none or names of layers: not several of them")
