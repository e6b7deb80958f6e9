"""The detecting stage: one detector in each of Ray's actors."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from yolotrt.detections import Classification, Detections
from yolotrt.detector import Detector, PendingDetections
from yolotrt.distributed.cluster import load_ray
from yolotrt.distributed.storage import Storage
from yolotrt.engines.base import HOST
from yolotrt.engines.file import EngineFile
from yolotrt.errors import ImageError, InputError, YolotrtError
from yolotrt.media.images import JPEG_QUALITY, decode_image
from yolotrt.preprocess import Image

BATCHES_A_CALL = 4
"""Batches of the engine that a worker takes at once: enough for a GPU to work on two and have the next one there."""

PICTURE_COLUMNS = ("bgr", "image", "bytes")
"""What a dataset may have its pictures in; see `detect`."""

_RESULT_FIELDS = (
    ("found", pa.int64()),  # rows of this picture
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("class_id", pa.int32()),
    ("name", pa.string()),
    ("confidence", pa.float32()),
    ("x1", pa.float32()),
    ("y1", pa.float32()),
    ("x2", pa.float32()),
    ("y2", pa.float32()),
    ("segmentation", pa.string()),
    ("error", pa.string()),
)
"""Names and types of what detection adds."""


def detect(
    dataset: Any,
    engine: str | Path | EngineFile,
    *,
    concurrency: int = 1,
    gpus_per_worker: float | None = None,
    threads: int | None = 1,
    pictures: str | None = None,
    ray_options: Mapping[str, Any] | None = None,
    **detector_options: Any,
) -> Any:
    """Detect in a Ray dataset of pictures.

    The result has a row for each detection, and one with an empty `class_id` for a picture without any. Its columns are
    the dataset's own but for the picture, and `found` (rows of this picture), `width`, `height` (of the picture),
    `class_id`, `name`, `confidence`, `x1`, `y1`, `x2`, `y2` (pixels of the picture), `segmentation` (COCO's compressed
    run lengths, of models with masks) and `error`: of a picture that cannot be decoded, why. A classifier gives its
    best five classes without boxes.

    Args:
        dataset: A `ray.data.Dataset` with pictures in one of the columns ``bytes`` (files' contents, as
            `ray.data.read_binary_files` gives them), ``image`` (uint8 (height, width, 3), RGB, as
            `ray.data.read_images` gives them) or ``bgr`` (the pixels' bytes, beside `height` and `width`).
        engine: The engine or its path on this machine; workers get it through Ray.
        concurrency: Number of workers, each with one `Detector`.
        gpus_per_worker: Share of a GPU that each reserves; None takes 1, or 0 for an engine of the CPU.
        threads: CPU threads of each worker with an engine of the CPU, which it reserves.
        pictures: Folder or URL that all machines can write to, for annotated pictures, named by the column `result`;
            None writes none.
        ray_options: Further options of `ray.data.Dataset.map_batches`, such as `max_restarts` or `memory`.
        **detector_options: `confidence`, `iou`, `max_detections`, `classes`, `agnostic`, as for `Detector`.

    Returns:
        The lazy dataset of results.

    Raises:
        InputError: if an option is out of range.
        EngineFileError: if the engine file cannot be used; what does not fit a worker's machine shows when it runs.
        BackendUnavailableError: if Ray is not installed.
    """
    ray = load_ray()
    if concurrency < 1:
        raise InputError(f"--concurrency {concurrency} is out of range: choose at least 1")
    file = engine if isinstance(engine, EngineFile) else EngineFile.load(engine)
    reserved = reserved_by(file, gpus_per_worker, threads)
    return dataset.map_batches(
        DetectorActor,
        fn_constructor_args=(ray.put(file), {**detector_options, "threads": threads}, pictures),
        batch_size=file.header.max_batch * BATCHES_A_CALL,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        **{**reserved, **(ray_options or {})},
    )


def reserved_by(engine: EngineFile, gpus_per_worker: float | None, threads: int | None) -> dict[str, float]:
    """What a worker reserves of its machine, in Ray's words.

    Raises:
        InputError: if the share of a GPU is no sensible one.
    """
    on_cpu = engine.header.yololayer == HOST
    if gpus_per_worker is not None and (gpus_per_worker < 0 or (gpus_per_worker > 1 and gpus_per_worker % 1)):
        raise InputError(f"--gpus-per-worker {gpus_per_worker:g}: choose a share of 1, or a whole number")
    if on_cpu:
        if gpus_per_worker:
            raise InputError(f"engine {engine.label} runs on the CPU: leave out --gpus-per-worker")
        return {"num_cpus": threads or os.cpu_count() or 1}
    return {"num_cpus": 1, "num_gpus": 1 if gpus_per_worker is None else gpus_per_worker}


class DetectorActor:
    """A detector in a process of its own; Ray calls it with tables of pictures."""

    def __init__(self, engine: Any, options: dict[str, Any], pictures: str | None) -> None:
        """Open the engine.

        What prevents it is kept for the first call: Ray passes errors of calls on as they are, but retells those of
        constructors.
        """
        ray = load_ray()
        self._where = f"machine {ray.util.get_node_ip_address()}"
        self._storage = None if pictures is None else Storage(pictures)
        self._failure: YolotrtError | None = None
        try:
            self._detector = Detector(ray.get(engine), **options)
        except YolotrtError as error:
            self._failure = self._placed(error)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Detect in the pictures of a table.

        Raises:
            YolotrtError: if the engine cannot be used on this machine, naming it.
        """
        if self._failure is not None:
            raise self._failure
        try:
            yield self._results(table)
        except YolotrtError as error:
            raise self._placed(error) from error
        except MemoryError as problem:
            raise YolotrtError(
                f"{self._where}: out of memory: take fewer workers a machine, or a smaller batch"
            ) from problem

    def _placed(self, error: YolotrtError) -> YolotrtError:
        """The error with the machine that it happened on."""
        return type(error)(f"{self._where}: {error}")

    def _results(self, table: pa.Table) -> pa.Table:
        """Rows for all pictures of a table, in its order."""
        images: list[Any] = _images_of(table)
        found: list[Any] = [image if isinstance(image, str) else None for image in images]
        places = [place for place, image in enumerate(images) if isinstance(image, np.ndarray)]
        size = self._detector.engine.header.max_batch
        under_way: deque[tuple[list[int], PendingDetections]] = deque()
        for start in range(0, len(places), size):
            batch = places[start : start + size]
            under_way.append((batch, self._detector.submit([images[place] for place in batch])))
            if len(under_way) >= self._detector.batches_in_flight:
                _take(under_way, found)
        while under_way:
            _take(under_way, found)
        if self._storage is not None:
            self._annotate(table, images, found)
        return _table_of(table, found)

    def _annotate(self, table: pa.Table, images: Sequence[Any], found: Sequence[Any]) -> None:
        """Write the pictures with what was found in them."""
        import cv2

        from yolotrt.media.drawing import draw

        if self._storage is None:
            return
        for name, image, result in zip(table["result"].to_pylist(), images, found, strict=True):
            if isinstance(image, np.ndarray):
                _, data = cv2.imencode(".jpg", draw(image.copy(), result), (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
                self._storage.write(f"{name}.jpg", data.tobytes())


def _take(under_way: deque[tuple[list[int], PendingDetections]], found: list[Any]) -> None:
    """Put the results of the oldest batch to their places."""
    batch, pending = under_way.popleft()
    for place, result in zip(batch, pending.result(), strict=True):
        found[place] = result


def _images_of(table: pa.Table) -> list[Image | str | None]:
    """For each row its picture, why it has none, or None for a row that says so itself."""
    columns = [name for name in PICTURE_COLUMNS if name in table.column_names]
    if not columns:
        raise InputError(f"the dataset has no column {', '.join(PICTURE_COLUMNS)}: read its pictures into one of them")
    if columns[0] == "bgr":
        return _raw_images(table)
    column = table[columns[0]]
    if columns[0] == "bytes":
        paths = table["path"].to_pylist() if "path" in table.column_names else [""] * len(table)
        return [_decoded(value.as_buffer(), path) for value, path in zip(column, paths, strict=True)]
    return [_flipped(np.asarray(value)) for value in _tensors(column)]


def _raw_images(table: pa.Table) -> list[Image | str | None]:
    """Pictures whose pixels lie in Ray's memory, without a copy."""
    sizes = zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
    return [
        np.frombuffer(value.as_buffer(), np.uint8).reshape(height, width, 3) if value.is_valid else None
        for value, (height, width) in zip(table["bgr"], sizes, strict=True)
    ]


def _decoded(data: Any, path: str) -> Image | str:
    """The picture, or why it cannot be read."""
    try:
        return decode_image(bytes(data), path)
    except ImageError as error:
        return str(error)


def _flipped(rgb: Any) -> Image | str:
    """RGB to BGR."""
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        return f"a picture of {rgb.dtype} {rgb.shape} is not uint8 (height, width, 3): read it with mode RGB"
    return np.ascontiguousarray(rgb[..., ::-1])


def _tensors(column: Any) -> Sequence[Any]:
    """The arrays of a column of Ray's tensors."""
    return [array for chunk in column.chunks for array in chunk.to_numpy(zero_copy_only=False)]


def _table_of(table: pa.Table, found: Sequence[Any]) -> pa.Table:
    """The table's rows, without the pictures, once for each detection."""
    errors = table["error"].to_pylist() if "error" in table.column_names else [None] * len(table)
    rows = [_rows_of(result, error) for result, error in zip(found, errors, strict=True)]
    index = pa.array(np.repeat(np.arange(len(table)), [len(part) for part in rows]))
    replaced = {*PICTURE_COLUMNS, *(name for name, _ in _RESULT_FIELDS)}
    kept = [name for name in table.column_names if name not in replaced]
    flat = pa.Table.from_pylist([row for part in rows for row in part], pa.schema(_RESULT_FIELDS))
    return pa.table({**{name: table[name].take(index) for name in kept}, **{n: flat[n] for n in flat.column_names}})


def _rows_of(result: Any, error: str | None) -> list[dict[str, Any]]:
    """The rows of one picture; at least one."""
    if not isinstance(result, Detections | Classification):
        return [{"found": 1, "error": result if isinstance(result, str) else error}]
    height, width = result.image_size
    rows = _classes(result) if isinstance(result, Classification) else _boxes(result)
    return [{"found": max(len(rows), 1), "width": width, "height": height, **row} for row in rows or [{}]]


def _classes(result: Classification) -> list[dict[str, Any]]:
    """The best classes."""
    return [{"class_id": index, "name": name, "confidence": confidence} for index, name, confidence in result.top()]


def _boxes(result: Detections) -> list[dict[str, Any]]:
    """The detections, best first."""
    return [
        {
            "class_id": class_id,
            "name": name,
            "confidence": confidence,
            **dict(zip(("x1", "y1", "x2", "y2"), box.tolist(), strict=True)),
            "segmentation": None if result.masks is None else result.masks.rle(number)["counts"],
        }
        for number, (box, confidence, class_id, name) in enumerate(result)
    ]
