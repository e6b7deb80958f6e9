"""Labels and boxes for tests of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yolotrt.evaluation.dataset import Labels, Picture
from yolotrt.evaluation.predict import Measured
from yolotrt.postprocess import Boxes


def labels(rows: Sequence[Sequence[float]], crowd: Sequence[bool] | None = None) -> Labels:
    """From rows (class, left, top, right, bottom)."""
    table = np.array(rows, np.float64).reshape(-1, 5)
    area = np.prod(table[:, 3:] - table[:, 1:3], axis=1)
    crowds = np.zeros(len(table), np.bool_) if crowd is None else np.array(crowd, np.bool_)
    return Labels(table[:, 1:], table[:, 0].astype(np.int64), area, crowds)


def boxes(rows: Sequence[Sequence[float]]) -> Boxes:
    """From rows (class, confidence, left, top, right, bottom)."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    table = table[np.argsort(-table[:, 1], kind="stable")]
    return Boxes(table[:, 2:].astype(np.float32), table[:, 1].astype(np.float32), table[:, 0].astype(np.int64))


def measured(there: Labels, found: Boxes, name: str = "picture") -> Measured:
    """One picture."""
    return Measured(Picture(Path(f"{name}.jpg"), name, there, is_normalised=False), there, found)


def random_pictures(seed: int, count: int = 12, classes: int = 4, crowds: bool = False) -> list[Measured]:
    """Pictures whose boxes are shifted labels of mostly the right class, doubled ones, and some from nowhere."""
    random = np.random.default_rng(seed)
    pictures = []
    for number in range(count):
        total = int(random.integers(0, 7))
        corners = random.uniform(0, 80, (total, 2))
        there = np.column_stack(
            [random.integers(0, classes, total), corners, corners + random.uniform(8, 120, (total, 2))]
        )
        is_crowd = random.random(total) < 0.25 if crowds else np.zeros(total, bool)
        chosen = random.integers(0, total, 2 * total) if total else np.zeros(0, int)
        found = np.column_stack([there[chosen][:, :1], random.random(len(chosen)), there[chosen][:, 1:]])
        found[:, 2:] += random.normal(0, 4, (len(chosen), 4))
        found[:, 4:] = np.maximum(found[:, 4:], found[:, 2:4] + 1)  # a box has no negative sides
        is_wrong = random.random(len(chosen)) < 0.2
        found[is_wrong, 0] = random.integers(0, classes, is_wrong.sum())
        lost = random.uniform(0, 100, (3, 2))
        nowhere = np.column_stack([random.integers(0, classes, 3), random.random(3), lost, lost + 20])
        pictures.append(measured(labels(there, is_crowd), boxes(np.concatenate([found, nowhere])), str(number)))
    return pictures
