"""Reading and writing model weights: .pt checkpoints, .wts and .safetensors files."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from pathlib import Path

from yolotrt.errors import WeightsError
from yolotrt.files import require_file
from yolotrt.weights.model import Metadata, Weights

__all__ = ["Metadata", "Weights", "load_weights", "save_weights"]

_HEAD_BYTES = 512
_WHAT_TO_PASS = "pass a .pt checkpoint, or the .wts or .safetensors file that gen_wts.py makes of it"

_WEIGHT_FORMATS = {
    "checkpoint": re.compile(rb"PK\x03\x04|\x80[\x02-\x05]"),  # a zip archive, or a pickle of protocol 2 to 5
    "safetensors": re.compile(rb".{6}\x00\x00\{", re.DOTALL),  # 8 bytes little-endian length, then a JSON object
    "wts": re.compile(rb"\s*[0-9]+[ \t]*\r?\n"),  # the count of entries alone on a line
}
_FORMAT_OF_SUFFIX = {".pt": "checkpoint", ".pth": "checkpoint", ".safetensors": "safetensors", ".wts": "wts"}

_OTHER_CONTENT = {
    "an engine (run it with -d)": re.compile(rb".{3}\x00\{|[fpv]trt", re.DOTALL),  # our framing, or a bare plan
    "an ONNX model": re.compile(rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a\x42]"),  # a ModelProto: ir_version first
    "a picture": re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\x00{4}|RIFF.{4}WEBP|II\*\x00|MM\x00\*", re.DOTALL),
    "a web page, so the download failed": re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE),
    "a Git LFS pointer without the data (run git lfs pull)": re.compile(rb"version https://git-lfs"),
}
_OTHER_SUFFIX = {
    ".engine": "an engine (run it with -d)",
    ".plan": "an engine (run it with -d)",
    ".onnx": "an ONNX model",
}


def load_weights(path: str | Path) -> Weights:
    """Read weights from a YOLOv5 checkpoint, a .wts or a .safetensors file.

    The format is recognised by the file's content; its suffix counts only where the content says nothing.

    Args:
        path: The file.

    Returns:
        float32 arrays by YOLOv5's names, and the metadata. What a file does not say of itself is concluded from its
        tensors and listed in `Metadata.inferred`.

    Raises:
        WeightsError: if the file is missing, empty, damaged or something else; the message says what it seems to be.
        CheckpointError: if it is a checkpoint that the restricted reader refuses.
    """
    from yolotrt.weights.official import OFFICIAL_NAMES

    if Path(path).name in OFFICIAL_NAMES and not Path(path).exists():
        raise WeightsError(f"weights {path} do not exist: python gen_wts.py -w {path} downloads the official file")
    file = require_file(Path(path), "weights", WeightsError)
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError as problem:
        raise WeightsError(f"weights {file} cannot be read: {problem.strerror or problem}: check the disk") from problem
    return _reader(_weight_format(file, head))(file)


def save_weights(weights: Weights, path: str | Path, *, half: bool = False) -> None:
    """Write weights to a .wts or .safetensors file, as its suffix says.

    Args:
        weights: What to write.
        path: The file; it appears complete or not at all.
        half: Store float16 (.safetensors only): half the size, rounded to 11 significant bits.

    Raises:
        WeightsError: if the suffix is another one, if `half` is asked of a .wts, or if a value cannot be stored.
        OutputError: if the file cannot be written.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix == ".safetensors":
        from yolotrt.weights.safetensors import write_safetensors

        write_safetensors(weights, file, half=half)
    elif suffix == ".wts" and half:
        raise WeightsError(f"cannot write {file} in half precision: a .wts holds float32 only: use .safetensors")
    elif suffix == ".wts":
        from yolotrt.weights.wts import write_wts

        write_wts(weights, file)
    else:
        raise WeightsError(f"cannot write weights to {file}: its suffix is unknown: use .wts or .safetensors")


def _weight_format(path: Path, head: bytes) -> str:
    """The format of a file that begins with `head`: ``checkpoint``, ``safetensors`` or ``wts``."""
    for name, pattern in _WEIGHT_FORMATS.items():
        if pattern.match(head):
            return name
    for what, pattern in _OTHER_CONTENT.items():
        if pattern.match(head):
            raise WeightsError(f"{path} holds no weights, it seems to be {what}: {_WHAT_TO_PASS}")
    suffix = path.suffix.lower()
    if suffix in _FORMAT_OF_SUFFIX:
        return _FORMAT_OF_SUFFIX[suffix]
    what = _OTHER_SUFFIX.get(suffix) or ("a text file" if _is_text(head) else "a file of an unknown format")
    raise WeightsError(f"{path} holds no weights, it seems to be {what}: {_WHAT_TO_PASS}")


def _is_text(head: bytes) -> bool:
    """Whether the bytes begin a UTF-8 text; the last character may be cut."""
    try:
        return "\x00" not in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False


def _reader(weight_format: str) -> Callable[[Path], Weights]:
    """The function that reads the format; imported here because each needs a module that the others do not."""
    if weight_format == "checkpoint":
        from yolotrt.weights.checkpoint import read_checkpoint

        return read_checkpoint
    if weight_format == "safetensors":
        from yolotrt.weights.safetensors import read_safetensors

        return read_safetensors
    from yolotrt.weights.wts import read_wts

    return read_wts
