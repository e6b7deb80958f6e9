"""The scale table: a small JSON file that says what it was made from, which a person can read and edit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolotrt.errors import InputError
from yolotrt.files import atomic_write_text, require_file
from yolotrt.network.quantize import INT8_MAX

FORMAT = "yolotrt-scales"
FORMAT_VERSION = 1

MAX_SCALE = float(np.finfo(np.float16).max) / INT8_MAX
"""Larger ones stand for values beyond fp16, in which the layers between are computed."""

MIN_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class TableSource:
    """What a table was made from; another table belongs to any other.

    Attributes:
        weights_sha256: Of the weights.
        imgsz: Network input height and width in pixels.
        method: How the ranges were chosen.
        pictures_sha256: Of the pictures' contents.
        letterbox: Rule of the letterbox.
        zero_points: Whether the ranges were chosen for a library that has zero points; the table serves others as well.
    """

    weights_sha256: str
    imgsz: tuple[int, int]
    method: str
    pictures_sha256: str
    letterbox: Mapping[str, Any]
    zero_points: bool = False

    def key(self) -> str:
        """SHA-256 over all of it and the format's version."""
        values = [FORMAT_VERSION, self.weights_sha256, self.imgsz, self.method, self.pictures_sha256, self.zero_points]
        return hashlib.sha256(json.dumps([*values, dict(self.letterbox)], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ScaleTable:
    """Scales of all tensors that may be quantized.

    Attributes:
        source: What it was made from.
        pictures: How many pictures were observed.
        groups: Per group its scale and the names of the tensors that share it.
    """

    source: TableSource
    pictures: int
    groups: tuple[tuple[float, tuple[str, ...]], ...]

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each tensor."""
        return {name: scale for scale, names in self.groups for name in names}

    def save(self, path: Path) -> None:
        """Write the file atomically, one group a line.

        Raises:
            OutputError: if it cannot be written.
        """
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "about": "127 x scale is the largest value that INT8 holds of a tensor; tensors of a line share it",
            "key": self.source.key(),
            "weights_sha256": self.source.weights_sha256,
            "imgsz": self.source.imgsz,
            "method": self.source.method,
            "pictures": self.pictures,
            "pictures_sha256": self.source.pictures_sha256,
            "letterbox": dict(self.source.letterbox),
            "zero_points": self.source.zero_points,
        }
        lines = [f' "{name}": {json.dumps(value)},' for name, value in head.items()]
        rows = [json.dumps({"scale": scale, "tensors": names}) for scale, names in self.groups]
        atomic_write_text(path, "\n".join(["{", *lines, ' "scales": [', "  " + ",\n  ".join(rows), " ]", "}", ""]))

    @classmethod
    def load(cls, path: Path) -> ScaleTable:
        """Read a table.

        Raises:
            InputError: if it is missing, no table, of another version, or holds an impossible scale.
        """
        require_file(path, "scale table")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as problem:
            raise InputError(f"scale table {path} is no JSON ({problem}): calibrate again with --calib") from problem
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InputError(f"{path} is no scale table of yolotrt: calibrate with --calib")
        if values.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"scale table {path} has format {values.get('format_version')!r:.20}, this version reads "
                f"{FORMAT_VERSION}: calibrate again with --calib"
            )
        try:
            source = TableSource(
                weights_sha256=str(values["weights_sha256"]),
                imgsz=(int(values["imgsz"][0]), int(values["imgsz"][1])),
                method=str(values["method"]),
                pictures_sha256=str(values["pictures_sha256"]),
                letterbox=dict(values["letterbox"]),
                zero_points=bool(values.get("zero_points", False)),
            )
            groups = tuple((row["scale"], tuple(map(str, row["tensors"]))) for row in values["scales"])
            table = cls(source, int(values["pictures"]), groups)
        except (KeyError, TypeError, ValueError, IndexError) as problem:
            raise InputError(
                f"scale table {path} is damaged ({type(problem).__name__}: {problem}): calibrate again with --calib"
            ) from problem
        _check_scales(table.groups, f"scale table {path}")
        return table

    def check_belongs_to(
        self, weights_sha256: str, imgsz: tuple[int, int], groups: Iterable[Iterable[str]], path: Path
    ) -> None:
        """Raise InputError unless the table is for this model at this size, with a scale for each of its tensors."""
        if self.source.weights_sha256 != weights_sha256:
            raise InputError(
                f"scale table {path} was made for other weights ({self.source.weights_sha256[:12]}...): "
                "calibrate this model with another --calib-table"
            )
        if self.source.imgsz != imgsz:
            raise InputError(
                f"scale table {path} was made for pictures of {self.source.imgsz[0]}x{self.source.imgsz[1]}, not "
                f"{imgsz[0]}x{imgsz[1]}: calibrate this size with another --calib-table"
            )
        check_complete(self.scales, groups, f"scale table {path}")


def check_complete(scales: Mapping[str, float], groups: Iterable[Iterable[str]], what: str) -> None:
    """Raise InputError unless every tensor has a scale, the tensors of a group the same one, and nothing else does."""
    known = set()
    for group in groups:
        names = list(group)
        known.update(names)
        missing = [name for name in names if name not in scales]
        if missing:
            raise InputError(f"{what} has no scale for tensor {missing[0]}: calibrate again with --calib")
        if len({scales[name] for name in names}) > 1:
            raise InputError(f"{what} has different scales for {', '.join(names)}, which share one: write it once")
    foreign = sorted(set(scales) - known)
    if foreign:
        raise InputError(f"{what} has a scale for {foreign[0]}, which the model has not: it belongs to another model")


def _check_scales(groups: Iterable[tuple[Any, tuple[str, ...]]], what: str) -> None:
    """Raise InputError for the first scale that is no positive number of a sensible size, and for a repeated tensor."""
    seen: set[str] = set()
    for scale, names in groups:
        problem = scale_problem(scale)
        if problem:
            raise InputError(f"{what}: the scale of {', '.join(names[:3])} is {problem}: correct it or calibrate again")
        repeated = seen.intersection(names)
        if repeated:
            raise InputError(f"{what} has two scales for tensor {min(repeated)}: remove one")
        seen.update(names)


def scale_problem(scale: Any) -> str:
    """What is wrong with a scale, or an empty string."""
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        return f"{scale!r:.30}, not a number"
    if not math.isfinite(scale):
        return str(scale)
    if scale <= 0:
        return f"{scale:g}, not positive"
    if scale < MIN_SCALE:
        return f"{scale:g}, too small for float32"
    if scale > MAX_SCALE:
        return f"{scale:g}, more than {MAX_SCALE:.0f}, so that values exceed the range of fp16"
    return ""
