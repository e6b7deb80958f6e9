"""What TensorRT measured while it built, kept for the next build of the same network.

A build is mostly measuring: every layer is timed with every kernel that fits. The times depend on shapes, types, GPU
and TensorRT, but not on the weights' values, so a model that was trained again builds several times faster. A cache
that another network left behind can be refused or even break a build: each network has a file of its own.

Layout: a line that names the format, the key of the build, and a SHA-256 over TensorRT's data, then these data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from yolotrt.cuda.compile import cache_folder
from yolotrt.engines.base import PLUGIN, CompleteOptions
from yolotrt.engines.gpu import Gpu, dotted
from yolotrt.errors import InputError, OutputError
from yolotrt.files import atomic_write
from yolotrt.weights import Weights
from yolotrt.weights.infer import network_tensors

_MAGIC = "yolotrt-timing-cache-1"
_MAX_LINE = 512
_KEY_DIGITS = 16
_DEFINITION = 2
"""Raised when the same model and options come to define another network."""
_WITHOUT_INFLUENCE = ("timing_cache", "use_timing_cache", "quantization")
"""The values of scales hardly matter (where they change what is fused, TensorRT refuses the cache and it is made anew);
which layers INT8 leaves out does, and has an entry of its own."""

_log = logging.getLogger(__name__)


class TimingCache:
    """The file of one build.

    Attributes:
        path: Where it is.
        key: What it is valid for.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Name a file, which need not exist.

        Raises:
            InputError: if something else than a timing cache of ours is there.
        """
        self.path = path
        self.key = key
        self._check_target()

    @classmethod
    def of(cls, weights: Weights, options: CompleteOptions, gpu: Gpu, version: str) -> TimingCache:
        """The cache of a build: the file that the user named, or one in the user's cache folder.

        Args:
            weights: The model; the values of its weights do not matter.
            options: How it is built, and where YoloLayer is: ``plugin`` or ``kernel``.
            gpu: Where.
            version: TensorRT's version.
        """
        key = _key(weights, options, gpu, version)
        name = f"tensorrt-{version}-{gpu.name}-{dotted(gpu.capability)}-{options.precision}-{key}.timing"
        default = cache_folder().parent / "timing" / re.sub(r"[^\w.-]+", "_", name)
        return cls(options.timing_cache or default, key)

    def load(self) -> bytes:
        """TensorRT's data; empty if there are none, or none that fit, which is said in a warning."""
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as problem:
            _log.warning("the timing cache %s cannot be read (%s): building without it", self.path, problem.strerror)
            return b""
        line, _, data = content.partition(b"\n")
        _, key, digest = [*line.decode(errors="replace").split(), "", "", ""][:3]
        if hashlib.sha256(data).hexdigest() != digest:
            self.warn("is damaged")
        elif key != self.key:
            self.warn("is of another network, GPU or TensorRT")
        else:
            return data
        return b""

    def save(self, data: bytes) -> None:
        """Keep TensorRT's data; a cache that cannot be written only costs time."""
        line = f"{_MAGIC} {self.key} {hashlib.sha256(data).hexdigest()}\n"
        try:
            with atomic_write(self.path) as file:
                file.write(line.encode() + data)
        except OutputError as problem:
            _log.warning("the timing cache is not kept: %s", problem)

    def warn(self, what: str) -> None:
        """Say what is wrong with the file, and what happens."""
        _log.warning("the timing cache %s %s: building without it, then replacing it", self.path, what)

    def _check_target(self) -> None:
        try:
            with self.path.open("rb") as file:
                line = file.readline(_MAX_LINE)
        except OSError:
            return  # there is none, or `load` says that it cannot be read
        if line and not line.startswith(_MAGIC.encode()):
            raise InputError(f"timing cache {self.path} is a file of another kind: choose another name")


def _key(weights: Weights, options: CompleteOptions, gpu: Gpu, version: str) -> str:
    """A digest of all that decides which kernels TensorRT measures."""
    metadata = weights.metadata
    wanted: dict[str, Any] = {
        "definition": _DEFINITION,
        "shapes": {name: array.shape for name, array in network_tensors(weights.tensors).items()},
        "yaml": metadata.yaml,
        "activations": [metadata.activation, metadata.activations],
        "decoding": [metadata.anchors, metadata.strides] if options.yololayer == PLUGIN else None,
        "options": {name: value for name, value in asdict(options).items() if name not in _WITHOUT_INFLUENCE},
        "kept layers": None if options.quantization is None else options.quantization.keep,
        "gpu": [gpu.name, gpu.capability],
        "tensorrt": version,
    }
    return hashlib.sha256(json.dumps(wanted, sort_keys=True, default=str).encode()).hexdigest()[:_KEY_DIGITS]
