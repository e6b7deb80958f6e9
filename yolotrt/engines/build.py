"""From weights to an engine file, and from an engine file to a session."""

from __future__ import annotations

import datetime
import hashlib
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yolotrt
from yolotrt.engines.base import Backend, BackendTable, BuildOptions, Session
from yolotrt.engines.file import EngineFile, EngineHeader
from yolotrt.engines.onnx import OnnxRuntimeBackend
from yolotrt.engines.tensorrt_rtx import TensorRtRtxBackend
from yolotrt.errors import EngineFileError, InputError
from yolotrt.preprocess import LETTERBOX_RULE
from yolotrt.weights import Weights, load_weights

_log = logging.getLogger(__name__)

BACKENDS: BackendTable = {
    OnnxRuntimeBackend.name: OnnxRuntimeBackend,
    TensorRtRtxBackend.name: TensorRtRtxBackend,
}
"""Every backend by its name on the command line."""

AUTO = "auto"


def build_engine(
    weights: Weights | str | Path,
    path: str | Path | None = None,
    *,
    backend: str = AUTO,
    options: BuildOptions | None = None,
) -> EngineFile:
    """Build an engine.

    Args:
        weights: A model, or the path of a .wts, .safetensors or .pt file.
        path: Where to write the engine file; None keeps it in memory.
        backend: ``onnxruntime``, ``tensorrt-rtx``, or ``auto`` for the best one that runs on this machine.
        options: Precision, image size and batch; None takes the defaults.

    Returns:
        The engine, with its path where one was given.

    Raises:
        InputError: if an option or the weights cannot be used.
        BackendUnavailableError: if the backend's library is not installed.
        BuildError: if the library fails.
        OutputError: if the file cannot be written.
    """
    if not isinstance(weights, Weights):
        weights = load_weights(weights)
    library = find_backend(backend)
    options = _completed(options or BuildOptions(), weights, library)
    version = library.version()
    _log.info("building with %s %s: %s", library.name, version, options)
    plan = library.build(weights, options)
    assert options.precision is not None and options.imgsz is not None
    header = EngineHeader(
        model=weights.metadata,
        backend=library.name,
        backend_version=version,
        precision=options.precision,
        imgsz=options.imgsz,
        batch_range=(options.min_batch, options.opt_batch, options.max_batch),
        inputs=plan.inputs,
        outputs=plan.outputs,
        plan_sha256=hashlib.sha256(plan.data).hexdigest(),
        plan_size=len(plan.data),
        weights_sha256=_weights_checksum(weights),
        letterbox=LETTERBOX_RULE,
        device_name=plan.device_name,
        compute_capability=plan.compute_capability,
        build_options=asdict(options),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        yolotrt_version=yolotrt.__version__,
    )
    engine = EngineFile(header, plan.data)
    return engine if path is None else engine.save(path)


def open_session(engine: EngineFile, **settings: Any) -> Session:
    """Open a session on an engine with the backend that it was built for.

    Args:
        engine: The engine.
        settings: The backend's own, such as ``threads`` for ONNX Runtime.

    Raises:
        EngineFileError: if this version does not know the backend, or the engine does not fit this machine.
        BackendUnavailableError: if the backend's library or device is missing.
    """
    known = BACKENDS.get(engine.header.backend)
    if known is None:
        raise EngineFileError(
            f"engine {engine.label} is for the backend {engine.header.backend!r}, which this version does not know: "
            "update yolotrt or build it again with python -m yolotrt -s"
        )
    return known().open(engine, **settings)


def find_backend(name: str) -> Backend:
    """The backend `name`; ``auto`` is the best one that runs on this machine.

    Raises:
        InputError: if the name is unknown.
    """
    if name == AUTO:
        return OnnxRuntimeBackend()
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not known: choose one of {', '.join((AUTO, *BACKENDS))}")
    return BACKENDS[name]()


def _completed(options: BuildOptions, weights: Weights, backend: Backend) -> BuildOptions:
    """`options` with the defaults of the model and the backend filled in."""
    return replace(
        options,
        precision=options.precision or backend.default_precision,
        imgsz=options.imgsz or weights.metadata.imgsz,
    )


def _weights_checksum(weights: Weights) -> str:
    """SHA-256 over names and float32 values, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(weights.tensors):
        digest.update(name.encode() + b"\0")
        digest.update(weights.tensors[name].astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
