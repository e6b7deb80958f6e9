"""YOLOv5n as a PyTorch module tree with YOLOv5's own attribute names, written for the demo model.

Names of attributes, of tensors and of the pickled classes are an interface: with them, whatever reads an official
checkpoint reads ours. The blocks follow YOLOv5 v6.0 and later: Conv is convolution, BatchNorm, SiLU; C3 is a
cross-stage-partial block of three of them; SPPF is three chained 5 x 5 max pools.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

ANCHORS = [[14, 14, 20, 20, 29, 29], [42, 42, 60, 60, 86, 86], [123, 123, 175, 175, 251, 251]]
"""Signs are about as wide as high: nine squares, evenly spaced in the logarithm from 12 to 300 px; not k-means."""
STRIDES = (8, 16, 32)
MAX_CHANNEL_DIVISOR = 8


def yolov5n_yaml(class_count: int) -> dict[str, Any]:
    """The layer table of YOLOv5n v6.0+: [from, number, module, arguments] before width and depth multiples."""
    return {
        "nc": class_count,
        "depth_multiple": 0.33,
        "width_multiple": 0.25,
        "anchors": [list(level) for level in ANCHORS],
        "backbone": [
            [-1, 1, "Conv", [64, 6, 2, 2]], [-1, 1, "Conv", [128, 3, 2]], [-1, 3, "C3", [128]],
            [-1, 1, "Conv", [256, 3, 2]], [-1, 6, "C3", [256]], [-1, 1, "Conv", [512, 3, 2]], [-1, 9, "C3", [512]],
            [-1, 1, "Conv", [1024, 3, 2]], [-1, 3, "C3", [1024]], [-1, 1, "SPPF", [1024, 5]],
        ],
        "head": [
            [-1, 1, "Conv", [512, 1, 1]], [-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[-1, 6], 1, "Concat", [1]],
            [-1, 3, "C3", [512, False]], [-1, 1, "Conv", [256, 1, 1]], [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
            [[-1, 4], 1, "Concat", [1]], [-1, 3, "C3", [256, False]], [-1, 1, "Conv", [256, 3, 2]],
            [[-1, 14], 1, "Concat", [1]], [-1, 3, "C3", [512, False]], [-1, 1, "Conv", [512, 3, 2]],
            [[-1, 10], 1, "Concat", [1]], [-1, 3, "C3", [1024, False]], [[17, 20, 23], 1, "Detect", ["nc", "anchors"]],
        ],
        "ch": 3,
    }  # fmt: skip


class Conv(nn.Module):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2 if p is None else p, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, c1, h, w) to (batch, c2, h / s, w / s)."""
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """1 x 1 then 3 x 3 convolution, with the input added if `shortcut`."""

    def __init__(self, c1: int, c2: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c2, 1, 1)
        self.cv2 = Conv(c2, c2, 3, 1)
        self.add = shortcut and c1 == c2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keeps the shape."""
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C3(nn.Module):
    """Two branches of half the channels, one with `n` bottlenecks, joined by a 1 x 1 convolution."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        half = c2 // 2
        self.cv1 = Conv(c1, half, 1, 1)
        self.cv2 = Conv(c1, half, 1, 1)
        self.cv3 = Conv(2 * half, c2, 1)
        self.m = nn.Sequential(*(Bottleneck(half, half, shortcut) for _ in range(n)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, c1, h, w) to (batch, c2, h, w)."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPPF(nn.Module):
    """Three chained max pools, all stages concatenated."""

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        half = c1 // 2
        self.cv1 = Conv(c1, half, 1, 1)
        self.cv2 = Conv(half * 4, c2, 1, 1)
        self.m = nn.MaxPool2d(kernel_size=k, stride=1, padding=k // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, c1, h, w) to (batch, c2, h, w)."""
        stages = [self.cv1(x)]
        for _ in range(3):
            stages.append(self.m(stages[-1]))
        return self.cv2(torch.cat(stages, 1))


class Concat(nn.Module):
    """Joins feature maps along dimension `d`."""

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.d = dimension

    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
        """Channels add up."""
        return torch.cat(x, self.d)


class Detect(nn.Module):
    """One 1 x 1 convolution a level: x, y, width, height, objectness and class logits for each of the anchors."""

    def __init__(self, nc: int, anchors: Sequence[Sequence[float]], ch: Sequence[int]) -> None:
        super().__init__()
        self.nc = nc
        self.no = nc + 5
        self.nl = len(anchors)
        self.na = len(anchors[0]) // 2
        self.stride = torch.tensor(STRIDES, dtype=torch.float32)
        pixels = torch.tensor(anchors, dtype=torch.float32).view(self.nl, -1, 2)
        self.register_buffer("anchors", pixels / self.stride.view(-1, 1, 1))
        self.m = nn.ModuleList(nn.Conv2d(channels, self.no * self.na, 1) for channels in ch)
        self.inplace = True

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        """Raw logits, one (batch, anchors, rows, columns, 5 + nc) a level."""
        heads = []
        for convolution, feature in zip(self.m, x, strict=True):
            head = convolution(feature)
            batch, _, rows, columns = head.shape
            heads.append(head.view(batch, self.na, self.no, rows, columns).permute(0, 1, 3, 4, 2))
        return heads

    def initialize_biases(self) -> None:
        """Start from about 8 objects a 640-px picture and evenly likely classes (focal loss paper, section 3.3)."""
        for convolution, stride in zip(self.m, STRIDES, strict=True):
            bias = convolution.bias.detach().view(self.na, -1)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.nc - 0.99999))


class DetectionModel(nn.Module):
    """The network that a YOLOv5 yaml describes."""

    def __init__(self, yaml: dict[str, Any], names: Sequence[str]) -> None:
        super().__init__()
        self.yaml = yaml
        self.model, self.save = _build(yaml)
        self.names = dict(enumerate(names))
        self.nc = yaml["nc"]
        self.stride = self.model[-1].stride
        self.inplace = True
        self.model[-1].initialize_biases()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(batch, 3, height, width) in 0..1, RGB, to raw logits; see `Detect.forward`."""
        kept: list[torch.Tensor | None] = []
        for module in self.model:
            if isinstance(module.f, int):
                value = x if module.f == -1 else kept[module.f]
            else:
                value = [x if index == -1 else kept[index] for index in module.f]
            x = module(value)
            kept.append(x if module.i in self.save else None)
        return x  # type: ignore[return-value]


def _build(yaml: dict[str, Any]) -> tuple[nn.Sequential, list[int]]:
    """The module list and the indices of the layers that later ones read."""
    channels, layers, kept = [yaml["ch"]], [], set()
    for index, (source, number, kind, arguments) in enumerate(yaml["backbone"] + yaml["head"]):
        sources = [source] if isinstance(source, int) else source
        inputs = [channels[0] if index == 0 else channels[s if s < 0 else s + 1] for s in sources]
        depth = max(round(number * yaml["depth_multiple"]), 1) if number > 1 else number
        module, out = _layer(kind, arguments, inputs, (depth, yaml["width_multiple"], yaml))
        module.i, module.f, module.type = index, source, f"models.common.{kind}"
        module.np = sum(parameter.numel() for parameter in module.parameters())
        layers.append(module)
        channels.append(out)
        kept.update(s % index if s < 0 else s for s in sources if s != -1)
    return nn.Sequential(*layers), sorted(kept)


def _layer(
    kind: str, arguments: list[Any], inputs: list[int], scale: tuple[int, float, dict[str, Any]]
) -> tuple[Any, int]:
    """One layer and its number of output channels."""
    depth, width, yaml = scale
    if kind == "Concat":
        return Concat(arguments[0]), sum(inputs)
    if kind == "nn.Upsample":
        return nn.Upsample(None, arguments[1], arguments[2]), inputs[0]
    if kind == "Detect":
        return Detect(yaml["nc"], yaml["anchors"], inputs), 0
    out = math.ceil(arguments[0] * width / MAX_CHANNEL_DIVISOR) * MAX_CHANNEL_DIVISOR
    if kind == "C3":
        return C3(inputs[0], out, depth, *arguments[1:]), out
    return {"Conv": Conv, "SPPF": SPPF}[kind](inputs[0], out, *arguments[1:]), out


_PICKLED_AS = {"models.common": (Conv, Bottleneck, C3, SPPF, Concat), "models.yolo": (Detect, DetectionModel)}
for _module_name, _classes in _PICKLED_AS.items():
    for _class in _classes:
        _class.__module__ = _module_name


@contextlib.contextmanager
def _yolov5_modules() -> Iterator[None]:
    """Let pickle find the classes under YOLOv5's module names."""
    names = ("models", *_PICKLED_AS)
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        for item in _PICKLED_AS.get(name, ()):
            setattr(sys.modules[name], item.__name__, item)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def checkpoint_bytes(model: DetectionModel, epoch: int) -> bytes:
    """A checkpoint in YOLOv5's form: the whole module in half precision, as YOLOv5 strips it when done."""
    copy = DetectionModel(model.yaml, list(model.names.values()))
    copy.load_state_dict(model.state_dict())
    copy = copy.half().eval().requires_grad_(False)
    stream = io.BytesIO()
    with _yolov5_modules():
        torch.save(
            {"epoch": epoch, "best_fitness": None, "model": copy, "ema": None, "updates": None, "optimizer": None},
            stream,
        )
    return stream.getvalue()


def decode(heads: list[torch.Tensor], detect: Detect) -> torch.Tensor:
    """Boxes from raw logits (YOLOv5's v5+ formulas).

    Returns:
        float32 (batch, rows, 5 + nc): x, y of the middle, width, height in input pixels, objectness, class
        probabilities; rows level by level, then anchor, then y, then x.
    """
    levels = []
    for index, head in enumerate(heads):
        batch, anchors, rows, columns, fields = head.shape
        stride, values = float(detect.stride[index]), head.float().sigmoid()
        ys, xs = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        grid = torch.stack((xs, ys), -1).to(values)  # (rows, columns, 2)
        sizes = (detect.anchors[index] * stride).view(1, anchors, 1, 1, 2).to(values)
        middle = (values[..., :2] * 2 - 0.5 + grid) * stride
        levels.append(
            torch.cat((middle, (values[..., 2:4] * 2) ** 2 * sizes, values[..., 4:]), -1).view(batch, -1, fields)
        )
    return torch.cat(levels, 1)
