"""Train the demo model, a YOLOv5n, on pictures that it renders.

Usage:
    python tools/demo_model/train.py --out DIR [--count 12000] [--epochs 120 | --schedule-minutes M] [--minutes M]
                                     [--resume FILE] [--compile] [--smoke]

Pictures are rendered by a pool of processes, then live on the device as bytes; mosaic, scaling and colour changes
happen there too. Writes DIR/best.pt (a checkpoint like YOLOv5's, fp16), DIR/state.pt (to resume) and
DIR/metrics.json. With `--minutes` the run stops cleanly and `--resume DIR/state.pt` goes on with the same schedule
and the same random numbers.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import mmap
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import scene  # noqa: E402
from loss import detection_loss  # noqa: E402
from metrics import Boxes, average_precision, select  # noqa: E402
from model import STRIDES, DetectionModel, checkpoint_bytes, decode, yolov5n_yaml  # noqa: E402

TRAIN_SEED, EVAL_SEED, EMPTY_SEED = 1, 900, 901
"""Sets of pictures: for training, for the held-out figures, and without signs."""
SMALL_SIDE = 24.0
FALSE_BOX_CONFIDENCE = 0.25
PAD = 114 / 255
"""YOLOv5's letterbox grey."""


@dataclass(frozen=True)
class Plan:
    """What a run does; kept in the state file, so that a resumed run goes on with the same plan.

    Attributes:
        count: Training pictures.
        eval_count: Held-out pictures, and as many sign-free ones.
        size: Side of the pictures in pixels.
        batch: Pictures a step.
        epochs: Length of the schedule; 0 until `schedule_minutes` has been turned into steps.
        schedule_minutes: Minutes of training that the schedule shall fill, over all pieces; used if epochs is 0.
        seed: Decides weights, order and augmentation.
        rate: SGD's first learning rate; the last is a hundredth of it (cosine).
        momentum: SGD's, with Nesterov's rule.
        decay: Weight decay of the convolutions.
        warm_up: Steps of warm-up.
        mosaic: Share of training pictures made of four; none in the last tenth of the schedule.
        ema_decay: Of the averaged weights; lower than YOLOv5's 0.9999 because the schedule is shorter.
        ema_ramp: Steps in which that decay comes up.
        total_steps: Length of the schedule in steps; 0 while unknown.
    """

    count: int = 12_000
    eval_count: int = 500
    size: int = 640
    batch: int = 128
    epochs: int = 0
    schedule_minutes: float = 12.0
    seed: int = 0
    rate: float = 0.01
    momentum: float = 0.937
    decay: float = 5e-4
    warm_up: int = 300
    mosaic: float = 0.7
    ema_decay: float = 0.9995
    ema_ramp: float = 400.0
    total_steps: int = 0


SMOKE = Plan(
    count=32, eval_count=16, size=160, batch=8, epochs=10, rate=0.03, warm_up=4, mosaic=0.3, ema_decay=0.9, ema_ramp=10
)


@dataclass(frozen=True)
class Pictures:
    """A rendered dataset in memory.

    Attributes:
        images: uint8 (N, 3, size, size), RGB.
        labels: float32 (N, 8, 5): class, left, top, right, bottom in pixels; class -1 where there is none.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Pictures:
        """The same on another device."""
        return Pictures(self.images.to(device), self.labels.to(device))


_shared: dict[str, npt.NDArray[Any]] = {}


def render_pictures(seed: int, count: int, size: int, max_signs: int, workers: int) -> Pictures:
    """Render a dataset, with `workers` processes that write into shared memory (0: in this process).

    Must run before the first use of CUDA, since the processes are forked.
    """

    def shared(shape: tuple[int, ...], kind: type) -> npt.NDArray[Any]:
        return np.frombuffer(mmap.mmap(-1, math.prod(shape) * np.dtype(kind).itemsize), kind).reshape(shape)

    _shared["images"] = shared((count, 3, size, size), np.uint8)
    _shared["labels"] = shared((count, scene.MAX_SIGNS, 5), np.float32)
    tasks = [(index, seed * scene.SEED_STEP + index, size, max_signs) for index in range(count)]
    if workers == 0:
        for task in tasks:
            _render_into(task)
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for _ in pool.imap_unordered(_render_into, tasks, chunksize=16):
                pass
    return Pictures(torch.from_numpy(_shared.pop("images")), torch.from_numpy(_shared.pop("labels")))


def _render_into(task: tuple[int, int, int, int]) -> None:
    index, seed, size, max_signs = task
    scene.cv2.setNumThreads(1)
    image, boxes, class_ids = scene.render_scene(seed, (size, size), max_signs)
    _shared["images"][index] = image[..., ::-1].transpose(2, 0, 1)
    labels = _shared["labels"][index]
    labels[:] = -1
    labels[: len(boxes), 0], labels[: len(boxes), 1:] = class_ids, boxes


# Augmentation on the device.

MOSAIC_SCALES, SINGLE_SCALES = (0.5, 1.5), (0.75, 1.35)
LEAST_VISIBLE, LEAST_SIDE = 0.35, 6.0
"""A box that a mosaic cuts below this share, or scales below this many pixels, is no longer a label."""


@dataclass(frozen=True)
class Layout:
    """Where the four tiles of each output picture lie; all float32, in output pixels.

    Attributes:
        centre: (B, 2): where the quadrants meet.
        scale: (B, 4): output pixels a tile pixel.
        origin: (B, 4, 2): where a tile's upper left corner falls.
    """

    centre: torch.Tensor
    scale: torch.Tensor
    origin: torch.Tensor


def _quadrants(centre: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper left and lower right corners (B, 4, 2) of the quadrants, row by row."""
    x, y = centre[:, 0], centre[:, 1]
    zero, end = torch.zeros_like(x), torch.full_like(x, size)
    low = torch.stack([torch.stack(p, 1) for p in ((zero, zero), (x, zero), (zero, y), (x, y))], 1)
    high = torch.stack([torch.stack(p, 1) for p in ((x, y), (end, y), (x, end), (end, end))], 1)
    return low, high


def pick_layout(batch: int, size: int, share: float, generator: torch.Generator, device: torch.device) -> Layout:
    """Random layouts: a `share` of mosaics, the others one scaled and shifted picture that fills its quadrant."""

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    mosaic = uniform(batch, 1) < share
    centre = torch.where(
        mosaic, (0.25 + 0.5 * uniform(batch, 2)) * size, torch.full((batch, 2), float(size), device=device)
    )
    span = uniform(batch, 4)
    scales = [low * (high / low) ** span for low, high in (MOSAIC_SCALES, SINGLE_SCALES)]
    scale = torch.where(mosaic, scales[0], scales[1])
    low, high = _quadrants(centre, size)
    origin = low + (high - scale[..., None] * size - low) * uniform(batch, 4, 2)
    return Layout(centre, scale, origin)


def compose(data: Pictures, index: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Build augmented pictures from four tiles each.

    Args:
        data: The dataset, on the device.
        index: int64 (B, 4): the tiles' pictures.
        layout: Where they go.

    Returns:
        Pictures, float32 (B, 3, size, size) in 0..1, and targets (T, 6); see `loss.assign`.
    """
    batch, size = len(index), data.images.shape[-1]
    tiles = data.images[index.reshape(-1)].view(batch, 2, 2, 3, size, size)
    atlas = tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, 2 * size, 2 * size).float()
    axis = torch.arange(size, device=atlas.device) + 0.5
    right = axis[None] >= layout.centre[:, :1]  # (B, size)
    below = axis[None] >= layout.centre[:, 1:]
    quadrant = below[:, :, None].long() * 2 + right[:, None, :].long()  # (B, size, size)
    flat = quadrant.view(batch, -1)
    scale = layout.scale.gather(1, flat).view_as(quadrant)
    source = []
    for dimension, position in enumerate((axis[None, None, :], axis[None, :, None])):
        origin = layout.origin[..., dimension].gather(1, flat).view_as(quadrant)
        source.append((position - origin) / scale)
    inside = (source[0] >= 0) & (source[0] < size) & (source[1] >= 0) & (source[1] < size)
    # Clamped to the middles of the edge pixels, so that no tile bleeds into its neighbour in the atlas.
    column, row = (position.clamp(0.5, size - 0.5) for position in source)
    grid = torch.stack((column + size * (quadrant % 2), row + size * (quadrant // 2)), -1) / size - 1
    images = functional.grid_sample(atlas, grid, mode="bilinear", padding_mode="border", align_corners=False) / 255
    images = torch.where(inside[:, None], images, torch.full_like(images[:1, :1, :1, :1], PAD))
    return images, _move_labels(data.labels[index], layout, size)


def _move_labels(labels: torch.Tensor, layout: Layout, size: int) -> torch.Tensor:
    """Labels (B, 4, 8, 5) of the tiles to targets (T, 6) of the composed pictures."""
    low, high = (corner[:, :, None] for corner in _quadrants(layout.centre, size))  # (B, 4, 1, 2)
    scale, origin = layout.scale[..., None, None], layout.origin[:, :, None]
    corner_a, corner_b = labels[..., 1:3] * scale + origin, labels[..., 3:5] * scale + origin
    area = (corner_b - corner_a).prod(-1)
    corner_a, corner_b = corner_a.clamp(low, high), corner_b.clamp(low, high)
    sides = corner_b - corner_a
    good = (labels[..., 0] >= 0) & (sides.amin(-1) >= LEAST_SIDE) & (sides.prod(-1) > LEAST_VISIBLE * area)
    image = torch.arange(len(labels), device=labels.device).view(-1, 1, 1).expand_as(good)
    rows = torch.cat((image[..., None], labels[..., :1], (corner_a + corner_b) / 2, sides), -1)
    return rows[good].float()


def change_colours(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random brightness, saturation and a slight turn of the hue, one 3 x 3 matrix a picture."""
    batch = len(images)
    noise = torch.rand(batch, 3, generator=generator) * 2 - 1
    brightness, saturation, hue = 1 + 0.35 * noise[:, 0], 1 + 0.5 * noise[:, 1], 0.12 * noise[:, 2]
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turn = torch.zeros(batch, 3, 3)
    turn[:, 0, 0] = brightness
    turn[:, 1, 1] = turn[:, 2, 2] = brightness * saturation * hue.cos()
    turn[:, 1, 2] = brightness * saturation * hue.sin()
    turn[:, 2, 1] = -turn[:, 1, 2]
    matrix = (torch.linalg.inv(to_yiq) @ turn @ to_yiq).to(images.device)
    return torch.bmm(matrix, images.flatten(2)).view_as(images).clamp_(0, 1)


# Optimization.


class Average:
    """Exponential moving average of a model's weights and statistics, with a ramp."""

    def __init__(self, model: DetectionModel, plan: Plan) -> None:
        self.plan = plan
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: DetectionModel, step: int) -> None:
        """Move the average towards the model; `step` counts from 1."""
        decay = self.plan.ema_decay * (1 - math.exp(-step / self.plan.ema_ramp))
        current = model.state_dict()
        names = [name for name, value in self.values.items() if value.dtype.is_floating_point]
        torch._foreach_lerp_([self.values[name] for name in names], [current[name] for name in names], 1 - decay)


def make_optimizer(model: DetectionModel, plan: Plan) -> torch.optim.SGD:
    """SGD with weight decay on convolution weights only; the biases are the last group, for their own warm-up."""
    weights = [p for name, p in model.named_parameters() if p.ndim == 4]
    norms = [p for name, p in model.named_parameters() if p.ndim == 1 and name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": plan.decay}, {"params": norms}, {"params": biases}]
    return torch.optim.SGD(groups, lr=plan.rate, momentum=plan.momentum, nesterov=True)


def set_rates(optimizer: torch.optim.SGD, plan: Plan, step: int) -> None:
    """YOLOv5's schedule: cosine to a hundredth; in the warm-up weights from 0, biases from 0.1, momentum from 0.8."""
    total = plan.total_steps or 1_000_000
    rate = plan.rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, step / total))) / 2)
    ramp = min(1.0, step / max(1, plan.warm_up))
    for group, start in zip(optimizer.param_groups, (0.0, 0.0, 0.1), strict=True):
        group["lr"] = start + (rate - start) * ramp
        group["momentum"] = 0.8 + (plan.momentum - 0.8) * ramp


@dataclass
class Run:
    """Everything that changes while training."""

    plan: Plan
    model: DetectionModel
    average: Average
    optimizer: torch.optim.SGD
    step: int = 0
    history: list[list[float]] = field(default_factory=list)

    @classmethod
    def start(cls, plan: Plan, device: torch.device) -> Run:
        """A fresh run; the seed decides the first weights."""
        torch.manual_seed(plan.seed)
        model = DetectionModel(yolov5n_yaml(len(scene.CLASS_NAMES)), scene.CLASS_NAMES).to(device)
        model = model.to(memory_format=torch.channels_last)
        return cls(plan, model, Average(model, plan), make_optimizer(model, plan))

    @classmethod
    def resume(cls, path: Path, device: torch.device) -> Run:
        """Continue from what `save` wrote.

        Raises:
            InputError: if the file is not such a state.
        """
        from yolotrt.errors import InputError
        from yolotrt.files import require_file

        try:
            state = torch.load(require_file(path, "state"), map_location=device, weights_only=True)
            run = cls.start(Plan(**state["plan"]), device)
            run.model.load_state_dict(state["model"])
            run.average.values = {name: value.to(run.average.values[name]) for name, value in state["average"].items()}
            for parameter, buffer in zip(_parameters(run.optimizer), state["momentum"], strict=True):
                if buffer is not None:
                    run.optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter)
            run.step, run.history = state["step"], state["history"]
        except (KeyError, TypeError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as problem:
            reason = str(problem).split("\n")[0].split(". ")[0]
            raise InputError(f"{path} is no state of a training run ({reason}): name the state.pt of one") from problem
        return run

    def save(self, path: Path) -> None:
        """Write the state: weights in fp32, average and momentum in 16 bits, which keeps the file below 16 MiB."""
        buffers = [self.optimizer.state[p].get("momentum_buffer") for p in _parameters(self.optimizer)]
        state = {
            "plan": asdict(self.plan),
            "step": self.step,
            "history": self.history,
            "model": {name: value.cpu().contiguous() for name, value in self.model.state_dict().items()},
            "average": {name: _halve(value, torch.float16) for name, value in self.average.values.items()},
            "momentum": [None if buffer is None else _halve(buffer, torch.bfloat16) for buffer in buffers],
        }
        stream = io.BytesIO()
        torch.save(state, stream)
        write_bytes(path, stream.getvalue())

    def averaged(self) -> DetectionModel:
        """A model with the averaged weights, for evaluation."""
        model = DetectionModel(self.model.yaml, scene.CLASS_NAMES).to(next(self.model.parameters()).device)
        model.load_state_dict(self.average.values)
        return model.eval()


def _parameters(optimizer: torch.optim.SGD) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _halve(value: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    return (value.to(kind) if value.dtype.is_floating_point else value).cpu().contiguous()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    from yolotrt.files import atomic_write

    with atomic_write(path) as file:
        file.write(content)


def pick_tiles(plan: Plan, step: int, generator: torch.Generator) -> torch.Tensor:
    """The pictures of a step, int64 (batch, 4): the first of each row goes through the set once an epoch."""
    per_epoch = max(1, plan.count // plan.batch)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(plan.count, generator=torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch))
    index = torch.randint(plan.count, (plan.batch, 4), generator=generator)
    index[:, 0] = order[torch.arange(position * plan.batch, (position + 1) * plan.batch) % plan.count]
    return index


def make_batch(data: Pictures, plan: Plan, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The augmented pictures and targets of a step; a function of plan and step alone, so that a resumed run agrees."""
    device = data.images.device
    generator = torch.Generator().manual_seed(plan.seed * 7_919 + step)
    index = pick_tiles(plan, step, generator).to(device)
    last = plan.total_steps and step > 0.9 * plan.total_steps
    layout = pick_layout(plan.batch, plan.size, 0.0 if last else plan.mosaic, generator, device)
    images, targets = compose(data, index, layout)
    images = change_colours(images, generator)
    return images.contiguous(memory_format=torch.channels_last), targets


TIMING_STEPS = 60
"""Steps after which the speed is known well enough to turn minutes into a number of steps."""
LOG_EVERY = 50


def train(run: Run, data: Pictures, deadline: float, compiled: bool) -> None:
    """Train until the schedule ends or `time.monotonic()` passes `deadline`."""
    forward = torch.compile(run.model) if compiled else run.model
    device = data.images.device
    run.model.train()
    first, began, sums = run.step, time.monotonic(), torch.zeros(5, device=device)  # the last counts the steps
    while not run.plan.total_steps or run.step < run.plan.total_steps:
        images, targets = make_batch(data, run.plan, run.step)
        set_rates(run.optimizer, run.plan, run.step)
        loss, parts = _step(run, forward, images, targets)
        run.step += 1
        sums += torch.cat((loss[None], parts, torch.ones_like(loss[None])))
        every = min(LOG_EVERY, max(1, run.plan.count // run.plan.batch))
        if run.step % every == 0:
            run.history.append([run.step, *(round(value, 5) for value in (sums[:4] / sums[4]).tolist())])
            sums.zero_()
            _report(run, began, first)
        if run.step - first == TIMING_STEPS // 2:  # after compilation and warm-up
            _wait(device)
            steady = time.monotonic()
        if not run.plan.total_steps and run.step - first == TIMING_STEPS:
            _wait(device)
            rate = (TIMING_STEPS - TIMING_STEPS // 2) / (time.monotonic() - steady)
            run.plan = replace(run.plan, total_steps=int(rate * 60 * run.plan.schedule_minutes))
            print(f"{rate * run.plan.batch:.0f} pictures/s: a schedule of {run.plan.total_steps} steps", flush=True)
        if time.monotonic() > deadline:
            return


def _step(run: Run, forward: Any, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of SGD and of the average; the loss grows with the batch as in YOLOv5, for 64 pictures at least."""
    detect = run.model.model[-1]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        heads = forward(images)
    loss, parts = detection_loss(heads, targets, detect.anchors, STRIDES)
    run.optimizer.zero_grad(set_to_none=True)
    (loss * max(run.plan.batch, 64)).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 10.0, foreach=True)
    run.optimizer.step()
    run.average.update(run.model, run.step + 1)
    return loss.detach(), parts


def _report(run: Run, began: float, first: int) -> None:
    total, box, objectness, classes = run.history[-1][1:]
    rate = (run.step - first) * run.plan.batch / (time.monotonic() - began)
    print(f"step {run.step}/{run.plan.total_steps or '?'} loss {total:.4f} (box {box:.4f} objectness {objectness:.4f} "
          f"class {classes:.4f}) {rate:.0f} pictures/s", flush=True)  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# Evaluation.


@torch.no_grad()
def predict(model: DetectionModel, images: torch.Tensor, confidence: float, batch: int = 32) -> list[Boxes]:
    """Detections of uint8 pictures (N, 3, size, size); NMS at IoU 0.6 as in YOLOv5's evaluation."""
    found, device = [], next(model.parameters()).device
    for start in range(0, len(images), batch):
        heads = model(images[start : start + batch].to(device).float() / 255)
        found += [select(rows, confidence, 0.6) for rows in decode(heads, model.model[-1]).cpu().numpy()]
    return found


def labelled_boxes(data: Pictures) -> list[Boxes]:
    """The labels as `Boxes`."""
    labels = [rows[rows[:, 0] >= 0] for rows in data.labels.cpu().numpy()]
    return [Boxes(rows[:, 1:], rows[:, 0].astype(np.int64), np.ones(len(rows), np.float32)) for rows in labels]


def evaluate(model: DetectionModel, held_out: Pictures, empty: Pictures) -> dict[str, Any]:
    """Mean average precision on held-out pictures, for all signs and by size, and false boxes on sign-free pictures."""
    found, truth = predict(model, held_out.images, 0.001), labelled_boxes(held_out)
    count = len(scene.CLASS_NAMES)
    table = average_precision(found, truth, count)
    result: dict[str, Any] = {"images": len(truth), "signs": sum(len(boxes.class_id) for boxes in truth)}
    for name, sides in (("", (0, 1e9)), ("_small", (0, SMALL_SIDE)), ("_large", (SMALL_SIDE, 1e9))):
        part = table if not name else average_precision(found, truth, count, sides)
        result[f"map50{name}"], result[f"map50_95{name}"] = _mean(part[:, 0]), _mean(part)
    result["by_class"] = {
        name: [round(float(row[0]), 4), round(float(row.mean()), 4)] if not np.isnan(row[0]) else None
        for name, row in zip(scene.CLASS_NAMES, table, strict=True)
    }
    false = predict(model, empty.images, FALSE_BOX_CONFIDENCE)
    result["empty_images"], result["false_boxes"] = len(false), sum(len(boxes.class_id) for boxes in false)
    return result


def _mean(values: npt.NDArray[np.float32]) -> float | None:
    present = values[~np.isnan(values)]
    return round(float(present.mean()), 5) if len(present) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    from yolotrt.errors import YolotrtError

    began, options = time.monotonic(), _parser().parse_args(arguments)
    if options.smoke:  # with so little work a step, threads that wait for each other on a busy machine cost minutes
        torch.set_num_threads(1)
    try:
        _train_and_write(options, began)
    except YolotrtError as problem:
        print(f"train.py: error: {problem}", file=sys.stderr)
        return problem.exit_status
    return 0


def _train_and_write(options: argparse.Namespace, began: float) -> None:
    plan = Run.resume(options.resume, torch.device("cpu")).plan if options.resume else _plan(options)
    workers = options.workers
    data = render_pictures(TRAIN_SEED, plan.count, plan.size, scene.MAX_SIGNS, workers)
    held_out = render_pictures(EVAL_SEED, plan.eval_count, plan.size, scene.MAX_SIGNS, workers)
    empty = render_pictures(EMPTY_SEED, plan.eval_count, plan.size, 0, workers)
    seconds = time.monotonic() - began
    print(
        f"{plan.count + 2 * plan.eval_count} pictures rendered in {seconds:.1f} s by {max(1, workers)} processes",
        flush=True,
    )
    device = torch.device("cuda" if torch.cuda.is_available() and not options.smoke else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    run = Run.resume(options.resume, device) if options.resume else Run.start(plan, device)
    if run.plan.epochs and not run.plan.total_steps:
        run.plan = replace(run.plan, total_steps=run.plan.epochs * max(1, plan.count // plan.batch))
    train(run, data.to(device), began + 60 * options.minutes, options.compile)
    run.save(options.out / "state.pt")
    model = run.averaged()
    epoch = run.step // max(1, plan.count // plan.batch)
    write_bytes(options.out / "best.pt", checkpoint_bytes(model, epoch))
    print(f"stopped after step {run.step} of {run.plan.total_steps}: {options.out}", flush=True)
    figures = evaluate(model, held_out, empty)
    figures |= {"step": run.step, "total_steps": run.plan.total_steps, "plan": asdict(run.plan), "history": run.history}
    write_bytes(options.out / "metrics.json", json.dumps(figures, indent=1).encode())
    print(json.dumps({key: value for key, value in figures.items() if key not in ("history", "plan")}, indent=1))


def _plan(options: argparse.Namespace) -> Plan:
    """The plan that the options ask for."""
    chosen = {name: getattr(options, name) for name in asdict(SMOKE) if getattr(options, name, None) is not None}
    return replace(SMOKE if options.smoke else Plan(), **chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the demo model on rendered pictures.")
    parser.add_argument("--out", type=Path, required=True, help="folder for best.pt, state.pt, metrics.json")
    parser.add_argument("--count", type=int, help=f"training pictures ({Plan.count})")
    parser.add_argument("--eval-count", type=int, help=f"held-out and sign-free pictures, each ({Plan.eval_count})")
    parser.add_argument("--size", type=int, help=f"side of the pictures, a multiple of 32 ({Plan.size})")
    parser.add_argument("--batch", type=int, help=f"pictures a step ({Plan.batch})")
    parser.add_argument("--epochs", type=int, help="length of the schedule; otherwise --schedule-minutes decides")
    parser.add_argument("--schedule-minutes", type=float, help=f"training time to fill ({Plan.schedule_minutes:g})")
    parser.add_argument("--mosaic", type=float, help=f"share of pictures made of four ({Plan.mosaic:g})")
    parser.add_argument("--warm-up", type=int, help=f"steps ({Plan.warm_up})")
    parser.add_argument("--rate", type=float, help=f"first learning rate ({Plan.rate:g})")
    parser.add_argument("--seed", type=int, help="of weights, order and augmentation (0)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop this long after the start, rendering included"
    )
    parser.add_argument("--resume", type=Path, help="state.pt of an earlier piece; its plan holds")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="rendering processes; 0: none")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model (needs a C compiler, on CUDA Triton)"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny run on the CPU, below a minute")
    return parser


if __name__ == "__main__":
    sys.exit(main())
