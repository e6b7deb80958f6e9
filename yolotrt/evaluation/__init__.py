"""Evaluation: an engine's detections in labelled pictures, measured as COCO does it.

The way of the data: `dataset` reads labels, `predict` runs the engine, `metrics` measures (by faster-coco-eval),
`matching` says which box found which label, `bootstrap` compares two engines, `plots` and `report` show it.
"""

from __future__ import annotations
