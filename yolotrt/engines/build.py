"""From weights to an engine file, and from an engine file to a session."""

from __future__ import annotations

import datetime
import hashlib
import logging
from pathlib import Path

import yolotrt
from yolotrt.engines.base import HOST, Backend, BackendTable, BuildOptions, Session
from yolotrt.engines.file import EngineFile, EngineHeader, require_engine_target
from yolotrt.engines.onnx import OnnxRuntimeBackend
from yolotrt.engines.tensorrt_rtx import TensorRtRtxBackend
from yolotrt.errors import EngineFileError, InputError
from yolotrt.weights import Weights, load_weights
from yolotrt.weights.infer import network_tensors

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
    from yolotrt.preprocess import LETTERBOX_RULE

    if path is not None:
        require_engine_target(Path(path))
    if not isinstance(weights, Weights):
        weights = load_weights(weights)
    library = find_backend(backend)
    complete = (options or BuildOptions()).completed(library.default_precision, weights.metadata.imgsz)
    version = library.version()
    _log.info("building with %s %s: %s", library.name, version, complete)
    plan = library.build(weights, complete)
    header = EngineHeader(
        model=weights.metadata,
        backend=library.name,
        backend_version=version,
        precision=complete.precision,
        imgsz=complete.imgsz,
        batch_range=complete.batch_range,
        inputs=plan.inputs,
        outputs=plan.outputs,
        plan_sha256=hashlib.sha256(plan.data).hexdigest(),
        plan_size=len(plan.data),
        weights_sha256=_weights_checksum(weights),
        yololayer=plan.yololayer,
        letterbox=LETTERBOX_RULE,
        device_name=plan.device_name,
        compute_capability=plan.compute_capability,
        build_options={"workspace_mib": complete.workspace_mib},
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        yolotrt_version=yolotrt.__version__,
    )
    engine = EngineFile(header, plan.data)
    return engine if path is None else engine.save(path)


def open_session(engine: EngineFile, *, threads: int | None = None) -> Session:
    """Open a session on an engine with the backend that it was built for.

    Args:
        engine: The engine.
        threads: See `Backend.open`.

    Raises:
        EngineFileError: if this version does not know the backend, or the engine does not fit this machine.
        BackendUnavailableError: if the backend's library or device is missing.
    """
    from yolotrt.preprocess import LETTERBOX_RULE

    header = engine.header
    known = BACKENDS.get(header.backend)
    if known is None:
        raise EngineFileError(
            f"engine {engine.label} is for the backend {engine.header.backend!r}, which this version does not know: "
            "update yolotrt or build it again with python -m yolotrt -s"
        )
    if header.yololayer != HOST or len(header.outputs) != len(header.model.strides) or header.model.task != "detect":
        raise EngineFileError(
            f"engine {engine.label} gives something else than the raw heads of a detector: update yolotrt or "
            "build it again with python -m yolotrt -s"
        )
    if dict(header.letterbox) != LETTERBOX_RULE:
        raise EngineFileError(
            f"engine {engine.label} wants its pictures letterboxed by another rule ({dict(header.letterbox)}): "
            "build it again with python -m yolotrt -s"
        )
    return known().open(engine, threads=threads)


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


def _weights_checksum(weights: Weights) -> str:
    """SHA-256 over names and float32 values of what the network is built of, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network_tensors(weights.tensors).items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
