"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference checkpoints, pictures and outputs of the official YOLOv5 code."""
    if not GOLDEN.is_dir():
        pytest.skip("the reference data (../shared/golden) are not on this machine")
    return GOLDEN
