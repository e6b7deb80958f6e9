"""Sets of rendered pictures on the disk: what the project ships, what it is measured on, and any other.

The seeds of sets differ from each other and from the trainer's (`train.TRAIN_SEED`, `EVAL_SEED`, `EMPTY_SEED`), so that
no two sets share a picture.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from drive import render_drive
from scene import MAX_SIGNS, SEED_STEP, Image, Scene, render_scene
from signs import CLASS_NAMES

from yolotrt.errors import InputError
from yolotrt.files import atomic_write, atomic_write_text

Size = tuple[int, int]
LEAST_SIDE = 64


@dataclass(frozen=True)
class Recipe:
    """What a set consists of.

    Attributes:
        seed: Pictures of different seeds differ.
        count: Number of pictures.
        sizes: Width and height in pixels, used in turn.
        max_signs: Most signs in a picture; 0 renders distractors only.
    """

    seed: int
    count: int
    sizes: tuple[Size, ...] = ((640, 640),)
    max_signs: int = MAX_SIGNS

    def __post_init__(self) -> None:
        """Raise InputError unless pictures can be made so."""
        if self.count < 1 or min(min(size) for size in self.sizes) < LEAST_SIDE:
            raise InputError(
                f"a set needs at least 1 picture of at least {LEAST_SIDE} x {LEAST_SIDE} pixels: check --count, --size"
            )


@dataclass(frozen=True)
class Sample:
    """One picture of samples/: its file's name, the seed of its scene, and width and height in pixels."""

    name: str
    seed: int
    size: Size


SAMPLES = (
    Sample("country.jpg", 32, (1280, 720)),
    Sample("roadside.jpg", 11, (640, 640)),
    Sample("portrait.jpg", 33, (810, 1080)),
    Sample("town.jpg", 59, (1920, 1080)),
    Sample("hedge.png", 14, (500, 375)),
    Sample("night.jpg", 23, (960, 540)),
    Sample("dusk.webp", 27, (800, 600)),
)
DRIVE_SEED = 1

ONE_SCALE = ((640, 640), (640, 480), (480, 640), (640, 360))
"""Shapes that the letterbox of a 640 x 640 input pads without scaling, so that a sign keeps its size in pixels."""
CALIBRATION = Recipe(600, 64, ONE_SCALE)
EVALUATION = Recipe(700, 200, ONE_SCALE)
SIGN_FREE = Recipe(701, 200, ONE_SCALE, max_signs=0)

SAMPLE_QUALITY, CALIBRATION_QUALITY, DATASET_QUALITY = 90, 85, 92
"""OpenCV's JPEG and WebP qualities."""


def render_many(recipe: Recipe, workers: int = 0) -> Iterator[Scene]:
    """Render a set, in order, with a pool of `workers` processes (0: in this one)."""
    indices = range(recipe.count)
    task = functools.partial(_render_one, recipe=recipe)
    if workers == 0:
        yield from map(task, indices)
        return
    # Spawned, since OpenCV's threads do not survive a fork; one thread each, since the processes use the cores.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.map(task, indices, chunksize=8)


def _render_one(index: int, recipe: Recipe) -> Scene:
    return render_scene(
        recipe.seed * SEED_STEP + index, recipe.sizes[index % len(recipe.sizes)], max_signs=recipe.max_signs
    )


class CocoLabels:
    """Labels in COCO's form; a category's id is the class index."""

    def __init__(self) -> None:
        self._images: list[dict[str, object]] = []
        self._annotations: list[dict[str, object]] = []
        self._numbers = [0] * len(CLASS_NAMES)

    def add(self, name: str, scene: Scene) -> None:
        """Add a picture with its boxes, in thousandths of a pixel."""
        image, boxes, class_ids = scene
        identity = len(self._images)
        self._images.append({"id": identity, "file_name": name, "width": image.shape[1], "height": image.shape[0]})
        for box, class_id in zip(boxes.astype(float).round(3).tolist(), class_ids.tolist(), strict=True):
            self._annotations.append(_coco_annotation(len(self._annotations) + 1, identity, class_id, box))
            self._numbers[class_id] += 1

    @property
    def numbers(self) -> dict[str, int]:
        """Number of boxes by class name."""
        return dict(zip(CLASS_NAMES, self._numbers, strict=True))

    def text(self, indent: int | None = None) -> str:
        """The file's content."""
        categories = [{"id": index, "name": name} for index, name in enumerate(CLASS_NAMES)]
        labels = {"images": self._images, "annotations": self._annotations, "categories": categories}
        return json.dumps(labels, indent=indent) + "\n"


def _coco_annotation(identity: int, image_id: int, class_id: int, box: list[float]) -> dict[str, object]:
    left, top, right, bottom = box
    sides = [round(right - left, 3), round(bottom - top, 3)]
    return {"id": identity, "image_id": image_id, "category_id": class_id, "bbox": [left, top, *sides],
            "area": round(sides[0] * sides[1], 3), "iscrowd": 0}  # fmt: skip


def write_dataset(out: Path, scenes: Iterable[Scene]) -> dict[str, int]:
    """Write images/, labels/ (YOLO text), data.yaml and instances.json (COCO).

    Returns:
        Number of signs by class name.
    """
    labels = CocoLabels()
    for index, scene in enumerate(scenes):
        name = f"{index:06d}.jpg"
        write_picture(out / "images" / name, scene[0], DATASET_QUALITY)
        atomic_write_text(out / "labels" / f"{index:06d}.txt", _yolo_lines(scene))
        labels.add(name, scene)
    atomic_write_text(out / "instances.json", labels.text())
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(CLASS_NAMES))
    atomic_write_text(out / "data.yaml", f"path: .\ntrain: images\nval: images\nnames:\n{names}")
    return labels.numbers


def write_samples(out: Path) -> dict[str, int]:
    """Write the pictures of samples/, their labels as labels.json (COCO), and drive.mp4.

    Returns:
        Number of signs in the pictures by class name.
    """
    labels = CocoLabels()
    for sample in SAMPLES:
        scene = render_scene(sample.seed, sample.size)
        write_picture(out / sample.name, scene[0], SAMPLE_QUALITY)
        labels.add(sample.name, scene)
    atomic_write_text(out / "labels.json", labels.text(indent=1))
    render_drive(out / "drive.mp4", DRIVE_SEED)
    return labels.numbers


def write_calibration(out: Path, workers: int = 0) -> int:
    """Write the pictures of calib_images/ and their labels as labels.json (COCO); returns their number."""
    labels = CocoLabels()
    for index, scene in enumerate(render_many(CALIBRATION, workers)):
        name = f"{index:02d}.jpg"
        write_picture(out / name, scene[0], CALIBRATION_QUALITY)
        labels.add(name, scene)
    atomic_write_text(out / "labels.json", labels.text())
    return CALIBRATION.count


_QUALITY_OPTIONS = {".jpg": cv2.IMWRITE_JPEG_QUALITY, ".webp": cv2.IMWRITE_WEBP_QUALITY}


def write_picture(path: Path, image: Image, quality: int) -> None:
    """Write a picture in the format of its suffix; `quality` holds for JPEG and WebP."""
    option = _QUALITY_OPTIONS.get(path.suffix)
    _, coded = cv2.imencode(path.suffix, image, [] if option is None else [option, quality])
    with atomic_write(path) as file:
        file.write(coded.tobytes())


def _yolo_lines(scene: Scene) -> str:
    """Class, centre and size as shares of the picture, one line a box."""
    image, boxes, class_ids = scene
    scale: npt.NDArray[np.float64] = np.array([image.shape[1], image.shape[0]] * 2, float)
    centres = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1) / scale
    rows = zip(class_ids.tolist(), centres.tolist(), strict=True)
    return "".join(f"{class_id} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for class_id, (x, y, w, h) in rows)
