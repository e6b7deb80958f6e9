"""Detection on many machines with Ray Data.

    import ray
    from yolotrt.distributed import detect

    pictures = ray.data.read_binary_files("s3://bucket/pictures", include_paths=True)
    detect(pictures, "yolov5s.engine").write_parquet("s3://bucket/found")

Importing this package imports neither Ray nor Arrow; the first use does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolotrt.distributed.worker import detect

__all__ = ["detect"]


def __getattr__(name: str) -> Any:
    """Load `detect` when it is first used."""
    if name != "detect":
        raise AttributeError(f"module 'yolotrt.distributed' has no attribute {name!r}")
    from yolotrt.distributed.worker import detect

    return detect
