"""The public way to detect: an engine, pictures in, detections out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import overload

import numpy as np
import numpy.typing as npt

from yolotrt.detections import Detections
from yolotrt.engines.build import open_session
from yolotrt.engines.file import EngineFile
from yolotrt.errors import ImageError, InputError
from yolotrt.media.images import read_image
from yolotrt.postprocess import Boxes, NmsOptions, YoloLayer, non_max_suppression
from yolotrt.preprocess import Letterbox

Image = npt.NDArray[np.uint8]
Source = Image | str | Path

MAX_DETECTIONS_LIMIT = 30_000


@dataclass
class Timing:
    """Where the time went, in milliseconds, summed over `pictures`.

    Attributes:
        preprocess_ms: Letterbox and conversion.
        inference_ms: The engine.
        postprocess_ms: YoloLayer, NMS and scaling back.
        pictures: Number of pictures.
    """

    preprocess_ms: float = 0.0
    inference_ms: float = 0.0
    postprocess_ms: float = 0.0
    pictures: int = 0


class Detector:
    """Finds objects in pictures with an engine.

    Use a detector from one thread at a time. It is a context manager; `close` frees the engine.

    Attributes:
        engine: The engine file.
        options: Thresholds of the detection.
        timing: Time spent so far.
    """

    def __init__(
        self,
        engine: str | Path | EngineFile,
        *,
        confidence: float = 0.25,
        iou: float = 0.45,
        max_detections: int = 300,
        classes: Sequence[int | str] | None = None,
        agnostic: bool = False,
        threads: int | None = None,
    ) -> None:
        """Open an engine.

        Args:
            engine: An engine file or its path.
            confidence: Detections need more than this, 0..1.
            iou: A box that overlaps a better one of its class by more than this is dropped, 0..1.
            max_detections: Detections a picture at most, 1..30000.
            classes: Class indices or names to look for; None looks for all.
            agnostic: Whether boxes of different classes suppress each other.
            threads: CPU threads of ONNX Runtime; None takes one a physical core.

        Raises:
            InputError: if a value is out of range.
            EngineFileError: if the engine cannot be used here.
            BackendUnavailableError: if the engine's library is not installed.
        """
        self.engine = engine if isinstance(engine, EngineFile) else EngineFile.load(engine)
        model = self.engine.header.model
        self.options = _checked_options(
            NmsOptions(confidence, iou, max_detections, _class_indices(classes, model.names), agnostic=agnostic)
        )
        self.timing = Timing()
        self._yolo_layer = YoloLayer(model.anchors, model.strides, len(model.names))
        self._session = open_session(self.engine, threads=threads)
        self._is_closed = False
        self._input = np.zeros((self.engine.header.max_batch, 3, *self.engine.header.imgsz), np.float32)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The model's class names, in class order."""
        return self.engine.header.model.names

    @overload
    def __call__(self, images: Source) -> Detections: ...  # type: ignore[overload-overlap]  # a str is a sequence too

    @overload
    def __call__(self, images: Sequence[Source]) -> list[Detections]: ...

    def __call__(self, images: Source | Sequence[Source]) -> Detections | list[Detections]:
        """Detect objects.

        Args:
            images: A picture (uint8 BGR (height, width, 3), as OpenCV reads it, or a path), or a sequence of them,
                which may differ in size.

        Returns:
            The detections of the picture, or a list of them, one for each picture.

        Raises:
            ImageError: if a picture cannot be read, or an array is no picture.
            InputError: if the detector is closed.
        """
        if self._is_closed:
            raise InputError("the detector is closed: open a new one")
        if isinstance(images, Sequence) and not isinstance(images, str | bytes):
            return list(self._detect_all(images))
        return self._detect([_as_image(images)])[0]

    def close(self) -> None:
        """Free the engine; calling it twice is harmless."""
        self._is_closed = True
        self._session.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _detect_all(self, images: Sequence[Source]) -> Iterator[Detections]:
        """Detect in batches as large as the engine takes."""
        size = self.engine.header.max_batch
        for start in range(0, len(images), size):
            yield from self._detect([_as_image(image) for image in images[start : start + size]])

    def _detect(self, images: Sequence[Image]) -> list[Detections]:
        """Detect in one batch of at most the engine's size."""
        began = time.perf_counter()
        letterboxes = [Letterbox.fit(_size(image), self.engine.header.imgsz) for image in images]
        for image, letterbox, out in zip(images, letterboxes, self._input, strict=False):
            letterbox.to_input(image, out)
        prepared = time.perf_counter()
        # a static or larger smallest batch is filled up: the surplus is stale input whose results nobody reads
        heads = self._session.run(self._input[: max(len(images), self.engine.header.batch_range[0])])
        inferred = time.perf_counter()
        detections = self._decode([head[: len(images)] for head in heads], letterboxes)
        self._count(began, prepared, inferred, len(images))
        return detections

    def _decode(self, heads: list[npt.NDArray[np.float32]], letterboxes: Sequence[Letterbox]) -> list[Detections]:
        """Raw heads as detections in picture pixels."""
        rows = self._yolo_layer.candidates(heads, self.options.confidence)
        return [
            self._in_picture(non_max_suppression(candidates, self.options), letterbox)
            for candidates, letterbox in zip(rows, letterboxes, strict=True)
        ]

    def _in_picture(self, boxes: Boxes, letterbox: Letterbox) -> Detections:
        """Boxes scaled back to the picture."""
        return Detections(
            xyxy=letterbox.inverse(boxes.xyxy),
            confidence=boxes.confidence,
            class_id=boxes.class_id.astype(np.int32),
            class_names=self.class_names,
            image_size=letterbox.source_size,
        )

    def _count(self, began: float, prepared: float, inferred: float, pictures: int) -> None:
        """Add one batch to the timing."""
        self.timing.preprocess_ms += (prepared - began) * 1e3
        self.timing.inference_ms += (inferred - prepared) * 1e3
        self.timing.postprocess_ms += (time.perf_counter() - inferred) * 1e3
        self.timing.pictures += pictures


def _as_image(source: Source) -> Image:
    """A picture as an array, read from its file where it is a path."""
    if isinstance(source, str | Path):
        return read_image(Path(source))
    if source is None:
        raise ImageError("a picture is None, as cv2.imread gives it for a file that it cannot read: check the path")
    if not isinstance(source, np.ndarray):
        raise ImageError(f"a picture must be an array or a path, not {type(source).__name__}: pass these or a list")
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
        raise ImageError(
            f"a picture must be uint8 BGR (height, width, 3), not {source.dtype} {source.shape}: "
            "convert it with cv2.cvtColor"
        )
    if 0 in source.shape:
        raise ImageError(f"a picture of shape {source.shape} has no pixels: check where it comes from")
    return source


def _size(image: Image) -> tuple[int, int]:
    """Height and width."""
    return image.shape[0], image.shape[1]


def _class_indices(classes: Sequence[int | str] | None, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """Indices of the classes, each given as an index or a name."""
    if classes is None:
        return None
    if isinstance(classes, str | int):
        raise InputError(f"classes {classes!r} is one class: pass a list")
    for item in classes:
        if item not in names if isinstance(item, str) else not 0 <= item < len(names):
            raise InputError(
                f"class {item!r} does not exist: the model has classes 0 to {len(names) - 1}: "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
    return tuple(names.index(item) if isinstance(item, str) else int(item) for item in classes)


def _checked_options(options: NmsOptions) -> NmsOptions:
    """`options`, if they are in range."""
    for name, value in (("confidence", options.confidence), ("iou", options.iou)):
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"{name} {value} is out of range: choose a value from 0 to 1")
    count = options.max_detections
    if not isinstance(count, int) or not 1 <= count <= MAX_DETECTIONS_LIMIT:
        raise InputError(f"max_detections {options.max_detections}: choose a number from 1 to {MAX_DETECTIONS_LIMIT}")
    return options
