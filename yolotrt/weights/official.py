"""Fetching the official YOLOv5 v7.0 checkpoints by name."""

from __future__ import annotations

import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from yolotrt.errors import CheckpointError, YolotrtError
from yolotrt.files import atomic_write

BASE_URL: Final = "https://github.com/ultralytics/yolov5/releases/download/v7.0"

_CHUNK_BYTES: Final = 1 << 20
_TIMEOUT_SECONDS: Final = 30
_BY_HAND: Final = "download it elsewhere and pass it with -w"


class Asset(NamedTuple):
    """A file of the release: its size in bytes and the SHA-256 of its content in hexadecimal."""

    size: int
    sha256: str


ASSETS: Final[dict[str, Asset]] = {
    "yolov5n.pt": Asset(4_062_133, "4f180cf23ba0717ada0badd6c685026d73d48f184d00fc159c2641284b2ac0a3"),
    "yolov5s.pt": Asset(14_808_437, "8b3b748c1e592ddd8868022e8732fde20025197328490623cc16c6f24d0782ee"),
    "yolov5m.pt": Asset(42_806_829, "61d933360ba5a7733a36764996c800287d973889d875227f5beedd2473a97a56"),
    "yolov5l.pt": Asset(93_622_629, "2f603b7354c25454d1270663a14d8ddc1eea98e5eebc1d84ce0c6e3150fa155f"),
    "yolov5x.pt": Asset(174_114_333, "9f27a794fa0308e2606f90565164571d6f0a0ba18a3ce2e5e5d323b71c157859"),
    "yolov5n6.pt": Asset(7_190_229, "496c05a2b991da15acc6c4408c63da287f2513a46c6756618776d4dd71170781"),
    "yolov5s6.pt": Asset(25_978_837, "95bda9019ada63f37338308d0c81a66047a6fbaba061abaff271ba9334cf2a6f"),
    "yolov5m6.pt": Asset(72_308_357, "7afe7fa0f29a8351467200a2a5a33c7996d1155ed6636c7edd8ca70b14951c64"),
    "yolov5l6.pt": Asset(154_521_589, "b357b77f646b0190912985937c44e2923441369d5fda69ba86da2aa919212618"),
}
"""Files whose hash at least two independent public sources agree on."""

OFFICIAL_NAMES: Final = frozenset(f"yolov5{size}{kind}.pt" for size in "nsmlx" for kind in ("", "6", "-seg", "-cls"))
"""The YOLOv5 checkpoints of the release. Those that `ASSETS` lacks cannot be verified and are not fetched."""


def fetch_official(name: str, folder: Path, *, base_url: str = BASE_URL) -> Path:
    """Return the official checkpoint `name` in `folder`, downloading it if it is not there yet.

    A file in place is used only if its hash is right. A download appears under its name only after its size and SHA-256
    have been checked.

    Args:
        name: Such as ``yolov5s.pt``.
        folder: Where the file is or goes; created if missing.
        base_url: Where the release's files are.

    Returns:
        The path of the verified file.

    Raises:
        CheckpointError: if it is no official name or one without a known hash, if another file is in its place, or if
            the download has the wrong size or hash.
        OutputError: if the file cannot be written.
        YolotrtError: if the download fails; the message names the URL.
    """
    url = f"{base_url}/{name}"
    path = folder / name
    if name not in OFFICIAL_NAMES:
        raise CheckpointError(f"{name[:200]!r} is no official YOLOv5 checkpoint: use one such as yolov5s.pt")
    if name not in ASSETS:
        raise CheckpointError(
            f"{name} has no known hash to check a download against: download {url} yourself and pass it with -w"
        )
    if path.exists():
        _verify(path, ASSETS[name])
        return path
    _download(url, path, ASSETS[name])
    return path


def _verify(path: Path, asset: Asset) -> None:
    """Check the size and hash of a file in place.

    Raises:
        CheckpointError: if it is another file.
    """
    digest = hashlib.sha256()
    try:
        if path.stat().st_size == asset.size:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}: check its permissions") from problem
    if digest.hexdigest() != asset.sha256:
        raise CheckpointError(f"{path} is not the official file of that name (wrong hash): rename or remove it")


def _download(url: str, path: Path, asset: Asset) -> None:
    """Download `url` to `path`, which appears only if it is the right file."""
    from tqdm import tqdm

    digest, received = hashlib.sha256(), 0
    bar = tqdm(total=asset.size, unit="B", unit_scale=True, desc=path.name, disable=not sys.stderr.isatty())
    with bar, atomic_write(path) as file:
        for chunk in _chunks(url):
            received += len(chunk)
            if received > asset.size:
                break
            digest.update(chunk)
            file.write(chunk)
            bar.update(len(chunk))
        if received != asset.size:
            raise CheckpointError(f"{url} does not have {asset.size} bytes, so it is not the official file: {_BY_HAND}")
        if digest.hexdigest() != asset.sha256:
            raise CheckpointError(f"{url} has the wrong SHA-256, so it is not the official file: {_BY_HAND}")


def _chunks(url: str) -> Iterator[bytes]:
    """The content behind `url`, piece by piece.

    Raises:
        YolotrtError: if it cannot be had.
    """
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            while chunk := response.read(_CHUNK_BYTES):
                yield chunk
    except urllib.error.HTTPError as problem:
        raise YolotrtError(f"{url} answers {problem.code} {problem.reason}: {_BY_HAND}") from problem
    except (OSError, http.client.HTTPException) as problem:
        reason = problem.reason if isinstance(problem, urllib.error.URLError) else problem
        raise YolotrtError(f"{url} cannot be downloaded ({reason}): {_BY_HAND}") from problem
