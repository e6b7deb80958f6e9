"""Labelled pictures: a YOLO data.yaml with label files, or a COCO json with a folder of pictures.

What is wrong in the labels is counted and named in `Problems` and does not end an evaluation.
"""

from __future__ import annotations

import enum
import glob
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import BackendUnavailableError, InputError
from yolotrt.files import require_file
from yolotrt.media.sources import PICTURE_SUFFIXES, is_file_or_broken_link

Float = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

SPLITS = ("val", "test", "train")

BORDER_PIXELS = 1.0
"""A box may stick out by this: rounding of normalised labels, and COCO's own boxes, do."""

_LISTED = 5
"""Names in one line about a problem."""


class Problem(enum.Enum):
    """What can be wrong with data; the value completes ``N ...``."""

    NO_LABELS = "pictures without a label file, taken as background"
    EMPTY_LABELS = "pictures without a label, taken as background"
    BAD_LABEL = "labels that cannot be read, left out"
    BAD_CLASS = "labels of a class out of range, left out"
    FOREIGN_CLASS = "classes that the model does not have, left out with their labels"
    STICKS_OUT = "boxes that stick out of their picture, clipped"
    OUTSIDE = "boxes outside their picture or without area, left out"
    TWICE_LABEL = "labels given twice, taken once"
    TWICE_LISTED = "pictures listed twice, taken once"
    TWICE_CONTENT = "pictures with the content of another one, evaluated all the same"
    NO_PICTURE = "labels of pictures that are not listed, left out"
    UNREADABLE = "pictures that cannot be read, left out with their labels"
    OTHER_SIZE = "pictures of another size than the labels say, taken as they are"


class Problems:
    """Counts and names what is wrong with the data."""

    def __init__(self) -> None:
        self._names: dict[Problem, list[str]] = {}

    def add(self, kind: Problem, name: str) -> None:
        """Note one case of `kind` and where it is."""
        self._names.setdefault(kind, []).append(name)

    def counts(self) -> dict[Problem, int]:
        """Number of cases by kind."""
        return {kind: len(self._names[kind]) for kind in Problem if kind in self._names}

    def names(self, kind: Problem) -> Sequence[str]:
        """Where the cases of `kind` are, in the order found."""
        return self._names.get(kind, ())

    def lines(self, listed: int = _LISTED) -> list[str]:
        """One line for each kind, such as ``2 pictures without a label file, ...: a.jpg, b.jpg``."""
        return [
            f"{number} {kind.value}: {', '.join(self._names[kind][:listed])}"
            + (f" and {number - listed} more" if number > listed else "")
            for kind, number in self.counts().items()
        ]


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of one picture.

    Attributes:
        xyxy: float64 (N, 4): left, top, right, bottom, in pixels.
        class_id: int64 (N,): the model's class index.
        area: float64 (N,): pixels, which decide between small, medium and large objects; COCO gives the outline's.
        crowd: bool (N,): marks a region of many objects: boxes in it count neither for nor against.
    """

    xyxy: Float
    class_id: Index
    area: Float
    crowd: Mask

    def __len__(self) -> int:
        return len(self.class_id)

    def take(self, index: Index | Mask) -> Labels:
        """The labels at `index` (indices or a mask)."""
        return Labels(self.xyxy[index], self.class_id[index], self.area[index], self.crowd[index])


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a dataset.

    Attributes:
        path: Its file.
        image_id: Its identity in predictions: COCO's id, or for YOLO data the number that is the file's name, else the
            name itself.
        labels: Its labels; for YOLO data in fractions of the picture's width and height.
        is_normalised: Whether they are such fractions.
        size: Height and width in pixels as the labels say, if they do.
    """

    path: Path
    image_id: int | str
    labels: Labels
    is_normalised: bool
    size: tuple[int, int] | None = None

    def labels_in(self, size: tuple[int, int], problems: Problems) -> Labels:
        """The labels in pixels, inside the picture.

        Args:
            size: The picture's height and width in pixels.
            problems: Takes note of boxes that are not inside.
        """
        labels = self._in_pixels(size)
        limit = np.array([size[1], size[0], size[1], size[0]], np.float64)
        clipped = np.clip(labels.xyxy, 0, limit)
        moved = np.abs(clipped - labels.xyxy).max(axis=1, initial=0) > BORDER_PIXELS
        has_area: Mask = np.all(clipped[:, 2:] > clipped[:, :2], axis=1)
        for row in np.flatnonzero(~has_area):
            problems.add(Problem.OUTSIDE, f"{self.path.name} {np.round(labels.xyxy[row], 1).tolist()}")
        for row in np.flatnonzero(moved & has_area):
            problems.add(Problem.STICKS_OUT, f"{self.path.name} {np.round(labels.xyxy[row], 1).tolist()}")
        boxes = np.where(moved[:, None], clipped, labels.xyxy)
        return Labels(boxes, labels.class_id, labels.area, labels.crowd).take(has_area)

    def _in_pixels(self, size: tuple[int, int]) -> Labels:
        """The labels as they are given, in pixels."""
        if not self.is_normalised:
            return self.labels
        height, width = size
        xyxy = self.labels.xyxy * np.array([width, height, width, height], np.float64)
        return Labels(xyxy, self.labels.class_id, self.labels.area * (width * height), self.labels.crowd)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled pictures, with the classes of the model that is evaluated.

    Attributes:
        name: Where it comes from.
        pictures: Its pictures.
        class_names: The model's class names.
        category_ids: By class index the data's own number of the class; None for classes that the data do not have.
        problems: What is wrong in the labels.
    """

    name: str
    pictures: tuple[Picture, ...]
    class_names: tuple[str, ...]
    category_ids: tuple[int | None, ...]
    problems: Problems = field(default_factory=Problems)


def read_dataset(
    data: Path, class_names: Sequence[str], *, images: Path | None = None, split: str = "val", limit: int | None = None
) -> Dataset:
    """Read labelled pictures.

    Args:
        data: A YOLO data.yaml, or a COCO json of object instances.
        class_names: The model's class names. The data's classes are found by their names; data with as many classes as
            the model but other names are taken in their order.
        images: The folder of a COCO json's pictures; None looks beside the json and in ``images`` there.
        split: Which pictures of a data.yaml: ``val``, ``test`` or ``train``.
        limit: Take at most so many pictures, the first ones.

    Raises:
        InputError: if the data cannot be read, hold no picture or no label, or have other classes than the model.
        BackendUnavailableError: if PyYAML is not installed and the data are a .yaml file.
    """
    suffix = require_file(data, "dataset").suffix.lower()
    if suffix not in {".json", ".yaml", ".yml"}:
        raise InputError(f"dataset {data} is neither a YOLO data.yaml nor a COCO .json: name one of these")
    if suffix != ".json" and images is not None:
        raise InputError(f"--images belongs to a COCO json; {data} says itself where its pictures are: leave it out")
    reader = _CocoReader(data, images) if suffix == ".json" else _YoloReader(data, split)
    classes = _class_of_category(reader.categories, class_names, data, reader.problems)
    pictures = tuple(reader.pictures(classes))[:limit]
    _require_labels(data, pictures)
    category_of = {index: category for category, index in classes.items()}
    category_ids = tuple(category_of.get(index) for index in range(len(class_names)))
    return Dataset(str(data), pictures, tuple(class_names), category_ids, reader.problems)


def _class_of_category(
    categories: Mapping[int, str], class_names: Sequence[str], data: Path, problems: Problems
) -> dict[int, int]:
    """The model's class index of each of the data's classes."""
    index_of = {_plain(name): index for index, name in reversed(list(enumerate(class_names)))}
    common = {number: index_of[_plain(name)] for number, name in categories.items() if _plain(name) in index_of}
    has_doubles = len(set(common.values())) < len(common)
    if len(common) == len(categories) and not has_doubles:
        return common
    if len(categories) == len(class_names):  # the same classes under other names, such as motorbike and motorcycle
        return {number: index for index, number in enumerate(sorted(categories))}
    if not common or has_doubles:
        raise InputError(
            f"dataset {data} has {len(categories)} classes ({_some(categories.values())}), the model has "
            f"{len(class_names)} ({_some(class_names)}): evaluate with the data that the model was trained for"
        )
    for number in categories.keys() - common.keys():
        problems.add(Problem.FOREIGN_CLASS, categories[number])
    return common


def _plain(name: str) -> str:
    """A class name for comparison."""
    return " ".join(name.casefold().replace("_", " ").split())


def _some(names: Iterable[str], shown: int = 4) -> str:
    """The first names of a list."""
    listed = list(names)
    return ", ".join(listed[:shown]) + (", ..." if len(listed) > shown else "")


def _require_labels(data: Path, pictures: Sequence[Picture]) -> None:
    """Raise if there is nothing to measure."""
    if not pictures:
        raise InputError(f"dataset {data} has no picture: check its paths")
    if not any(len(picture.labels) for picture in pictures):
        where = "YOLO labels lie in labels/ where pictures lie in images/" if pictures[0].is_normalised else "check it"
        raise InputError(f"dataset {data} has no label for any of its {len(pictures)} pictures: {where}")


class _YoloReader:
    """Reads a YOLO data.yaml, its lists of pictures and its label files."""

    def __init__(self, data: Path, split: str) -> None:
        self.problems = Problems()
        self._path = data
        self._split = split
        self._values = _load_yaml(data)
        self.categories = _yaml_names(self._values, data)

    def pictures(self, classes: Mapping[int, int]) -> Iterator[Picture]:
        """All pictures of the split, with the labels of `classes` (data's index to the model's)."""
        paths = self._unique(self._picture_files())
        stems = Counter(path.stem for path in paths)
        numbers = all(stem.isdecimal() and count == 1 for stem, count in stems.items())
        for path in paths:
            image_id: int | str = int(path.stem) if numbers else path.name
            yield Picture(path, image_id, self._labels(path, classes), is_normalised=True)

    def _picture_files(self) -> Iterator[Path]:
        """The files that the split names."""
        entries = self._values.get(self._split)
        if not entries or not isinstance(entries, str | list):
            raise InputError(f"dataset {self._path} has no {self._split!r} pictures: add the entry or choose --split")
        for entry in [entries] if isinstance(entries, str) else entries:
            yield from _expand(self._located(str(entry)), self._path)

    def _located(self, entry: str) -> Path:
        """Where an entry lies: below ``path``, which is relative to the file's own folder or else to the current."""
        root = Path(str(self._values.get("path") or "")).expanduser()
        places = [self._path.parent / root / entry, root / entry, self._path.parent / entry]
        return next((place for place in places if place.exists()), places[0])

    def _unique(self, paths: Iterable[Path]) -> list[Path]:
        """Each file once."""
        unique: dict[Path, Path] = {}
        for path in paths:
            if path.absolute() in unique:
                self.problems.add(Problem.TWICE_LISTED, path.name)
            unique.setdefault(path.absolute(), path)
        return list(unique.values())

    def _labels(self, picture: Path, classes: Mapping[int, int]) -> Labels:
        """The labels of one picture, in fractions of its size."""
        path = label_file(picture)
        if not path.is_file():
            self.problems.add(Problem.NO_LABELS, picture.name)
            return _pack([])
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        numbered = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
        if not numbered:
            self.problems.add(Problem.EMPTY_LABELS, picture.name)
        rows: dict[tuple[float, ...], None] = {}
        for number, words in numbered:
            row = self._row(words, f"{path.name}:{number}", classes)
            if row is None:
                continue
            if row in rows:
                self.problems.add(Problem.TWICE_LABEL, f"{path.name}:{number}")
            rows[row] = None
        return _pack(rows)

    def _row(self, words: Sequence[str], place: str, classes: Mapping[int, int]) -> tuple[float, ...] | None:
        """One line as (class, left, top, right, bottom), or None if it is of no use."""
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) < 5 or not all(math.isfinite(value) for value in values):
            self.problems.add(Problem.BAD_LABEL, place)
            return None
        if values[0] not in self.categories:
            self.problems.add(Problem.BAD_CLASS, f"{place} (class {words[0][:20]})")
            return None
        box = _yolo_box(values[1:])
        if box is None:
            self.problems.add(Problem.BAD_LABEL, place)
            return None
        index = classes.get(int(values[0]))
        return None if index is None else (index, *box)


def label_file(picture: Path) -> Path:
    """The label file of a picture: in YOLO's layout ``.../images/x.jpg`` has ``.../labels/x.txt``."""
    parts = list(picture.absolute().with_suffix(".txt").parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts)


def _yolo_box(values: Sequence[float]) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom of ``x y w h``, or of an outline ``x1 y1 x2 y2 x3 y3 ...``; None if it is neither."""
    if len(values) == 4:
        x, y, width, height = values
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(values) < 6 or len(values) % 2:
        return None
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])


def _load_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a .yaml file."""
    try:
        import yaml
    except ImportError as problem:
        raise BackendUnavailableError(
            f'PyYAML, which reads data.yaml, is not installed ({problem}): run pip install "yolotrtx[eval]"'
        ) from problem
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        first_line = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise InputError(f"dataset {path} is no YAML ({first_line}): correct it") from problem
    if not isinstance(values, dict):
        raise InputError(f"dataset {path} is no YOLO data.yaml: it needs names and val")
    return values


def _yaml_names(values: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Class names by index: ``names`` is a list, or a mapping from index to name."""
    names = values.get("names")
    if isinstance(names, list):
        return {index: str(name) for index, name in enumerate(names)}
    if isinstance(names, dict) and all(isinstance(index, int) for index in names):
        return {index: str(name) for index, name in names.items()}
    raise InputError(f"dataset {path} has no class names: add names, a list or a mapping from index to name")


def _expand(place: Path, data: Path) -> Iterator[Path]:
    """The pictures of a folder and its subfolders, of a .txt list, of a glob, or one picture."""
    if place.is_dir():
        yield from sorted(path for path in place.rglob("*") if _is_picture(path))
    elif place.suffix.lower() == ".txt" and place.is_file():
        for line in place.read_text(encoding="utf-8-sig").splitlines():
            if line.strip() and not line.startswith("#"):
                beside = place.parent / line.strip()
                yield beside if beside.exists() else Path(line.strip())
    elif place.is_file():
        yield place
    elif matches := sorted(glob.glob(str(place), recursive=True)):  # noqa: PTH207 - Path.glob needs a start folder
        yield from (Path(match) for match in matches if _is_picture(Path(match)))
    else:
        raise InputError(f"dataset {data} names {place}, which does not exist: correct its path")


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and is_file_or_broken_link(path)


class _CocoReader:
    """Reads a COCO json of object instances."""

    def __init__(self, data: Path, images: Path | None) -> None:
        self.problems = Problems()
        self._path = data
        self._values = _load_json(data)
        self._folders = [images] if images is not None else [data.parent, data.parent / "images"]
        if images is not None and not images.is_dir():
            raise InputError(f"folder of pictures {images} does not exist: correct --images")
        self.categories = self._categories()

    def pictures(self, classes: Mapping[int, int]) -> Iterator[Picture]:
        """All pictures, with the labels of `classes` (the data's category id to the model's class index)."""
        images = self._images()
        rows: dict[Any, dict[tuple[float, ...], None]] = {identity: {} for identity in images}
        for annotation in self._values["annotations"]:
            self._add(annotation, rows, classes)
        for identity, (name, size) in images.items():
            if not rows[identity]:
                self.problems.add(Problem.EMPTY_LABELS, name)
            yield Picture(self._file(name), identity, _pack(rows[identity]), is_normalised=False, size=size)

    def _categories(self) -> dict[int, str]:
        """Names of the categories by id."""
        try:
            return {int(category["id"]): str(category["name"]) for category in self._values["categories"]}
        except (TypeError, KeyError, ValueError) as problem:
            raise InputError(f"dataset {self._path} has a category without id and name: add them") from problem

    def _images(self) -> dict[Any, tuple[str, tuple[int, int] | None]]:
        """File name and size by id, each picture once."""
        images: dict[Any, tuple[str, tuple[int, int] | None]] = {}
        names: set[str] = set()
        for image in self._values["images"]:
            try:
                identity, name = image["id"], str(image["file_name"])
                size = (int(image["height"]), int(image["width"])) if "height" in image and "width" in image else None
            except (TypeError, KeyError, ValueError) as problem:
                raise InputError(f"dataset {self._path} has an image without id and file_name: add them") from problem
            if identity in images or name in names:
                self.problems.add(Problem.TWICE_LISTED, name)
                continue
            images[identity] = name, size
            names.add(name)
        return images

    def _add(self, annotation: Any, rows: Mapping[Any, dict[tuple[float, ...], None]], classes: Any) -> None:
        """Add one annotation to its picture's rows (class, left, top, right, bottom, area, crowd)."""
        try:
            image, category = annotation["image_id"], int(annotation["category_id"])
            x, y, width, height = (float(value) for value in annotation["bbox"])
            place = f"annotation {annotation.get('id', '?')}"
            area = float(annotation.get("area", width * height))
            crowd = float(bool(annotation.get("iscrowd", 0)))
        except (TypeError, KeyError, ValueError, AttributeError):
            identity = annotation.get("id", "?") if isinstance(annotation, dict) else "?"
            self.problems.add(Problem.BAD_LABEL, f"annotation {identity}")
            return
        if not all(math.isfinite(value) for value in (x, y, width, height, area)):
            self.problems.add(Problem.BAD_LABEL, place)
        elif image not in rows:
            self.problems.add(Problem.NO_PICTURE, place)
        elif category not in self.categories:
            self.problems.add(Problem.BAD_CLASS, f"{place} (category {category})")
        elif category in classes:
            row = (classes[category], x, y, x + width, y + height, area, crowd)
            if row in rows[image]:
                self.problems.add(Problem.TWICE_LABEL, place)
            rows[image][row] = None

    def _file(self, name: str) -> Path:
        """The picture's file; a name with folders is also looked for without them."""
        places = [folder / inner for folder in self._folders for inner in (name, Path(name).name)]
        return next((place for place in places if place.is_file()), places[0])


def _load_json(path: Path) -> Mapping[str, Any]:
    """The COCO object in a .json file."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise InputError(f"dataset {path} is no JSON ({problem}): correct it") from problem
    keys = ("images", "annotations", "categories")
    if not isinstance(values, dict) or not all(isinstance(values.get(key), list) for key in keys):
        raise InputError(f"dataset {path} is no COCO json of instances: it needs the lists {', '.join(keys)}")
    return values


def _pack(rows: Iterable[Sequence[float]]) -> Labels:
    """Rows (class, left, top, right, bottom[, area, crowd]) as arrays."""
    table = list(rows)
    if not table:
        return Labels(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.bool_))
    values = np.array(table, np.float64)
    xyxy = values[:, 1:5]
    has_area = values.shape[1] > 5
    area = values[:, 5] if has_area else np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1)
    crowd = values[:, 6] > 0 if has_area else np.zeros(len(values), np.bool_)
    return Labels(xyxy, values[:, 0].astype(np.int64), area, crowd)
