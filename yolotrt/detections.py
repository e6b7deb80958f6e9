"""The result of a detection: one validated value per picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    """

    xyxy: npt.NDArray[np.float32]
    confidence: npt.NDArray[np.float32]
    class_id: npt.NDArray[np.int32]
    class_names: tuple[str, ...] = field(repr=False)
    image_size: tuple[int, int]

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

    def counts(self) -> dict[str, int]:
        """Number of detections by class name, in class order; classes without one are left out."""
        indices, numbers = np.unique(self.class_id, return_counts=True)
        return {self.class_names[index]: int(number) for index, number in zip(indices, numbers, strict=True)}

    def to_supervision(self) -> Any:
        """Convert to a `supervision.Detections`, with the names under ``data["class_name"]``.

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
            data={"class_name": np.array(self.names, dtype=str)},
        )

    @classmethod
    def empty(cls, class_names: tuple[str, ...], image_size: tuple[int, int]) -> Detections:
        """No objects."""
        return cls(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32), class_names, image_size
        )
