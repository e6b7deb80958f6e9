"""``--info``: what a checkpoint, a weights file or an engine holds, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolotrt.engines.file import EngineFile, EngineHeader, TensorInfo, is_engine_file
from yolotrt.errors import InputError, YolotrtError
from yolotrt.files import require_file
from yolotrt.network.builder import LayerSummary, summarise
from yolotrt.shell import printable
from yolotrt.weights import Metadata, Weights, load_weights
from yolotrt.weights.model import Anchors

NAMES_SHOWN = 12
MAX_ARGUMENT = 24
YOLO_LAYER_PLACES = {
    "host": "on the CPU, after the engine",
    "kernel": "a kernel on the GPU, after the engine",
    "plugin": "a plugin, in the engine",
}
"""Where raw heads become boxes, in words, by the engine header's value."""


def describe(path: Path) -> str:
    """Describe an .engine, .wts, .safetensors or .pt file: what it holds, then its layers as YOLOv5 lists them.

    Raises:
        InputError: if the file cannot be read or is of another kind.
    """
    path = require_file(path, "file", InputError)
    if is_engine_file(path):
        engine = EngineFile.load(path)
        rows, weights, size = _engine_rows(engine), Weights({}, engine.header.model), engine.header.imgsz
    else:
        weights = load_weights(path)
        rows, size = _weights_rows(weights), weights.metadata.imgsz
    width = max(len(key) for key, _ in rows)
    described = (f"  {key:<{width}}  {printable(value)}" for key, value in rows)
    return "\n".join([printable(str(path)), *described, "", *_layer_table(weights, size)])


def _layer_table(weights: Weights, size: tuple[int, int]) -> list[str]:
    """A line a layer, and the sums; or why the model cannot be built."""
    try:
        layers = summarise(weights, *size)
    except YolotrtError as error:
        return [f"  no layer table: {printable(str(error))}"]
    lines = [_COLUMNS, *(_layer_cells(layer) for layer in layers)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    parameters = sum(layer.parameters for layer in layers)
    operations = sum(layer.operations for layer in layers)
    return [
        *(_aligned(line, widths) for line in lines),
        f"  {len(layers)} layers, {parameters:,} parameters, {operations / 1e9:.1f} GFLOPs at {size[0]} x {size[1]}",
    ]


_COLUMNS = ("", "from", "n", "parameters", "GFLOPs", "module", "output", "arguments")
_LEFT_ALIGNED = ("module", "output", "arguments")


def _layer_cells(summary: LayerSummary) -> tuple[str, ...]:
    """The cells of a layer's line."""
    layer = summary.layer
    shapes = " ".join("x".join(map(str, shape[1:])) for shape in summary.shapes)
    return (
        str(layer.index),
        ", ".join(str(source) for source in layer.sources),
        str(layer.repeats),
        f"{summary.parameters:,}",
        f"{summary.operations / 1e9:.2f}",
        layer.block,
        shapes,
        _arguments(layer.args),
    )


def _arguments(values: Sequence[object]) -> str:
    """The yaml's arguments in short; anchors stand further up."""
    return ", ".join("..." if isinstance(v, tuple) and len(str(v)) > MAX_ARGUMENT else str(v) for v in values)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells in columns, numbers to the right."""
    columns = zip(cells, widths, _COLUMNS, strict=True)
    padded = (f"{cell:<{width}}" if name in _LEFT_ALIGNED else f"{cell:>{width}}" for cell, width, name in columns)
    return ("  " + "  ".join(printable(cell) for cell in padded)).rstrip()


def _engine_rows(engine: EngineFile) -> list[tuple[str, str]]:
    header = engine.header
    low, usual, high = header.batch_range
    rows = [
        ("engine", f"{header.backend} {header.backend_version}, {header.precision}"),
        ("device", f"{header.device_name} ({header.compute_capability})" if header.device_name else "any CPU"),
        ("input size", f"{header.imgsz[0]} x {header.imgsz[1]} (height x width)"),
        ("batch", f"{low}" if low == high else f"{low} to {high}, fastest at {usual}"),
        *_memory_rows(header),
        *(("input", _tensor(tensor)) for tensor in header.inputs),
        *(("output", _tensor(tensor)) for tensor in header.outputs),
        ("YoloLayer", YOLO_LAYER_PLACES.get(header.yololayer, header.yololayer)),
        ("plan", f"{header.plan_size:,} bytes, sha256 {header.plan_sha256}"),
        ("weights", f"sha256 {header.weights_sha256}"),
        ("built", f"{header.created} by yolotrt {header.yolotrt_version}"),
    ]
    if header.backend == "tensorrt-rtx":
        rows[1] = ("device", "RTX GPUs")
    found = [("build", _build_in_words(header)), *(("int8", line) for line in int8_in_words(header))]
    rows[2:2] = [row for row in found if row[1]]
    return rows + _model_rows(header.model)


def _memory_rows(header: EngineHeader) -> list[tuple[str, str]]:
    """What the engine needs of the GPU's memory, where the build found out."""
    scratch = header.build_options.get("scratch_bytes")
    if not isinstance(scratch, int):
        return []
    amount = f"{scratch / 2**20:.1f} MiB of the GPU for each batch under way"
    return [("memory", f"{amount}, besides plan, inputs and outputs")]


def convolutions_in_words(header: EngineHeader) -> str:
    """How many convolutions have which precision, such as ``58 of 60 convolutions fp16, 2 fp32``; empty if unknown."""
    counts = header.build_options.get("convolutions")
    if not isinstance(counts, dict) or not counts or not all(isinstance(count, int) for count in counts.values()):
        return ""
    total = sum(counts.values())
    (first, most), *others = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join([f"{most} of {total} convolutions {first}", *(f"{count} {kind}" for kind, count in others)])


def int8_in_words(header: EngineHeader) -> list[str]:
    """The layers that an INT8 engine keeps in high precision (empty if none), its scales, and what it costs if known.

    Empty for other engines and where the header does not say it.
    """
    notes: Any = header.build_options.get("int8")
    try:
        lines = [
            f"kept in high precision: {', '.join(notes['keep'])}" if notes["keep"] else "",
            f"scales: {notes['method']} of {notes['pictures']} pictures, {notes['scales']}",
        ]
        if found := notes.get("map50_95"):
            loss = f"{found['int8']:.4f}, in floating point {found['float']:.4f}"
            lines.append(f"mAP50-95 on {found['labels']}: {loss}")
    except (AttributeError, KeyError, TypeError, ValueError):
        return []
    return lines


def _build_in_words(header: EngineHeader) -> str:
    """What was asked of the build and what it found out, where that is not the usual."""
    options = header.build_options
    phrases = [
        convolutions_in_words(header),
        f"optimization level {options['optimization_level']}" if options.get("optimization_level") is not None else "",
        f"workspace {options['workspace_mib']} MiB" if options.get("workspace_mib") is not None else "",
        "for every GPU from compute capability 8.0 on" if options.get("hardware_compatible") else "",
        "for later versions of TensorRT" if options.get("version_compatible") else "",
    ]
    return ", ".join(phrase for phrase in phrases if phrase)


def _weights_rows(weights: Weights) -> list[tuple[str, str]]:
    return [
        ("tensors", f"{len(weights.tensors)} with {weights.parameter_count:,} values"),
        *_model_rows(weights.metadata),
        *(("inferred", conclusion) for conclusion in weights.metadata.inferred),
    ]


def _model_rows(model: Metadata) -> list[tuple[str, str]]:
    shown = ", ".join(model.names[:NAMES_SHOWN])
    more = len(model.names) - NAMES_SHOWN
    rows = [
        ("task", f"{model.task}, YOLOv5 {model.version or 'of unknown version'}"),
        ("classes", f"{len(model.names)}: {shown}{f' and {more} more' if more > 0 else ''}"),
        ("made for", f"{model.imgsz[0]} x {model.imgsz[1]}"),
        ("multiples", f"depth {model.yaml.get('depth_multiple', 1)}, width {model.yaml.get('width_multiple', 1)}"),
        ("activation", _activation(model)),
        ("source", f"sha256 {model.source_sha256 or 'unknown'}"),
    ]
    if model.strides:
        rows[3:3] = [("strides", ", ".join(map(str, model.strides))), ("anchors", _anchors(model.anchors))]
    return rows


def _activation(model: Metadata) -> str:
    """The default and how many modules have another."""
    others = sorted(set(model.activations.values()))
    return model.activation + (f" ({', '.join(others)} in {len(model.activations)} places)" if others else "")


def _anchors(anchors: Anchors) -> str:
    """Width x height of each anchor, levels separated by bars."""
    return " | ".join(" ".join(f"{width:g}x{height:g}" for width, height in level) for level in anchors)


def _tensor(tensor: TensorInfo) -> str:
    """Name, type and shape."""
    return f"{tensor.name} {tensor.dtype} ({', '.join('batch' if s < 0 else str(s) for s in tensor.shape)})"
