"""Masks of a picture's objects, evaluated where and when somebody looks at them.

A mask is made from what the network gives at a quarter of its input's size, so all of its information is in the small
`MaskCrop` of each box (a few kilobytes), whereas 300 masks of a 4K picture are 2.5 GB. `Masks` therefore keeps the
crops and enlarges one when it is asked for, straight to the picture's size and only inside its own window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import cv2
import numpy as np
import numpy.typing as npt

from yolotrt.postprocess import MASK_THRESHOLD, MaskCrop
from yolotrt.preprocess import Letterbox

Mask = npt.NDArray[np.bool_]

MIN_POLYGON_POINTS = 3

_RLE_BITS = 5
_RLE_MORE = 1 << _RLE_BITS
_RLE_SIGN = 1 << (_RLE_BITS - 1)
_RLE_FIRST_CHARACTER = 48


class Rle(TypedDict):
    """COCO's compressed run-length encoding: `size` is height and width."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class Window:
    """A part of a picture.

    Attributes:
        top: Its first row.
        left: Its first column.
        mask: bool (height, width): what of it belongs to the object. Outside of the window nothing does.
    """

    top: int
    left: int
    mask: Mask

    @property
    def area(self) -> tuple[slice, slice]:
        """Its rows and columns, as an index of the picture."""
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


class Masks:
    """A mask for each detection, in their order.

    ``masks[3]`` is bool (height, width) of the picture; `window` gives the same without the empty surroundings, in a
    time and memory that follow the object's size rather than the picture's.
    """

    def __init__(self, crops: Sequence[MaskCrop], letterbox: Letterbox) -> None:
        self._crops = tuple(crops)
        self._letterbox = letterbox

    def __len__(self) -> int:
        return len(self._crops)

    def __getitem__(self, index: int) -> Mask:
        mask = np.zeros(self._letterbox.source_size, np.bool_)
        window = self.window(index)
        mask[window.area] = window.mask
        return mask

    def __iter__(self) -> Iterator[Mask]:
        return (self[index] for index in range(len(self)))

    def dense(self) -> Mask:
        """All masks at once: bool (N, height, width), a byte a pixel and object."""
        masks = np.zeros((len(self), *self._letterbox.source_size), np.bool_)
        for mask, window in zip(masks, self.windows(), strict=True):
            mask[window.area] = window.mask
        return masks

    def windows(self) -> Iterator[Window]:
        """Each mask's window."""
        return (self.window(index) for index in range(len(self)))

    def window(self, index: int) -> Window:
        """The part of the picture that mask `index` may reach, and the mask there.

        The values are interpolated linearly between the prototypes' cells, as in YOLOv5's process_mask with upsampling
        (utils/segment/general.py), but straight to the picture's pixels rather than to the network's.
        """
        crop, (height, width) = self._crops[index], self._letterbox.source_size
        x, y = self._letterbox.grid_axes(crop.grid_size)
        columns = x.reach(crop.left, crop.values.shape[1], width)
        rows = y.reach(crop.top, crop.values.shape[0], height)
        if not crop.values.size or not columns or not rows:
            return Window(0, 0, np.zeros((0, 0), np.bool_))
        to_crop = np.array(
            [
                [x.step, 0, x.at(columns.start) - crop.left],
                [0, y.step, y.at(rows.start) - crop.top],
            ]
        )
        values = cv2.warpAffine(
            crop.values,
            to_crop,
            (len(columns), len(rows)),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        return Window(rows.start, columns.start, values > MASK_THRESHOLD)

    def polygon(self, index: int) -> npt.NDArray[np.int32]:
        """The outline of the largest connected part of mask `index`.

        Returns:
            int32 (points, 2): x and y in pixels of the picture. No points where the mask is empty or too thin to have
            an outline of three.
        """
        window = self.window(index)
        contours, _ = cv2.findContours(window.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        largest = max(contours, key=cv2.contourArea, default=np.zeros((0, 1, 2), np.int32))
        if len(largest) < MIN_POLYGON_POINTS:
            return np.zeros((0, 2), np.int32)
        points: npt.NDArray[np.int32] = np.array(largest.reshape(-1, 2), np.int32)
        points += np.array((window.left, window.top), np.int32)
        return points

    def rle(self, index: int) -> Rle:
        """Mask `index` in COCO's compressed run-length encoding, as pycocotools reads it."""
        height, width = self._letterbox.source_size
        window = self.window(index)
        columns = np.zeros((window.mask.shape[1], height), np.bool_)  # COCO goes down the columns
        columns[:, window.area[0]] = window.mask.T
        changes = np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False)) + window.left * height
        runs = np.diff(changes, prepend=0, append=height * width)
        if not runs[-1]:  # the object reaches the last pixel
            runs = runs[:-1]
        return {"size": [height, width], "counts": compress_runs(runs.tolist())}


def compress_runs(runs: Sequence[int]) -> str:
    """Run lengths as COCO's text (cocoapi common/maskApi.c, rleToString).

    From the fourth on, a run is given by its difference to the one before the last; each number is written in groups
    of five bits, lowest first, with a sixth that says whether another follows, as characters from "0" on.
    """
    characters = bytearray()
    for index, run in enumerate(runs):
        left = run - (runs[index - 2] if index > 2 else 0)
        more = True
        while more:
            bits = left & (_RLE_MORE - 1)
            left >>= _RLE_BITS
            more = left != (-1 if bits & _RLE_SIGN else 0)
            characters.append(_RLE_FIRST_CHARACTER + bits + (_RLE_MORE if more else 0))
    return characters.decode("ascii")
