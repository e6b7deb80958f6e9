"""From weights to an engine file, and from an engine file to a session."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import yolotrt
from yolotrt.engines.base import (
    HOST,
    KERNEL,
    PLUGIN,
    ROWS_NAME,
    Backend,
    BackendTable,
    BuildOptions,
    CompleteOptions,
    Plan,
    Session,
)
from yolotrt.engines.file import EngineFile, EngineHeader, require_engine_target
from yolotrt.engines.gpu import find_gpu, label
from yolotrt.engines.onnx import OnnxRuntimeBackend
from yolotrt.engines.tensorrt import TensorRtBackend, tensorrt_module
from yolotrt.engines.tensorrt_rtx import TensorRtRtxBackend, runs_on, tensorrt_rtx_module
from yolotrt.engines.trt_log import NO_GPU_REMEDY
from yolotrt.errors import BackendUnavailableError, EngineFileError, InputError
from yolotrt.weights import Metadata, Weights, load_weights
from yolotrt.weights.infer import network_tensors

_log = logging.getLogger(__name__)

BACKENDS: BackendTable = {
    TensorRtBackend.name: TensorRtBackend,
    TensorRtRtxBackend.name: TensorRtRtxBackend,
    OnnxRuntimeBackend.name: OnnxRuntimeBackend,
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
        backend: ``tensorrt``, ``tensorrt-rtx``, ``onnxruntime``, or ``auto`` for the best one that runs here.
        options: Precision, image size and batch; None takes the defaults.

    Returns:
        The engine, with its path where one was given.

    Raises:
        InputError: if an option or the weights cannot be used.
        BackendUnavailableError: if the backend's library is not installed.
        BuildError: if the library fails.
        OutputError: if the file cannot be written.
    """
    from yolotrt.preprocess import input_rule

    if path is not None:
        require_engine_target(Path(path))
    if not isinstance(weights, Weights):
        weights = load_weights(weights)
    library = find_backend(backend)
    complete = (options or BuildOptions()).completed(library.default_precision, weights.metadata.imgsz)
    library.check_options(complete)
    version = library.version()
    _log.info("building with %s %s: %s", library.name, version, complete)
    weights_sha256 = _weights_checksum(weights)
    notes: dict[str, Any] = {}
    if complete.precision == "int8":
        from yolotrt.calibration.prepare import prepare

        prepared = prepare(weights, weights_sha256, complete, (options or BuildOptions()).int8, library.name)
        complete, notes = prepared.options, {"int8": prepared.notes}
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
        weights_sha256=weights_sha256,
        yololayer=plan.yololayer,
        letterbox=input_rule(weights.metadata.task),
        device_name=plan.device_name,
        compute_capability=plan.compute_capability,
        build_options={**_build_options(complete, plan), **notes},
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
    from yolotrt.preprocess import input_rule

    header = engine.header
    known = BACKENDS.get(header.backend)
    if known is None:
        raise EngineFileError(
            f"engine {engine.label} is for the backend {engine.header.backend!r}, which this version does not know: "
            "update yolotrt or build it again with python -m yolotrt -s"
        )
    if not _gives_what_it_says(header):
        raise EngineFileError(
            f"engine {engine.label} gives something else than the outputs of a YOLOv5 model: update yolotrt or "
            "build it again with python -m yolotrt -s"
        )
    if dict(header.letterbox) != input_rule(header.model.task):
        raise EngineFileError(
            f"engine {engine.label} wants its pictures prepared by another rule ({dict(header.letterbox)}): "
            "build it again with python -m yolotrt -s"
        )
    return known().open(engine, threads=threads)


def require_boxes(engine: EngineFile, reason: str) -> None:
    """Raise InputError, with the reason, if the engine finds no boxes since it is a classifier's."""
    if engine.header.model.task == "classify":
        raise InputError(
            f"engine {engine.label} is a classifier's and {reason}: choose an engine for detection or segmentation"
        )


def _output_count(model: Metadata) -> int:
    """Outputs of a network: a head a level, and prototypes for segmentation; or the scores of a classifier."""
    return len(model.strides) + (model.task != "detect")


def find_backend(name: str) -> Backend:
    """The backend `name`; ``auto`` is the best one that runs on this machine.

    Raises:
        InputError: if the name is unknown.
    """
    if name == AUTO:
        return _best_backend()
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not known: choose one of {', '.join((AUTO, *BACKENDS))}")
    return BACKENDS[name]()


def _best_backend() -> Backend:
    """TensorRT, or else TensorRT-RTX, if it is installed and a GPU for it is there; otherwise ONNX Runtime."""
    present = {name for name in ("tensorrt", "tensorrt_rtx") if importlib.util.find_spec(name) is not None}
    try:
        if not present:
            raise BackendUnavailableError("neither TensorRT nor TensorRT-RTX is installed")
        gpu = find_gpu()
        if "tensorrt" in present:
            tensorrt_module()
            return _chosen(TensorRtBackend(), label(gpu))
        if not runs_on(gpu.capability):
            raise BackendUnavailableError(f"TensorRT-RTX does not run on this GPU ({label(gpu)})")
        tensorrt_rtx_module()
        return _chosen(TensorRtRtxBackend(), label(gpu))
    except BackendUnavailableError as problem:
        return _chosen(OnnxRuntimeBackend(), str(problem).removesuffix(f": {NO_GPU_REMEDY}"))


def _chosen(backend: Backend, reason: str) -> Backend:
    _log.info("choosing the backend %s: %s", backend.name, reason)
    return backend


def _gives_what_it_says(header: EngineHeader) -> bool:
    """Whether the outputs are those of the place that YoloLayer has."""
    from yolotrt.cuda.kernels import BEST_VALUES

    if header.yololayer == PLUGIN:
        outputs = [(tensor.name, tensor.dtype, tensor.shape[2:]) for tensor in header.outputs]
        can_be = header.backend == TensorRtBackend.name and header.model.task == "detect"
        return can_be and outputs == [(ROWS_NAME, "float32", (BEST_VALUES,))]
    if len(header.outputs) != _output_count(header.model) or len({tensor.dtype for tensor in header.outputs}) != 1:
        return False
    return header.yololayer == (HOST if header.backend == OnnxRuntimeBackend.name else KERNEL)


def _build_options(options: CompleteOptions, plan: Plan) -> dict[str, Any]:
    """What the header keeps of the options that have no field of their own, and what the build found out."""
    return {
        "workspace_mib": options.workspace_mib,
        "optimization_level": options.optimization_level,
        "hardware_compatible": options.hardware_compatible,
        "version_compatible": options.version_compatible,
        **plan.findings,
    }


def _weights_checksum(weights: Weights) -> str:
    """SHA-256 over names and float32 values of what the network is built of, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network_tensors(weights.tensors).items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
