"""YOLOv5's training loss (v6 and v7), written from its description.

Each box is assigned to every anchor whose sides differ from its own by less than four times, in its own cell and in the
two nearest neighbours; box loss is 1 - CIoU, objectness learns the IoU itself, classes are independent binary choices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional

ANCHOR_RATIO_LIMIT = 4.0
LEVEL_BALANCE = (4.0, 1.0, 0.4)
BOX_GAIN, OBJECTNESS_GAIN, CLASS_GAIN = 0.05, 1.0, 0.5
"""YOLOv5's gains for three levels, 80 classes (class) and 640 pixels (objectness); the loss scales them."""
EPSILON = 1e-7


class Assignment(NamedTuple):
    """Which cells and anchors of one level must predict which boxes; all tensors have one row a match.

    Attributes:
        image: int64 (M,).
        anchor: int64 (M,).
        row: int64 (M,).
        column: int64 (M,).
        box: float32 (M, 4): middle relative to the cell's corner, width, height, in cells.
        class_id: int64 (M,).
    """

    image: torch.Tensor
    anchor: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    box: torch.Tensor
    class_id: torch.Tensor


def ciou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Complete IoU (Zheng et al., arXiv:1911.08287) of boxes given as middle, width, height; (..., 4) to (...)."""
    a_low, a_high = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    b_low, b_high = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    inner = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inner + EPSILON
    iou = inner / union
    diagonal = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).square().sum(-1) + EPSILON
    distance = (a[..., :2] - b[..., :2]).square().sum(-1)
    angles = torch.atan(a[..., 2] / (a[..., 3] + EPSILON)) - torch.atan(b[..., 2] / (b[..., 3] + EPSILON))
    aspect = 4 / math.pi**2 * angles.square()
    with torch.no_grad():
        weight = aspect / (aspect - iou + 1 + EPSILON)
    return iou - distance / diagonal - aspect * weight


def assign(targets: torch.Tensor, anchors: torch.Tensor, shape: tuple[int, int], stride: float) -> Assignment:
    """Find the anchors and cells of one level that must predict each box.

    Args:
        targets: float32 (T, 6): image index, class index, middle x and y, width and height in input pixels.
        anchors: float32 (A, 2): width and height in cells.
        shape: Rows and columns of the level.
        stride: Pixels a cell.
    """
    boxes = targets[:, 2:] / stride
    ratio = boxes[None, :, 2:] / anchors[:, None]  # (A, T, 2)
    fits = torch.maximum(ratio, 1 / ratio).amax(-1) < ANCHOR_RATIO_LIMIT
    anchor, target = fits.nonzero(as_tuple=True)
    middle = boxes[target, :2]
    limits = torch.tensor([shape[1], shape[0]], device=middle.device, dtype=middle.dtype)
    rest, mirrored = middle % 1, (limits - middle) % 1
    own = torch.ones(len(target), 1, dtype=torch.bool, device=middle.device)
    before = (rest < 0.5) & (middle > 1)  # left, upper neighbour
    after = (mirrored < 0.5) & (limits - middle > 1)  # right, lower neighbour
    offsets = torch.tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]], device=middle.device)
    which, match = torch.cat((own, before, after), 1).T.nonzero(as_tuple=True)
    cell = (middle[match] - offsets[which]).long()
    anchor, target = anchor[match], target[match]
    column, row = cell[:, 0].clamp(0, shape[1] - 1), cell[:, 1].clamp(0, shape[0] - 1)
    box = torch.cat((boxes[target, :2] - torch.stack((column, row), 1), boxes[target, 2:]), 1)
    return Assignment(targets[target, 0].long(), anchor, row, column, box, targets[target, 1].long())


def detection_loss(
    heads: list[torch.Tensor], targets: torch.Tensor, anchors: torch.Tensor, strides: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch.

    Args:
        heads: Raw logits, one (batch, A, rows, columns, 5 + nc) a level.
        targets: See `assign`.
        anchors: float32 (levels, A, 2): width and height in cells of their level.
        strides: Pixels a cell, by level.

    Returns:
        The sum of the parts for an average picture, and the parts (box, objectness, class) without gradient.
    """
    parts = torch.zeros(3, device=targets.device)
    class_count, rows = heads[0].shape[-1] - 5, heads[0].shape[2]
    for level, head in enumerate(heads):
        found = assign(targets, anchors[level], (head.shape[2], head.shape[3]), strides[level])
        parts = parts + _level_loss(head.float(), found, anchors[level], LEVEL_BALANCE[level])
    scale = 3 / len(heads)
    size = rows * strides[0] / 640
    gains = (BOX_GAIN * scale, OBJECTNESS_GAIN * scale * size**2, CLASS_GAIN * scale * class_count / 80)
    parts = parts * torch.tensor(gains, device=parts.device)
    return parts.sum(), parts.detach()


def _level_loss(head: torch.Tensor, found: Assignment, anchors: torch.Tensor, balance: float) -> torch.Tensor:
    """Box, objectness and class loss of one level, before gains."""
    wanted = torch.zeros(head.shape[:4], device=head.device)
    box_loss = class_loss = head.sum() * 0
    if len(found.image):
        rows = head[found.image, found.anchor, found.row, found.column]  # (M, 5 + nc)
        middle = rows[:, :2].sigmoid() * 2 - 0.5
        sides = (rows[:, 2:4].sigmoid() * 2) ** 2 * anchors[found.anchor]
        overlap = ciou(torch.cat((middle, sides), 1), found.box)
        box_loss = (1 - overlap).mean()
        _, count, height, width = wanted.shape
        flat = ((found.image * count + found.anchor) * height + found.row) * width + found.column
        wanted.view(-1).scatter_reduce_(0, flat, overlap.detach().clamp(min=0), "amax")
        one_hot = functional.one_hot(found.class_id, rows.shape[1] - 5).float()
        class_loss = functional.binary_cross_entropy_with_logits(rows[:, 5:], one_hot)
    objectness = functional.binary_cross_entropy_with_logits(head[..., 4], wanted) * balance
    return torch.stack((box_loss, objectness, class_loss))
