"""The official code's masks among the reference data, and what they are of."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def letterboxed(golden: Path, name: str) -> np.ndarray:
    """The official code's own input of a photo, as a BGR picture."""
    planes = np.load(golden / "expected" / "yolov5n_det.npz")[f"{name}_square_input_u8_chw_rgb"]
    return np.ascontiguousarray(planes[::-1].transpose(1, 2, 0))


def official_masks(golden: Path, name: str) -> tuple[list[int], np.ndarray]:
    """Classes and masks, bool (objects, 640, 640), of a photo's letterboxed input."""
    expected = np.load(golden / "expected" / "derived_seg_nc80_det.npz")
    masks = np.unpackbits(expected[f"{name}_square_masks_net"], axis=-1).astype(bool)
    return expected[f"{name}_square_cls"].tolist(), masks


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / (a | b).sum())
