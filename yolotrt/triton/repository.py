"""A model repository for the Triton Inference Server: an ensemble that takes a picture file and gives boxes.

    NAME            ensemble: IMAGE -> COUNT, BOXES, SCORES, CLASSES
    NAME_letterbox  Python: IMAGE -> the network's input, and the picture's size
    NAME_engine     the engine: TensorRT or ONNX Runtime, or Python
    NAME_boxes      Python: YoloLayer, NMS and scaling back to the picture

The configurations are text in the form of the server's own message ModelConfig (model_config.proto).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yolotrt.engines.base import HOST
from yolotrt.engines.file import EngineFile, EngineHeader
from yolotrt.errors import BackendUnavailableError, InputError, OutputError
from yolotrt.files import atomic_write, atomic_write_text
from yolotrt.postprocess import NmsOptions

ENGINE_FILE = "yolotrt.engine"
OPTIONS_FILE = "yolotrt.json"
README_FILE = "README.md"
LABELS_FILE = "labels.txt"
VERSION = "1"

IMAGE, SIZE = "IMAGE", "SIZE"
COUNT, BOXES, SCORES, CLASSES = "COUNT", "BOXES", "SCORES", "CLASSES"

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_QUEUE_DELAY_US = 2000
"""How long a request waits for others to share a batch: little beside a network's few milliseconds."""
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}
_BACKENDS = {"tensorrt": ("tensorrt", "model.plan"), "onnxruntime": ("onnxruntime", "model.onnx")}
"""By the engine's: the server's backend, and what it calls the file."""
_PYTHON_FILE = "model.py"


@dataclass(frozen=True)
class ServingOptions:
    """How an engine is served.

    Attributes:
        name: Of the ensemble; begins the names of the others.
        nms: Thresholds; `max_detections` is the length of the outputs.
        python_engine: Whether the engine runs inside a Python model, with this package, for servers without its
            backend.
        instances: Copies of each Python model that work at the same time.
    """

    name: str = "yolov5"
    nms: NmsOptions = field(default_factory=NmsOptions)
    python_engine: bool = False
    instances: int = 2

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: if one is out of range.
        """
        if not _NAME.fullmatch(self.name):
            raise InputError(f"{self.name!r:.120} is no name of a model: take letters, digits, '.', '_' and '-'")
        if self.instances < 1:
            raise InputError(f"{self.instances} instances of each model: choose at least 1")


def export_repository(engine: EngineFile, folder: Path, options: ServingOptions | None = None) -> Path:
    """Write a model repository.

    Args:
        engine: An engine for detection.
        folder: Where to; models of the same names are replaced, others stay.
        options: How it is served.

    Returns:
        The folder.

    Raises:
        InputError: if the engine is for another task, or for a library that no backend of the server runs.
        OutputError: if the folder cannot be written.
    """
    chosen = options or ServingOptions()
    _require_served(engine, chosen)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write into {folder}: it is no folder: choose another")
    models = _models(engine.header, chosen)
    for name, config in models.items():
        atomic_write_text(folder / name / "config.pbtxt", to_pbtxt(config))
    for stage in ("letterbox", "boxes", *(["engine"] if chosen.python_engine else [])):
        _write_python_model(folder / f"{chosen.name}_{stage}" / VERSION, stage, engine, chosen.nms)
    if not chosen.python_engine:
        _, file_name = _BACKENDS[engine.header.backend]
        with atomic_write(folder / f"{chosen.name}_engine" / VERSION / file_name) as file:
            file.write(engine.plan)
    # the server wants a folder for the ensemble's version, and an empty one is lost by some tools
    atomic_write_text(folder / chosen.name / VERSION / ".keep", "")
    atomic_write_text(folder / chosen.name / LABELS_FILE, "".join(f"{name}\n" for name in engine.header.model.names))
    atomic_write_text(folder / README_FILE, _readme(engine.header, chosen))
    return folder


def validate(text: str) -> Any:
    """The configuration as the server's own message.

    Raises:
        BackendUnavailableError: if tritonclient is not installed.
        InputError: if the server would not understand it.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as problem:
        raise BackendUnavailableError(
            f'tritonclient cannot be loaded ({problem}): run pip install "yolotrtx[triton]"'
        ) from problem
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as problem:
        raise InputError(f"this is no configuration of a model ({problem}): report this") from problem


def _require_served(engine: EngineFile, options: ServingOptions) -> None:
    """Raise InputError if there is no way to serve the engine."""
    header = engine.header
    if header.model.task != "detect":
        raise InputError(
            f"engine {engine.label} is for the task {header.model.task}: the models for Triton give boxes only, "
            "choose an engine for detection"
        )
    if options.python_engine and header.yololayer != HOST:
        raise InputError(
            f"engine {engine.label} is for a GPU, where Triton runs it itself: leave out --triton-python-engine"
        )
    if not options.python_engine and header.backend not in _BACKENDS:
        raise InputError(
            f"engine {engine.label} is for {header.backend}, which Triton has no backend for: build it with "
            f"--backend {' or '.join(_BACKENDS)}"
        )


def _write_python_model(folder: Path, stage: str, engine: EngineFile, nms: NmsOptions) -> None:
    """The server's entry point, the thresholds, and the engine's file, whose header says what to do."""
    atomic_write_text(folder / _PYTHON_FILE, _ENTRY_POINT.format(stage=stage.capitalize()))
    values = {
        "confidence": nms.confidence,
        "iou": nms.iou,
        "max_detections": nms.max_detections,
        "classes": nms.classes,
        "agnostic": nms.agnostic,
    }
    atomic_write_text(folder / OPTIONS_FILE, json.dumps(values, indent=2) + "\n")
    # letterbox and boxes need the header alone; an engine without its plan would be refused as damaged
    engine.save(folder / ENGINE_FILE)


_ENTRY_POINT = '''"""Written by yolotrt; the package does the work."""

from yolotrt.triton.models import {stage}Model as TritonPythonModel  # noqa: F401 - the server looks for this name
'''


# --- configurations ---

Config = Mapping[str, Any]


@dataclass(frozen=True)
class _Word:
    """A value of an enumeration, which has no quotation marks."""

    text: str


def _models(header: EngineHeader, options: ServingOptions) -> dict[str, Config]:
    """The configuration of every model by its name."""
    name = options.name
    return {
        f"{name}_letterbox": _letterbox_config(header, options),
        f"{name}_engine": _engine_config(header, options),
        f"{name}_boxes": _boxes_config(header, options),
        name: _ensemble_config(header, options),
    }


def _tensor(name: str, data_type: str, dims: Sequence[int], **more: Any) -> Config:
    return {"name": name, "data_type": _Word(data_type), "dims": list(dims), **more}


def _image() -> Config:
    return _tensor(IMAGE, "TYPE_STRING", [1])


def _found(options: ServingOptions) -> list[Config]:
    """What the ensemble gives."""
    limit = options.nms.max_detections
    return [
        _tensor(COUNT, "TYPE_INT32", [1]),
        _tensor(BOXES, "TYPE_FP32", [limit, 4]),
        _tensor(SCORES, "TYPE_FP32", [limit]),
        _tensor(CLASSES, "TYPE_INT32", [limit]),
    ]


def _network(header: EngineHeader, kind: str) -> list[Config]:
    """The network's inputs or outputs, without the batch."""
    tensors = header.inputs if kind == "input" else header.outputs
    return [_tensor(info.name, _TYPES[info.dtype], info.shape[1:]) for info in tensors]


def _batching(header: EngineHeader) -> Config:
    """Requests that come at the same time become one batch."""
    sizes = sorted({header.batch_range[1], header.max_batch})
    return {"dynamic_batching": {"preferred_batch_size": sizes, "max_queue_delay_microseconds": _QUEUE_DELAY_US}}


def _on_cpu(count: int) -> Config:
    return {"instance_group": [{"kind": _Word("KIND_CPU"), "count": count}]}


def _letterbox_config(header: EngineHeader, options: ServingOptions) -> Config:
    return {
        "name": f"{options.name}_letterbox",
        "backend": "python",
        "max_batch_size": header.max_batch,
        "input": [_image()],
        "output": [*_network(header, "input"), _tensor(SIZE, "TYPE_INT32", [2])],
        **_on_cpu(options.instances),
        **_batching(header),
    }


def _engine_config(header: EngineHeader, options: ServingOptions) -> Config:
    backend, file_name = ("python", _PYTHON_FILE) if options.python_engine else _BACKENDS[header.backend]
    place = _on_cpu(1) if header.yololayer == HOST else {"instance_group": [{"kind": _Word("KIND_GPU"), "count": 1}]}
    return {
        "name": f"{options.name}_engine",
        "backend": backend,
        "default_model_filename": file_name,
        "max_batch_size": header.max_batch,
        "input": _network(header, "input"),
        "output": _network(header, "output"),
        **place,
        **_batching(header),
    }


def _boxes_config(header: EngineHeader, options: ServingOptions) -> Config:
    return {
        "name": f"{options.name}_boxes",
        "backend": "python",
        "max_batch_size": header.max_batch,
        "input": [*_network(header, "output"), _tensor(SIZE, "TYPE_INT32", [2])],
        "output": _found(options),
        **_on_cpu(options.instances),
        **_batching(header),
    }


def _ensemble_config(header: EngineHeader, options: ServingOptions) -> Config:
    inputs = [info.name for info in header.inputs]
    outputs = [info.name for info in header.outputs]
    results = [COUNT, BOXES, SCORES, CLASSES]
    steps = [
        ("letterbox", [IMAGE], [*inputs, SIZE]),
        ("engine", inputs, outputs),
        ("boxes", [*outputs, SIZE], results),
    ]
    return {
        "name": options.name,
        "platform": "ensemble",
        "max_batch_size": header.max_batch,
        "input": [_image()],
        "output": _found(options),
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": f"{options.name}_{stage}",
                    "model_version": -1,  # the newest
                    "input_map": {name: name for name in taken},
                    "output_map": {name: name for name in given},
                }
                for stage, taken, given in steps
            ]
        },
        "parameters": {"engine_sha256": {"string_value": header.plan_sha256}},
    }


_MAPS = ("input_map", "output_map", "parameters")


def to_pbtxt(config: Config, indent: str = "") -> str:
    """A configuration in protobuf's text format."""
    lines = []
    for key, value in config.items():
        entries = value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]
        if key in _MAPS:
            entries = [{"key": name, "value": entry} for name, entry in value.items()]
        for entry in entries:
            if isinstance(entry, Mapping):
                lines.append(f"{indent}{key} {{\n{to_pbtxt(entry, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {_scalar(entry)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    """A value in protobuf's text format, whose strings are escaped as JSON's are."""
    if isinstance(value, _Word):
        return value.text
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    return json.dumps(value)


# --- the README ---


def _readme(header: EngineHeader, options: ServingOptions) -> str:
    """How to serve and ask."""
    extra = "cpu" if header.yololayer == HOST else "video"
    gpus = "" if header.yololayer == HOST else "--gpus all "
    return _README.format(
        name=options.name,
        extra=extra,
        gpus=gpus,
        backend="python" if options.python_engine else header.backend,
        needs=_needs(header, options),
        limit=options.nms.max_detections,
        classes=len(header.model.names),
        size=f"{header.imgsz[0]}x{header.imgsz[1]}",
        batch=header.max_batch,
        iou=options.nms.iou,
        confidence=options.nms.confidence,
        sha=header.plan_sha256,
    )


def _needs(header: EngineHeader, options: ServingOptions) -> str:
    """What the server must have."""
    if options.python_engine:
        return "The engine runs inside a Python model: any server with the backends `python` and `ensemble` does."
    if header.backend == "onnxruntime":
        return "The server needs the backend `onnxruntime`, as NVIDIA's full images have it."
    return (
        f"The plan runs with TensorRT {header.backend_version} only, on a GPU of compute capability "
        f"{header.compute_capability} ({header.device_name}): take the image of the server that has this version "
        "(NVIDIA's support matrix lists them)."
    )


_README = """# {name}, for the Triton Inference Server

Written by yolotrt from the engine {sha}: {classes} classes (`{name}/labels.txt`, class 0 first), {size},
batches up to {batch}, confidence above {confidence}, NMS at IoU {iou}.

{needs} Python models need yolotrt in the server's Python, and NumPy 1 where the server's Python backend was built
for it: with NumPy 2 such a server (2.51 is one) gives empty outputs.

```
docker run --rm {gpus}-p 8000:8000 -p 8001:8001 -p 8002:8002 --shm-size 1g -v "$PWD":/models \\
    -v /path/to/yolotrt:/yolotrt $TRITON_IMAGE \\
    sh -c 'apt-get update && apt-get install -y libgl1 \\
        && pip install "/yolotrt[{extra}]" "numpy<2" "opencv-python<4.12" \\
        && tritonserver --model-repository /models'
```

`{name}` takes the content of a picture file and gives boxes:

| | | |
| --- | --- | --- |
| IMAGE | BYTES (batch, 1) | a JPEG, PNG, ... |
| COUNT | INT32 (batch, 1) | how many of the following are set; -1 for a picture that cannot be decoded |
| BOXES | FP32 (batch, {limit}, 4) | left, top, right, bottom in pixels of the picture, best first |
| SCORES | FP32 (batch, {limit}) | confidence |
| CLASSES | INT32 (batch, {limit}) | class index |

```python
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient("localhost:8000")
image = triton.InferInput("IMAGE", [1, 1], "BYTES")
image.set_data_from_numpy(np.array([[open("bus.jpg", "rb").read()]], dtype=object))
found = client.infer("{name}", [image])
count = found.as_numpy("COUNT")[0, 0]
print(found.as_numpy("BOXES")[0, :count], found.as_numpy("SCORES")[0, :count], found.as_numpy("CLASSES")[0, :count])
```

Batches that the server made: `curl -s localhost:8002/metrics | grep {name}_engine` (`nv_inference_count` by
`nv_inference_exec_count`). Thresholds are in `{name}_boxes/1/yolotrt.json`, copies that work at once in
`instance_group`.
"""
