"""Reading YOLOv5 checkpoints (.pt) without PyTorch and without running anything that the file contains.

A YOLOv5 checkpoint is a pickle of whole Python objects. `inert_pickle` reads those without trusting them, `torch_file`
the numbers; here the tree of modules, or the state_dict, becomes `Weights`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from yolotrt.errors import CheckpointError, WeightsError
from yolotrt.weights.inert_pickle import DAMAGED, StandIn, TensorView, printable
from yolotrt.weights.infer import CLASSIFIER_IMAGE_SIZE, infer_metadata
from yolotrt.weights.model import (
    BATCH_NORM_EPSILON,
    MAX_CLASSES,
    MAX_STRIDE,
    Anchors,
    FloatArray,
    Metadata,
    Weights,
)
from yolotrt.weights.torch_file import TensorReader, open_torch_file, read_torch_file

MAX_MODULES = 20_000
MAX_MODULE_DEPTH = 32
MAX_TENSORS = 100_000
MAX_YAML_DEPTH = 16
MAX_YAML_SIZE = 1_000_000
"""Values and letters; yolov5x6.yaml has some 4,000."""

_MODEL_KEYS: Final = ("ema", "model", "state_dict", "model_state_dict")
_WRAPPERS: Final = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AutoShape": "model",
    "DetectMultiBackend": "model",
}
_TASKS: Final = {"Detect": "detect", "Segment": "segment", "Classify": "classify"}
_BATCH_NORMS: Final = ("BatchNorm2d", "SyncBatchNorm")
_ACTIVATION_ALIASES: Final = {"Swish": "SiLU", "MemoryEfficientSwish": "SiLU", "MemoryEfficientMish": "Mish"}
"""Other implementations of the same function in YOLOv5's utils/activations.py."""
_LEAKY_SLOPE: Final = 0.01
"""PyTorch's default for LeakyReLU."""


def read_checkpoint(path: Path) -> Weights:
    """Read a YOLOv5 checkpoint of any release: a training checkpoint, a bare model or a state_dict.

    Of a training checkpoint the averaged model (`ema`) is taken where there is one. Arrays come out as float32 under
    YOLOv5's state_dict names; integer tensors (`num_batches_tracked`) are left out. Anchors are taken from the last
    layer's `anchors` buffer, which is in cells, times its stride (models/yolo.py, Detect); stored grids are ignored, as
    YOLOv5 6.0 stored them without the -0.5 offset.

    Args:
        path: A file written by `torch.save`, in the zip or the older format.

    Returns:
        float32 arrays and what YOLOv5 knows about them. A state_dict carries no metadata; they are inferred from the
        shapes and `Metadata.inferred` says so.

    Raises:
        CheckpointError: if the file is no such checkpoint, is damaged, or refers to a class or function that a YOLOv5
            checkpoint has no use for. Nothing from the file is run in any case.
        WeightsError: if a state_dict's shapes are not those of a YOLOv5 model.
    """
    try:
        data = read_torch_file(path)
        weights = _parse(data, path)
    except MemoryError as problem:
        raise CheckpointError(f"checkpoint {path} does not fit into memory: use a machine with more") from problem
    digest = hashlib.sha256(data).hexdigest()
    return replace(weights, metadata=replace(weights.metadata, source_sha256=digest))


def _parse(data: bytes, path: Path) -> Weights:
    """The weights in a checkpoint's bytes; its path is for the messages."""
    try:
        return _extract(*open_torch_file(data))
    except (CheckpointError, WeightsError) as problem:
        raise type(problem)(f"checkpoint {path}: {problem}") from problem


def _extract(root: Any, reader: TensorReader) -> Weights:
    """The weights in the main object of a checkpoint."""
    model = _pick_model(root)
    if isinstance(model, dict):
        return _from_state_dict(model, root, reader)
    try:
        return _from_modules(model, reader)
    except WeightsError as problem:
        raise CheckpointError(f"{problem}") from problem


def _pick_model(root: Any) -> StandIn | dict[Any, Any]:
    """The averaged model of a training checkpoint, or its model, or a state_dict.

    Raises:
        CheckpointError: if there is none of them.
    """
    if isinstance(root, StandIn):
        return root
    if isinstance(root, dict):
        candidates = [root.get(key) for key in _MODEL_KEYS]
        # Between releases 4.0 and 5.0 `ema` was a pair of model and number of updates.
        candidates = [value[0] if isinstance(value, tuple) and value else value for value in candidates]
        for candidate in candidates:
            if isinstance(candidate, StandIn):
                return candidate
        for candidate in (*candidates, root):
            if isinstance(candidate, dict) and any(isinstance(value, TensorView) for value in candidate.values()):
                return candidate
    raise CheckpointError("it holds neither a model nor a state_dict: name a .pt file that YOLOv5's train.py wrote")


def _from_state_dict(state: dict[Any, Any], root: Any, reader: TensorReader) -> Weights:
    """Weights from named tensors alone; what they do not tell is inferred from their shapes."""
    tensors = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, TensorView):
            array = reader.read(value)
            if array is not None:
                tensors[_state_dict_name(name)] = array
    metadata = infer_metadata(tensors)
    names = root.get("names")
    if names is not None:
        notes = [note for note in metadata.inferred if not note.startswith("class names")]
        known = _class_names(names, metadata.class_count, notes)
        metadata = replace(metadata, names=known, inferred=tuple(notes))
    if isinstance(root.get("yaml"), dict):
        yaml = _json_yaml(root["yaml"], metadata.class_count)
        metadata = replace(metadata, yaml=yaml, activation=_yaml_activation(yaml) or metadata.activation)
    return Weights(tensors, metadata)


def _state_dict_name(name: str) -> str:
    """The name as `Model.state_dict` has it: saved through wrappers it begins with `module.` or a second `model.`."""
    if not re.fullmatch(r"[A-Za-z0-9_.]{1,500}", name):
        raise CheckpointError(f"it has a tensor named {printable(name)!r}: it is no YOLOv5 checkpoint")
    return re.sub(r"^(?:module\.|model\.)*(?=\d+\.)", "model.", name)


@dataclass(frozen=True)
class _ModuleTree:
    """YOLOv5's model as a list of named modules, depth first, in the order of `named_modules`."""

    root: StandIn
    modules: Mapping[str, StandIn]

    @property
    def layers(self) -> list[StandIn]:
        """The layers of the yaml in order, `model.0` first."""
        container = self.modules.get("model")
        layers = list(container.table("_modules").values()) if container else []
        if not layers or not all(isinstance(layer, StandIn) for layer in layers):
            raise CheckpointError("its model has no layers: name a .pt file that YOLOv5's train.py wrote")
        return layers

    @property
    def class_names(self) -> frozenset[str]:
        """Names of all classes of the modules."""
        return frozenset(module.kind.name for module in self.modules.values())


def _from_modules(model: StandIn, reader: TensorReader) -> Weights:
    """Weights from a whole pickled model."""
    tree = _module_tree(model)
    layers = tree.layers
    head = layers[-1]
    if head.kind.name not in _TASKS:
        raise CheckpointError(
            f"its last layer is {head.kind}, which YOLOv5 does not have: only Detect, Segment and Classify can be built"
        )
    tensors = dict(_read_tensors(tree, reader))
    activation, activations = _activations(tree)
    epsilon, epsilons = _batch_norm_epsilons(tree)
    prefix = f"model.{len(layers) - 1}."
    task = _TASKS[head.kind.name]
    strides = () if task == "classify" else _strides(tree, head, reader)
    anchors = () if task == "classify" else _anchors(tensors.get(f"{prefix}anchors"), strides)
    class_count = _class_count(tensors, prefix, _head_tensor(tensors, prefix, head), task, anchors)
    notes: list[str] = []
    metadata = Metadata(
        yaml=_model_yaml(tree, task, tensors, class_count, notes),
        names=_class_names(tree.root.get("names"), class_count, notes),
        strides=strides,
        anchors=anchors,
        task=task,
        version=_version(tree, head),
        activation=activation,
        activations=activations,
        batch_norm_epsilon=epsilon,
        batch_norm_epsilons=epsilons,
        imgsz=_image_size(task, strides),
        inferred=tuple(notes),
    )
    return Weights(tensors, metadata)


def _module_tree(model: StandIn) -> _ModuleTree:
    """All modules of a model, without the wrappers around it.

    Raises:
        CheckpointError: if there are too many, they are nested too deep (or in a circle) or have impossible names.
    """
    model = _unwrap(model)
    modules: dict[str, StandIn] = {}
    waiting: list[tuple[str, int, StandIn]] = [("", 0, model)]
    while waiting:
        name, depth, module = waiting.pop()
        modules[name] = module
        children = module.table("_modules")
        if depth > MAX_MODULE_DEPTH or len(modules) + len(waiting) + len(children) > MAX_MODULES:
            raise CheckpointError("its modules are nested too deep or are too many: it is no YOLOv5 checkpoint")
        for key, child in reversed(children.items()):
            if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,64}", key):
                raise CheckpointError(f"it has a module named {printable(str(key))!r}: it is no YOLOv5 checkpoint")
            if isinstance(child, StandIn):
                waiting.append((f"{name}.{key}" if name else key, depth + 1, child))
    return _ModuleTree(model, modules)


def _unwrap(model: StandIn) -> StandIn:
    """The model inside DataParallel and its like. Wrappers in a circle are left to `_module_tree` to refuse."""
    for _ in range(MAX_MODULE_DEPTH):
        inner = model.table("_modules").get(_WRAPPERS.get(model.kind.name, ""))
        if not isinstance(inner, StandIn):
            break
        model = inner
    return model


def _read_tensors(tree: _ModuleTree, reader: TensorReader) -> Iterator[tuple[str, FloatArray]]:
    """The floating-point parameters and buffers of all modules, as `state_dict` names them.

    Raises:
        CheckpointError: if there are too many, or one is damaged.
    """
    seen = 0
    for name, module in tree.modules.items():
        hidden = module.get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, (list, tuple)) else ()
        parameters, buffers = module.table("_parameters"), module.table("_buffers")
        # Each buffer is compared with every hidden name, which one small list can be for thousands of modules.
        seen += len(parameters) + len(buffers) * (1 + len(hidden))
        if seen > MAX_TENSORS:
            raise CheckpointError("it has too many tensors: it is no YOLOv5 checkpoint")
        stored = [*parameters.items(), *((key, value) for key, value in buffers.items() if key not in hidden)]
        for key, value in stored:
            array = reader.read(value) if isinstance(value, TensorView) else None
            if array is not None:
                yield _state_dict_name(f"{name}.{key}" if name else str(key)), array


def _strides(tree: _ModuleTree, head: StandIn, reader: TensorReader) -> tuple[int, ...]:
    """Input pixels per cell of each level.

    Raises:
        CheckpointError: if the model does not say, or the values are no whole numbers.
    """
    for owner in (head, tree.root):
        stored = owner.get("stride")
        values = reader.read(stored) if isinstance(stored, TensorView) else None
        if values is not None and values.ndim == 1:
            if not all(1 <= value <= MAX_STRIDE and float(value).is_integer() for value in values):
                break
            return tuple(int(value) for value in values)
    raise CheckpointError("its detection layer has no valid strides: save it again from YOLOv5 after a forward pass")


def _anchors(cells: FloatArray | None, strides: tuple[int, ...]) -> Anchors:
    """Anchors in pixels from the `anchors` buffer, (levels, anchors, 2) in cells of each level."""
    if (
        cells is None
        or cells.ndim != 3
        or cells.shape[0] != len(strides)
        or cells.shape[2] != 2
        or not _positive(cells)
    ):
        raise CheckpointError("its detection layer has no anchors for its strides: it is no YOLOv5 checkpoint")
    return tuple(
        tuple((float(width) * stride, float(height) * stride) for width, height in level)
        for level, stride in zip(cells.tolist(), strides, strict=True)
    )


def _positive(values: FloatArray) -> bool:
    return bool(np.all(np.isfinite(values) & (values > 0)))


def _head_tensor(tensors: Mapping[str, FloatArray], prefix: str, head: StandIn) -> str:
    """The kernel of a detection level; in release 1.0 it belongs to a layer that Detect reads (models/yolo.py)."""
    name = f"{prefix}m.0.weight"
    sources = head.get("f")
    if name in tensors or not isinstance(sources, (list, tuple)) or not sources or not isinstance(sources[0], int):
        return name
    last = int(prefix.split(".")[1])
    return f"model.{sources[0] + last if sources[0] < 0 else sources[0]}.weight"


def _class_count(tensors: Mapping[str, FloatArray], prefix: str, head_tensor: str, task: str, anchors: Anchors) -> int:
    """Number of classes, from the shape of the last layer's weights, as a yaml may still say that of another data set.

    Detect has anchors x (5 + classes) outputs, Segment anchors x (5 + classes + mask coefficients) (models/yolo.py).

    Raises:
        CheckpointError: if the shapes do not give one.
    """
    if task == "classify":
        rows = _row_count(tensors, f"{prefix}linear.weight")
        classes, rest = rows, 0
    else:
        per_anchor, rest = divmod(_row_count(tensors, head_tensor), len(anchors[0]))
        masks = _row_count(tensors, f"{prefix}proto.cv3.conv.weight") if task == "segment" else 0
        classes = per_anchor - 5 - masks
    if rest or not 1 <= classes <= MAX_CLASSES:
        raise CheckpointError(f"the shape of its last layer does not give a number of classes: {DAMAGED}")
    return classes


def _row_count(tensors: Mapping[str, FloatArray], name: str) -> int:
    """Number of outputs of a convolution or linear layer."""
    if name not in tensors or tensors[name].ndim < 2:
        raise CheckpointError(f"it has no tensor {name}: {DAMAGED}")
    return int(tensors[name].shape[0])


def _class_names(stored: Any, count: int, notes: list[str]) -> tuple[str, ...]:
    """One printable name for every class, such as `class3` where there is none.

    Older releases have a list, newer ones a dictionary by index.
    """
    known: dict[Any, Any] = {}
    if isinstance(stored, (list, tuple)):
        known = dict(enumerate(stored))
    elif isinstance(stored, dict):
        known = stored
    if len(known) != count:
        notes.append(f"class names: the file has {len(known)} for {count} classes")
    return tuple(_class_name(known.get(index, known.get(str(index))), index) for index in range(count))


def _class_name(stored: Any, index: int) -> str:
    return printable(str(stored)) if isinstance(stored, (str, int, float)) else f"class{index}"


def _version(tree: _ModuleTree, head: StandIn) -> str:
    """YOLOv5's release, as far as its classes tell.

    6.0 replaced Focus and SPP by a convolution and SPPF and was the last to store `anchor_grid`; 6.2 named the model
    class after its task; 4.0 brought C3 and SiLU, 3.0 Hardswish (YOLOv5's release notes).
    """
    classes = tree.class_names
    if tree.root.kind.name == "SegmentationModel":
        return "v7.0+"
    if tree.root.kind.name in ("DetectionModel", "ClassificationModel"):
        return "v6.2+"
    if "Focus" in classes:
        if "C3" in classes:
            return "v4.0-v5.0"
        return "v3.0-v3.1" if "Hardswish" in classes else "v1.0-v2.0"
    if "SPPF" in classes:
        return "v6.0" if "anchor_grid" in head.table("_buffers") else "v6.1+"
    return ""


def _activations(tree: _ModuleTree) -> tuple[str, dict[str, str]]:
    """The most frequent activation, and by module name those that differ from it."""
    labels = {name: _activation_label(module) for name, module in tree.modules.items() if name.endswith(".act")}
    if not labels:
        return "SiLU", {}
    default, _ = Counter(labels.values()).most_common(1)[0]
    return default, {name: label for name, label in labels.items() if label != default}


def _activation_label(module: StandIn) -> str:
    """An activation's name as `Metadata.activation` has it, such as ``LeakyReLU(0.1)``."""
    name = _ACTIVATION_ALIASES.get(module.kind.name, module.kind.name)
    if name != "LeakyReLU":
        return name
    slope = module.get("negative_slope")
    return f"LeakyReLU({slope if isinstance(slope, (int, float)) else _LEAKY_SLOPE:g})"


def _yaml_activation(yaml: Mapping[str, Any]) -> str:
    """The activation that a yaml sets for all convolutions, such as ``nn.LeakyReLU(0.1)``, or an empty string.

    Raises:
        CheckpointError: if it is something else than the name of a module and at most one number.
    """
    stored = yaml.get("activation")
    if stored is None:
        return ""
    problem = CheckpointError(f"its yaml sets the activation {printable(str(stored))!r}, which is not understood")
    match = re.fullmatch(r"(?:torch\.)?nn\.([A-Za-z0-9]{1,40})\(\s*([0-9.eE+-]{0,20})[^()]{0,60}\)", str(stored))
    if not match:
        raise problem
    name, slope = match.groups()
    try:
        return f"LeakyReLU({float(slope or _LEAKY_SLOPE):g})" if name == "LeakyReLU" else name
    except ValueError:
        raise CheckpointError(
            f"its yaml sets the activation {printable(str(stored))!r}, which is not understood"
        ) from None


def _batch_norm_epsilons(tree: _ModuleTree) -> tuple[float, dict[str, float]]:
    """The most frequent epsilon of all BatchNorm2d, and by module name those that differ from it.

    A classifier's last layer has PyTorch's own, as it is made after YOLOv5 has set its own everywhere else.

    Raises:
        CheckpointError: if one is no positive number below 1.
    """
    epsilons = {name: module.get("eps") for name, module in tree.modules.items() if module.kind.name in _BATCH_NORMS}
    for name, epsilon in epsilons.items():
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise CheckpointError(f"{name} has no valid epsilon: {DAMAGED}")
    if not epsilons:  # a fused model
        return BATCH_NORM_EPSILON, {}
    default, _ = Counter(epsilons.values()).most_common(1)[0]
    return default, {name: epsilon for name, epsilon in epsilons.items() if epsilon != default}


def _image_size(task: str, strides: tuple[int, ...]) -> tuple[int, int]:
    """What YOLOv5 trains a model of this kind with: 1280 pixels for P6, which has a level of stride 64."""
    if task == "classify":
        return CLASSIFIER_IMAGE_SIZE, CLASSIFIER_IMAGE_SIZE
    return (1280, 1280) if max(strides) >= 64 else (640, 640)


def _model_yaml(
    tree: _ModuleTree, task: str, tensors: Mapping[str, FloatArray], class_count: int, notes: list[str]
) -> Mapping[str, Any]:
    """The yaml that the model was made from, or one inferred from shapes: YOLOv5's classification models keep none."""
    stored = tree.root.get("yaml")
    if not isinstance(stored, dict):
        stored = tree.root.get("md")  # its name in release 1.0
    if isinstance(stored, dict) and task != "classify":
        return _json_yaml(stored, class_count)
    notes.append("model description: the file has none, so it was concluded from the tensors' shapes")
    return infer_metadata(tensors).yaml


def _json_yaml(stored: dict[Any, Any], class_count: int) -> dict[str, Any]:
    """A copy of JSON types only, with the true number of classes."""
    plain = _json_value(stored, MAX_YAML_DEPTH, [MAX_YAML_SIZE])
    return {**plain, "nc": class_count}


def _json_value(value: Any, depth: int, budget: list[int]) -> Any:
    """`value` as JSON has it; what JSON has no type for becomes its class's name.

    Args:
        value: What the unpickler made.
        depth: How deep it may be nested.
        budget: How many values and letters there may be, counted down. References let a small file look endless.

    Raises:
        CheckpointError: if it is nested too deep or has too many values.
    """
    budget[0] -= 1 + (len(value) if isinstance(value, str) else 0)
    if depth < 0 or budget[0] < 0:
        raise CheckpointError("its model's yaml is nested too deep or too long: it is no YOLOv5 checkpoint")
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)):
        return [_json_value(item, depth - 1, budget) for item in value]
    if isinstance(value, dict):
        return {
            str(_json_value(key, depth - 1, budget)): _json_value(item, depth - 1, budget)
            for key, item in value.items()
        }
    return str(value.kind) if isinstance(value, StandIn) else type(value).__name__
