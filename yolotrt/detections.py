"""The result of a detection or classification: one validated value per picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yolotrt.masks import Masks


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found in one picture, best first.

    Field names are those of `supervision.Detections`.

    Attributes:
        xyxy: float32 (N, 4): left, top, right, bottom in pixels of the original picture, x right, y down.
        confidence: float32 (N,): objectness x class probability, in 0..1.
        class_id: int32 (N,): class index.
        class_names: Name of every class of the model, in class order.
        image_size: Height and width of the original picture in pixels.
        masks: A mask for each detection, evaluated one at a time; None for models that only give boxes.
    """

    xyxy: npt.NDArray[np.float32]
    confidence: npt.NDArray[np.float32]
    class_id: npt.NDArray[np.int32]
    class_names: tuple[str, ...] = field(repr=False)
    image_size: tuple[int, int]
    masks: Masks | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check shapes and class indices.

        Raises:
            ValueError: if the arrays' lengths differ or a class index has no name.
        """
        count = len(self.xyxy)
        if self.xyxy.shape != (count, 4) or self.confidence.shape != (count,) or self.class_id.shape != (count,):
            raise ValueError(
                f"xyxy {self.xyxy.shape}, confidence {self.confidence.shape} and class_id {self.class_id.shape} "
                "must be (N, 4), (N,) and (N,)"
            )
        if count and not 0 <= int(self.class_id.min()) <= int(self.class_id.max()) < len(self.class_names):
            raise ValueError(f"a class index is outside 0..{len(self.class_names) - 1}")
        if self.masks is not None and len(self.masks) != count:
            raise ValueError(f"{len(self.masks)} masks for {count} detections")

    def __len__(self) -> int:
        return len(self.xyxy)

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.float32], float, int, str]]:
        """Iterate over (xyxy, confidence, class_id, name), best first."""
        for box, confidence, class_id in zip(self.xyxy, self.confidence, self.class_id, strict=True):
            yield box, float(confidence), int(class_id), self.class_names[class_id]

    @property
    def names(self) -> list[str]:
        """The class name of every detection."""
        return [self.class_names[index] for index in self.class_id]

    @property
    def mask(self) -> npt.NDArray[np.bool_] | None:
        """All masks, bool (N, height, width) of the picture, or None for models that only give boxes.

        They are computed anew each time and take a byte a pixel and object, 2.5 GB for 300 objects in a 4K picture:
        `masks` gives them one at a time, or only the part of the picture that an object covers.
        """
        return None if self.masks is None else self.masks.dense()

    def counts(self) -> dict[str, int]:
        """Number of detections by class name, in class order; classes without one are left out."""
        indices, numbers = np.unique(self.class_id, return_counts=True)
        return {self.class_names[index]: int(number) for index, number in zip(indices, numbers, strict=True)}

    def to_supervision(self) -> Any:
        """Convert to a `supervision.Detections`, with the names under ``data["class_name"]`` and the masks, if any.

        Raises:
            BackendUnavailableError: if the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError as problem:
            raise BackendUnavailableError(
                f"supervision cannot be loaded ({problem}): run pip install supervision"
            ) from problem

        return supervision.Detections(
            xyxy=self.xyxy.copy(),
            confidence=self.confidence.copy(),
            class_id=self.class_id.astype(np.int64),
            mask=self.mask,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    @classmethod
    def empty(cls, class_names: tuple[str, ...], image_size: tuple[int, int]) -> Detections:
        """No objects."""
        return cls(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), class_names, image_size
        )


@dataclass(frozen=True, eq=False)
class Classification:
    """What one picture shows, according to a classifier.

    Attributes:
        probabilities: float32 (classes,), in class order, of sum 1.
        class_names: Name of every class of the model, in class order.
        image_size: Height and width of the original picture in pixels.
    """

    probabilities: npt.NDArray[np.float32]
    class_names: tuple[str, ...] = field(repr=False)
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        """Check the shape.

        Raises:
            ValueError: if there is not one probability for each class.
        """
        if self.probabilities.shape != (len(self.class_names),):
            raise ValueError(f"probabilities {self.probabilities.shape} for {len(self.class_names)} classes")

    @property
    def class_id(self) -> int:
        """The most probable class, the first of equals."""
        return int(self.probabilities.argmax())

    @property
    def name(self) -> str:
        """Its name."""
        return self.class_names[self.class_id]

    @property
    def confidence(self) -> float:
        """Its probability."""
        return float(self.probabilities.max())

    def top(self, count: int = 5) -> list[tuple[int, str, float]]:
        """(class index, name, probability) of the most probable classes, best first, at most `count` of them."""
        best = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(int(index), self.class_names[index], float(self.probabilities[index])) for index in best]

    def counts(self) -> dict[str, int]:
        """The most probable class, once: what `Detections.counts` is for detections."""
        return {self.name: 1}
