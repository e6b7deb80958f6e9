"""The public way to detect: an engine, pictures in, detections out."""

from __future__ import annotations

import difflib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from yolotrt.detections import Classification, Detections
from yolotrt.engines.base import Pending, Timing
from yolotrt.engines.build import open_session
from yolotrt.engines.file import EngineFile
from yolotrt.errors import ImageError, InputError
from yolotrt.masks import Masks
from yolotrt.media.images import read_image
from yolotrt.postprocess import Boxes, NmsOptions
from yolotrt.preprocess import Letterbox

Image = npt.NDArray[np.uint8]
Source = Image | str | Path
"""A picture or its path. Engines on a GPU also take device arrays, which mypy knows as Any."""

Result = Detections | Any
"""`Detections`, or of classifiers `Classification`: Any stands for the latter, so that code for one kind of model needs
no test of the type to please a type checker, which still knows what detections have."""

MAX_DETECTIONS_LIMIT = 30_000


class Detector:
    """Finds objects in pictures with an engine, or says what they show if the engine is a classifier's.

    Use a detector from one thread at a time. It is a context manager; `close` frees the engine.

    Attributes:
        engine: The engine file.
        options: Thresholds of the detection.
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
            InputError: if a value is out of range, or classes are chosen of a classifier.
            EngineFileError: if the engine cannot be used here.
            BackendUnavailableError: if the engine's library is not installed.
        """
        self.engine = engine if isinstance(engine, EngineFile) else EngineFile.load(engine)
        model = self.engine.header.model
        self._is_classifier = model.task == "classify"
        if self._is_classifier and classes is not None:
            raise InputError("a classifier weighs all its classes against each other: choose none")
        self.options = nms_options(
            self.engine,
            confidence=confidence,
            iou=iou,
            max_detections=max_detections,
            classes=classes,
            agnostic=agnostic,
        )
        self._session = open_session(self.engine, threads=threads)
        self._is_closed = False

    @property
    def timing(self) -> Timing:
        """Time spent so far."""
        return self._session.timing

    @property
    def batches_in_flight(self) -> int:
        """How many batches to `submit` before taking the first result, for most pictures a second."""
        return self._session.batches_in_flight

    @property
    def leaves_cores_free(self) -> bool:
        """Whether the engine computes on some of the CPU's cores and leaves others to the program."""
        return self._session.leaves_cores_free

    @property
    def class_names(self) -> tuple[str, ...]:
        """The model's class names, in class order."""
        return self.engine.header.model.names

    @overload
    def __call__(self, images: Source) -> Result: ...  # type: ignore[overload-overlap]  # a str is a sequence too

    @overload
    def __call__(self, images: Sequence[Source]) -> list[Result]: ...

    def __call__(self, images: Source | Sequence[Source]) -> Result | list[Result]:
        """Detect objects, or classify pictures, as the engine's model does.

        Args:
            images: A picture (uint8 BGR (height, width, 3), as OpenCV reads it, or a path), or a sequence of them,
                which may differ in size.

        Returns:
            The picture's `Detections`, or its `Classification` if the engine is a classifier's; or a list of them, one
            for each picture.

        Raises:
            ImageError: if a picture cannot be read, or an array is no picture.
            InputError: if the detector is closed.
        """
        self._require_open()
        if isinstance(images, Sequence) and not isinstance(images, str | bytes):
            return list(self._detect_all(images))
        return self.submit([images]).result()[0]

    def submit(self, images: Sequence[Source]) -> PendingDetections:
        """Start to detect in one batch, without waiting for it; see `batches_in_flight`.

        Args:
            images: As for a call, at most as many as the engine's largest batch. They must not change before the
                result is there.

        Raises:
            ImageError: if a picture cannot be read, or an array is no picture.
            InputError: if there are too many pictures, or the detector is closed.
        """
        self._require_open()
        frames = [_as_image(image) for image in images]
        if self._is_classifier:
            return _Classified(self._classify(frames))
        return PendingDetections(self, self._session.submit(frames, self.options), [_size(frame) for frame in frames])

    def warm_up(self, *, batches: int = 1) -> None:
        """Compute a grey picture, so that the first of yours does not wait for what is made at first use.

        Its time is not counted in `timing`.

        Args:
            batches: How many batches will be under way at once; see `submit` and `batches_in_flight`.

        Raises:
            InputError: if the detector is closed.
            InferenceError: if the device fails.
        """
        self._require_open()
        self._session.warm_up(self.options, batches=batches)

    def frame_buffer(self, height: int, width: int) -> Image:
        """Memory for one picture, uint8 (height, width, 3), that the engine reads fastest: decode into it.

        It is the caller's as long as it is referred to.
        """
        return self._session.frame_buffer(height, width)

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

    def _classify(self, frames: Sequence[Image]) -> list[Result]:
        """Classify a batch."""
        probabilities = self._session.classify(frames)
        return [
            Classification(scores.copy(), self.class_names, _size(frame))
            for scores, frame in zip(probabilities, frames, strict=True)
        ]

    def _detect_all(self, images: Sequence[Source]) -> Iterator[Result]:
        """Detect in batches as large as the engine takes."""
        size = self.engine.header.max_batch
        under_way: deque[PendingDetections] = deque()
        for start in range(0, len(images), size):
            under_way.append(self.submit(images[start : start + size]))
            if len(under_way) >= self.batches_in_flight:
                yield from under_way.popleft().result()
        for pending in under_way:
            yield from pending.result()

    def _require_open(self) -> None:
        if self._is_closed:
            raise InputError("the detector is closed: open a new one")

    def in_picture(self, boxes: Boxes, image_size: tuple[int, int]) -> Detections:
        """Boxes in network-input pixels scaled back to a picture of `image_size` (height, width)."""
        letterbox = Letterbox.fit(image_size, self.engine.header.imgsz)
        return Detections(
            xyxy=letterbox.inverse(boxes.xyxy),
            confidence=boxes.confidence,
            class_id=boxes.class_id.astype(np.int32),
            class_names=self.class_names,
            image_size=image_size,
            masks=None if boxes.masks is None else Masks(boxes.masks, letterbox),
        )


class PendingDetections:
    """A batch that is being computed."""

    def __init__(self, detector: Detector, boxes: Pending, image_sizes: Sequence[tuple[int, int]]) -> None:
        self._detector = detector
        self._boxes = boxes
        self._image_sizes = image_sizes

    def result(self) -> list[Result]:
        """Wait for the batch; returns the detections of each picture, or of classifiers its classification.

        Raises:
            InferenceError: if the device failed.
        """
        found = self._boxes.result()
        began = time.perf_counter()
        detections: list[Result] = [
            self._detector.in_picture(boxes, size) for boxes, size in zip(found, self._image_sizes, strict=True)
        ]
        self._detector.timing.add(postprocess_ms=(time.perf_counter() - began) * 1e3)
        return detections


class _Classified(PendingDetections):
    """A batch that a classifier has computed already."""

    def __init__(self, classifications: list[Result]) -> None:
        self._classifications = classifications

    def result(self) -> list[Result]:
        """See `PendingDetections.result`."""
        return self._classifications


def _as_image(source: Source) -> Image:
    """A picture as an array, read from its file where it is a path."""
    if isinstance(source, str | Path):
        return read_image(Path(source))
    if source is None:
        raise ImageError("a picture is None, as cv2.imread gives it for a file that it cannot read: check the path")
    if _is_on_device(source):
        return source  # the session checks it
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


def _is_on_device(source: object) -> bool:
    """Whether it is an array of another library, in device memory as far as one can tell without it."""
    if isinstance(source, np.ndarray):
        return False
    return hasattr(source, "__cuda_array_interface__") or hasattr(source, "__dlpack__")


def _size(image: Image) -> tuple[int, int]:
    """Height and width."""
    return image.shape[0], image.shape[1]


def _similar(item: int | str, names: tuple[str, ...]) -> str:
    """The name that was probably meant, in words, or nothing."""
    found = difflib.get_close_matches(str(item), names, n=1)
    return f", but {found[0]!r} does" if found else ""


def _class_indices(classes: Sequence[int | str] | None, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """Indices of the classes, each given as an index or a name."""
    if classes is None:
        return None
    if isinstance(classes, str | int):
        raise InputError(f"classes {classes!r} is one class: pass a list")
    for item in classes:
        if item not in names if isinstance(item, str) else not 0 <= item < len(names):
            raise InputError(
                f"class {item!r} does not exist{_similar(item, names)}: the model has classes 0 to {len(names) - 1}: "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
    return tuple(names.index(item) if isinstance(item, str) else int(item) for item in classes)


def nms_options(
    engine: EngineFile,
    *,
    confidence: float,
    iou: float,
    max_detections: int,
    classes: Sequence[int | str] | None,
    agnostic: bool,
) -> NmsOptions:
    """Thresholds for an engine, as `Detector` takes them.

    Raises:
        InputError: if one is out of range.
    """
    indices = _class_indices(classes, engine.header.model.names)
    return _checked_options(NmsOptions(confidence, iou, max_detections, indices, agnostic=agnostic))


def _checked_options(options: NmsOptions) -> NmsOptions:
    """`options`, if they are in range."""
    for name, value in (("confidence", options.confidence), ("iou", options.iou)):
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"{name} {value} is out of range: choose a value from 0 to 1")
    count = options.max_detections
    if not isinstance(count, int) or not 1 <= count <= MAX_DETECTIONS_LIMIT:
        raise InputError(f"max_detections {options.max_detections}: choose a number from 1 to {MAX_DETECTIONS_LIMIT}")
    return options
