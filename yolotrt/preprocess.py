"""From a picture to the network's input: YOLOv5's letterbox, on the CPU, and its exact inverse.

The rule (YOLOv5 utils/augmentations.py, letterbox): scale by the one ratio that makes the picture fit, pad the shorter
side with grey on both ends. OpenCV's pixel centres make the scaled coordinate of x simply x * new_width / width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

PAD_VALUE = 114
"""Grey level of the padding; YOLOv5 trains with it."""

LETTERBOX_RULE = {
    "pad_value": PAD_VALUE,
    "interpolation": "linear",
    "color_order": "RGB",
    "scale": "1/255",
    "centred": True,
}
"""How the input is made, in words, for the engine file."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
"""Of the red, green and blue values in 0..1 (YOLOv5 utils/augmentations.py)."""

CENTRE_CROP_RULE = {
    "crop": "centre square",
    "interpolation": "linear",
    "color_order": "RGB",
    "scale": "1/255",
    "mean": list(IMAGENET_MEAN),
    "deviation": list(IMAGENET_DEVIATION),
}
"""How a classifier's input is made, in words, for the engine file."""

_UNIT_SCALE = (np.arange(256, dtype=np.float32) / np.float32(255)).astype(np.float32)
"""k / 255 for every pixel value k."""

_NORMALISED = tuple(
    ((_UNIT_SCALE - np.float32(mean)) / np.float32(deviation)).astype(np.float32)
    for mean, deviation in zip(IMAGENET_MEAN, IMAGENET_DEVIATION, strict=True)
)
"""(k / 255 - mean) / deviation for every pixel value k, of red, green and blue."""


def input_rule(task: str) -> dict[str, Any]:
    """How the input of a model for `task` is made, in words, for the engine file."""
    return CENTRE_CROP_RULE if task == "classify" else LETTERBOX_RULE


@dataclass(frozen=True)
class CentreCrop:
    """YOLOv5's input of classifiers: the largest square in the middle, resized, normalised as ImageNet.

    The rule (YOLOv5 utils/augmentations.py, classify_transforms, CenterCrop and ToTensor).

    Attributes:
        network_size: Height and width of the network's input in pixels.
    """

    network_size: tuple[int, int]

    def apply(self, image: Image) -> Image:
        """Return the cropped and resized picture, uint8 BGR (network height, network width, 3)."""
        import cv2

        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = image[top : top + side, left : left + side]
        resized = cv2.resize(square, self.network_size[::-1], interpolation=cv2.INTER_LINEAR)
        return resized.astype(np.uint8, copy=False)

    def to_input(self, image: Image, out: npt.NDArray[np.float32]) -> None:
        """Write the picture into `out` as the network wants it.

        Args:
            image: uint8 BGR (height, width, 3).
            out: float32 (3, network height, network width), contiguous; becomes RGB, normalised.
        """
        import cv2

        planes = reversed(cv2.split(self.apply(image)))  # BGR -> RGB
        for plane, table, channel in zip(planes, _NORMALISED, out, strict=True):
            cv2.LUT(plane, table, dst=channel)


@dataclass(frozen=True)
class GridAxis:
    """How pixels along one axis lie between the cells of a grid over the input: pixel p at ``step p + offset``."""

    step: float
    offset: float

    @classmethod
    def make(cls, scale: float, padding: int, network_side: int, cells: int) -> GridAxis:
        """From network pixels a picture pixel, padding in network pixels, and the two sizes; centres match centres."""
        cells_a_pixel = cells / network_side
        return cls(scale * cells_a_pixel, (scale / 2 + padding) * cells_a_pixel - 0.5)

    def at(self, pixel: int) -> float:
        """Where a picture's pixel lies, in cells."""
        return self.step * pixel + self.offset

    def reach(self, first: int, cells: int, side: int) -> range:
        """The picture's pixels that a crop of `cells` from `first` on can reach, with a cell around it."""
        low = int(np.floor((first - 1 - self.offset) / self.step))
        high = int(np.ceil((first + cells - self.offset) / self.step))
        return range(min(max(low, 0), side), min(max(high + 1, 0), side))


@dataclass(frozen=True)
class Letterbox:
    """How one picture lies in the network's input; owns the scale and the padding of both directions.

    Attributes:
        source_size: Height and width of the picture in pixels.
        network_size: Height and width of the network's input in pixels.
        scaled_size: Height and width of the picture inside the input.
        top: Rows of padding above it.
        left: Columns of padding to its left.
    """

    source_size: tuple[int, int]
    network_size: tuple[int, int]
    scaled_size: tuple[int, int]
    top: int
    left: int

    @classmethod
    @functools.lru_cache(maxsize=256)
    def fit(cls, source_size: tuple[int, int], network_size: tuple[int, int]) -> Letterbox:
        """Fit a picture into the network's input.

        Args:
            source_size: Height and width of the picture, at least 1 pixel each.
            network_size: Height and width of the input.

        Raises:
            ValueError: if a size is below 1.
        """
        if min(*source_size, *network_size) < 1:
            raise ValueError(f"cannot fit a picture of {source_size} pixels into {network_size}")
        ratio = min(network_size[0] / source_size[0], network_size[1] / source_size[1])
        # a side never vanishes: 10000 x 1 pixels become 640 x 1, not 640 x 0
        height, width = (max(round(side * ratio), 1) for side in source_size)
        vertical, horizontal = network_size[0] - height, network_size[1] - width
        return cls(source_size, network_size, (height, width), round(vertical / 2 - 0.1), round(horizontal / 2 - 0.1))

    @property
    def scale(self) -> tuple[float, float]:
        """Network pixels per picture pixel, horizontally and vertically."""
        return self.scaled_size[1] / self.source_size[1], self.scaled_size[0] / self.source_size[0]

    def apply(self, image: Image) -> Image:
        """Return the letterboxed picture, uint8 BGR (network height, network width, 3)."""
        canvas = np.full((*self.network_size, 3), PAD_VALUE, np.uint8)
        canvas[self._rows, self._columns] = self._scaled(image)
        return canvas

    def to_input(self, image: Image, out: npt.NDArray[np.float32]) -> None:
        """Write the letterboxed picture into `out` as the network wants it.

        Args:
            image: uint8 BGR (height, width, 3), of `source_size`.
            out: float32 (3, network height, network width), contiguous; becomes RGB in 0..1.
        """
        import cv2  # here, since builds need the rule above and no pictures

        out[:, : self.top] = out[:, self.top + self.scaled_size[0] :] = _UNIT_SCALE[PAD_VALUE]
        out[:, self._rows, : self.left] = _UNIT_SCALE[PAD_VALUE]
        out[:, self._rows, self.left + self.scaled_size[1] :] = _UNIT_SCALE[PAD_VALUE]
        planes = cv2.split(self._scaled(image))
        for channel, plane in enumerate(reversed(planes)):  # BGR -> RGB
            cv2.LUT(plane, _UNIT_SCALE, dst=out[channel, self._rows, self._columns])

    def forward(self, xy: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Picture coordinates (..., 2k), x and y alternating, in network-input pixels."""
        scale, offset = self._affine(xy.shape[-1])
        return np.asarray(xy * scale + offset, np.float32)

    def inverse(self, xy: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Network-input coordinates (..., 2k), x and y alternating, in picture pixels, clipped to the picture."""
        scale, offset = self._affine(xy.shape[-1])
        limit = np.tile(np.array(self.source_size[::-1], np.float32), xy.shape[-1] // 2)
        return np.clip(np.asarray((xy - offset) / scale, np.float32), 0, limit)

    def grid_axes(self, grid_size: tuple[int, int]) -> tuple[GridAxis, GridAxis]:
        """How the picture's columns and rows lie between the cells of a grid (height, width) over the input."""
        (scale_x, scale_y), (height, width) = self.scale, self.network_size
        return (
            GridAxis.make(scale_x, self.left, width, grid_size[1]),
            GridAxis.make(scale_y, self.top, height, grid_size[0]),
        )

    @property
    def _rows(self) -> slice:
        return slice(self.top, self.top + self.scaled_size[0])

    @property
    def _columns(self) -> slice:
        return slice(self.left, self.left + self.scaled_size[1])

    def _scaled(self, image: Image) -> Image:
        """The picture in its scaled size; an equal size is not resampled, as in YOLOv5."""
        if image.shape[:2] == self.scaled_size:
            return image
        import cv2

        height, width = self.scaled_size
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)

    def _affine(self, values: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Scale and offset for `values` alternating x and y coordinates."""
        pairs = values // 2
        return np.tile(np.array(self.scale), pairs), np.tile(np.array((self.left, self.top), np.float64), pairs)
