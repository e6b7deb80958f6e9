"""The faces of the road signs, drawn as vector shapes.

A face lives in the unit square: x and y from -1 to 1, y down. Faces of signs follow the Vienna Convention's shapes and
colours (a red ring forbids, a blue disc commands) without copying any country's drawing. Colours are BGR.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]
Points = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]

RED: Colour = (38, 30, 200)
WHITE: Colour = (242, 242, 242)
BLACK: Colour = (24, 24, 24)
BLUE: Colour = (172, 84, 12)
YELLOW: Colour = (24, 190, 250)
GREY: Colour = (140, 142, 140)

CLASS_NAMES = (
    "stop",
    "yield",
    "no entry",
    "speed limit 30",
    "speed limit 50",
    "speed limit 70",
    "speed limit 100",
    "priority road",
    "pedestrian crossing",
    "no overtaking",
    "roundabout",
    "keep right",
)
"""The classes, in class order. The one table that the renderer, the trainer and the shipped model share."""

MARGIN = 1.1
"""Half the side of a face's canvas in units of the face: the rim keeps interpolation from cutting the outline."""

TOP_LEVEL = 384
SUPERSAMPLING = 2
SUB_PIXEL_BITS = 4
LEVELS = 5


@dataclass(frozen=True)
class Face:
    """A drawn face.

    Attributes:
        levels: Premultiplied BGRA uint8 pictures of falling size, 384 px to 24 px, for warping without aliasing.
        outline: float64 (N, 2): the outer edge in the unit square; its warped extent is the sign's exact box.
    """

    levels: tuple[Image, ...]
    outline: Points


class Painter:
    """Fills shapes, given in the unit square, on an oversized canvas."""

    def __init__(self) -> None:
        side = TOP_LEVEL * SUPERSAMPLING
        self.colour = np.zeros((side, side, 3), np.uint8)
        self.alpha = np.zeros((side, side), np.uint8)

    def fill(self, points: Points, colour: Colour) -> None:
        """Fill a polygon of shape (N, 2)."""
        cv2.fillPoly(self.colour, [self._fixed(points)], colour, cv2.LINE_AA, SUB_PIXEL_BITS)

    def stroke(self, points: Points, width: float, colour: Colour) -> None:
        """Draw a line of the given width through `points`, with round ends and corners."""
        thickness = max(1, round(width * len(self.colour) / (2 * MARGIN)))
        cv2.polylines(self.colour, [self._fixed(points)], False, colour, thickness, cv2.LINE_AA, SUB_PIXEL_BITS)

    def finish(self, outline: Points) -> Face:
        """Cut the canvas along `outline` and shrink it to all levels."""
        cv2.fillPoly(self.alpha, [self._fixed(outline)], 255, cv2.LINE_AA, SUB_PIXEL_BITS)
        opacity = self.alpha[..., None].astype(np.float32) / 255
        canvas = np.concatenate([self.colour * opacity, self.alpha[..., None].astype(np.float32)], axis=2)
        sides = [TOP_LEVEL >> level for level in range(LEVELS)]
        levels = [cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA) for side in sides]
        return Face(tuple(np.rint(level).astype(np.uint8) for level in levels), outline)

    def _fixed(self, points: Points) -> npt.NDArray[np.int32]:
        """Unit-square points as OpenCV's fixed-point pixel-centre coordinates."""
        pixels = (points / MARGIN + 1) / 2 * len(self.colour) - 0.5
        return np.rint(pixels * (1 << SUB_PIXEL_BITS)).astype(np.int32)


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, count: int = 48) -> Points:
    """Points of an elliptic arc; angles in degrees, clockwise on the screen, 0 to the right."""
    angles = np.radians(np.linspace(start, end, count))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def circle(radius: float, x: float = 0.0, y: float = 0.0) -> Points:
    """A disc's edge; 96 points keep its extent exact to 0.06 % of the radius."""
    return arc(x, y, radius, radius, 0, 360, 97)[:-1]


def polygon(count: int, radius: float, turn: float) -> Points:
    """A regular polygon whose first corner is at `turn` degrees."""
    return arc(0, 0, radius, radius, turn, turn + 360, count + 1)[:-1]


def rectangle(x1: float, y1: float, x2: float, y2: float) -> Points:
    """An upright rectangle's corners."""
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], float)


def rounded(points: Points, radius: float) -> Points:
    """Replace the corners of a convex polygon, whose points run clockwise on the screen, by arcs."""
    before, after = np.roll(points, 1, axis=0), np.roll(points, -1, axis=0)
    pieces = []
    for corner, left, right in zip(points, before, after, strict=True):
        a, b = (left - corner) / np.hypot(*(left - corner)), (right - corner) / np.hypot(*(right - corner))
        half = math.acos(float(np.clip(a @ b, -1, 1))) / 2
        centre = corner + (a + b) / np.hypot(*(a + b)) * radius / math.sin(half)
        first = math.degrees(math.atan2(*(corner + a * radius / math.tan(half) - centre)[::-1]))
        pieces.append(arc(centre[0], centre[1], radius, radius, first, first + 180 - 2 * math.degrees(half), 12))
    return np.concatenate(pieces)


# Glyphs: strokes in a box with x from 0 to 1 (before the advance width) and y from 0 (top) to 1 (bottom).
_CURVED: dict[str, list[Points]] = {
    "0": [arc(0.5, 0.32, 0.5, 0.32, 180, 360), arc(0.5, 0.68, 0.5, 0.32, 0, 180)],
    "3": [arc(0.48, 0.26, 0.46, 0.26, 200, 450), arc(0.48, 0.74, 0.52, 0.26, 270, 520)],
    "5": [np.array([(0.92, 0.0), (0.12, 0.0), (0.06, 0.46)]), arc(0.46, 0.68, 0.54, 0.32, 222, 510)],
    "7": [np.array([(0.0, 0.0), (1.0, 0.0), (0.36, 1.0)])],
    "1": [np.array([(0.1, 0.2), (0.6, 0.0), (0.6, 1.0)])],
    "S": [arc(0.5, 0.26, 0.46, 0.26, 340, 90), arc(0.5, 0.75, 0.48, 0.25, 270, 520)],
    "T": [np.array([(0.0, 0.0), (1.0, 0.0)]), np.array([(0.5, 0.0), (0.5, 1.0)])],
    "O": [arc(0.5, 0.5, 0.5, 0.5, 0, 360)],
    "P": [np.array([(0.1, 1.0), (0.1, 0.0), (0.55, 0.0)]), arc(0.55, 0.29, 0.42, 0.29, 270, 450),
          np.array([(0.55, 0.58), (0.1, 0.58)])],
}  # fmt: skip
_CURVED["0"] = [np.concatenate([*_CURVED["0"], _CURVED["0"][0][:1]])]


def write(painter: Painter, text: str, box: tuple[float, float, float, float], width: float, colour: Colour) -> None:
    """Draw thick letters that fill `box` = (x1, y1, x2, y2); `width` is the stroke's width."""
    x1, y1, x2, y2 = box
    advances = [0.55 if character == "1" else 1.0 for character in text]
    gap = 0.62 if len(text) < 4 else 0.5
    unit = (x2 - x1) / (sum(advances) + gap * (len(text) - 1))
    left = x1
    for character, advance in zip(text, advances, strict=True):
        for line in _CURVED[character]:
            scaled = line * ((0.75 if character == "1" else advance) * unit, y2 - y1) + (left, y1)
            painter.stroke(scaled, width, colour)
        left += (advance + gap) * unit


def stop() -> Face:
    """Red octagon, white rim, STOP."""
    painter, outline = Painter(), polygon(8, 1 / math.cos(math.pi / 8), 22.5)
    painter.fill(outline, WHITE)
    painter.fill(outline * 0.93, RED)
    write(painter, "STOP", (-0.68, -0.3, 0.68, 0.3), 0.13, WHITE)
    return painter.finish(outline)


def yield_() -> Face:
    """White triangle on its tip, broad red rim."""
    painter, corners = Painter(), np.array([(-1.08, -0.92), (1.08, -0.92), (0.0, 0.95)])
    outline = rounded(corners, 0.09)
    painter.fill(outline, RED)
    painter.fill((corners - (0, -0.297)) * 0.56 + (0, -0.297), WHITE)
    return painter.finish(outline)


def no_entry() -> Face:
    """Red disc, white bar."""
    painter, outline = Painter(), circle(1)
    painter.fill(outline, WHITE)
    painter.fill(outline * 0.95, RED)
    painter.fill(rectangle(-0.7, -0.19, 0.7, 0.19), WHITE)
    return painter.finish(outline)


def _red_ring() -> tuple[Painter, Points]:
    """A white disc with a red ring."""
    painter, outline = Painter(), circle(1)
    painter.fill(outline, RED)
    painter.fill(outline * 0.78, WHITE)
    return painter, outline


def speed_limit(limit: int) -> Face:
    """Red ring, black number."""
    painter, outline = _red_ring()
    if limit < 100:
        write(painter, str(limit), (-0.46, -0.37, 0.46, 0.37), 0.19, BLACK)
    else:
        write(painter, str(limit), (-0.56, -0.32, 0.56, 0.32), 0.155, BLACK)
    return painter.finish(outline)


def priority_road() -> Face:
    """Yellow diamond in a white one."""
    painter, corners = Painter(), np.array([(0.0, -1.04), (1.04, 0.0), (0.0, 1.04), (-1.04, 0.0)])
    outline = rounded(corners, 0.09)
    painter.fill(outline, BLACK)
    painter.fill(outline * 0.965, WHITE)
    painter.fill(rounded(corners * 0.68, 0.05), YELLOW)
    return painter.finish(outline)


def pedestrian_crossing() -> Face:
    """Blue square, white triangle, a walker on stripes."""
    painter, outline = Painter(), rounded(rectangle(-1, -1, 1, 1), 0.12)
    painter.fill(outline, WHITE)
    painter.fill(rounded(rectangle(-0.95, -0.95, 0.95, 0.95), 0.1), BLUE)
    painter.fill(np.array([(0.0, -0.82), (0.86, 0.7), (-0.86, 0.7)]), WHITE)
    painter.fill(circle(0.11, 0.04, -0.36), BLACK)
    painter.stroke(np.array([(0.02, -0.16), (0.0, 0.16)]), 0.2, BLACK)
    painter.stroke(np.array([(0.0, 0.16), (0.2, 0.52)]), 0.11, BLACK)
    painter.stroke(np.array([(0.0, 0.16), (-0.2, 0.52)]), 0.11, BLACK)
    painter.stroke(np.array([(-0.24, 0.1), (0.02, -0.14), (0.24, 0.08)]), 0.08, BLACK)
    for x in (-0.55, -0.2, 0.18, 0.53):
        painter.stroke(np.array([(x - 0.05, 0.64), (x + 0.05, 0.64)]), 0.08, BLACK)
    return painter.finish(outline)


def no_overtaking() -> Face:
    """Red ring, a red car beside a black one."""
    painter, outline = _red_ring()
    for x, colour in ((-0.34, RED), (0.34, BLACK)):
        painter.fill(rounded(rectangle(x - 0.26, -0.06, x + 0.26, 0.22), 0.06), colour)
        painter.fill(np.array([(x - 0.2, -0.04), (x - 0.13, -0.28), (x + 0.13, -0.28), (x + 0.2, -0.04)]), colour)
        painter.fill(rectangle(x - 0.25, 0.2, x - 0.11, 0.33), colour)
        painter.fill(rectangle(x + 0.11, 0.2, x + 0.25, 0.33), colour)
    return painter.finish(outline)


def _blue_disc() -> tuple[Painter, Points]:
    """A blue disc with a thin white rim."""
    painter, outline = Painter(), circle(1)
    painter.fill(outline, WHITE)
    painter.fill(outline * 0.94, BLUE)
    return painter, outline


def roundabout() -> Face:
    """Blue disc, three arrows in a ring."""
    painter, outline = _blue_disc()
    for start in (-90, 30, 150):
        painter.stroke(arc(0, 0, 0.5, 0.5, start, start - 62), 0.2, WHITE)
        angle = math.radians(start - 100)
        along, across = np.array([math.sin(angle), -math.cos(angle)]), np.array([math.cos(angle), math.sin(angle)])
        tip, base = across * 0.5 + along * 0.1, across * 0.52 - along * 0.27
        painter.fill(np.array([tip, base + across * 0.27, base - across * 0.27]), WHITE)
    return painter.finish(outline)


def keep_right() -> Face:
    """Blue disc, an arrow down to the right."""
    painter, outline = _blue_disc()
    painter.stroke(np.array([(-0.5, -0.5), (0.2, 0.2)]), 0.24, WHITE)
    painter.fill(np.array([(0.62, 0.62), (0.62, -0.16), (-0.16, 0.62)]), WHITE)
    return painter.finish(outline)


_CLASS_FACES: Sequence[Callable[[], Face]] = (
    stop, yield_, no_entry, *(functools.partial(speed_limit, limit) for limit in (30, 50, 70, 100)),
    priority_road, pedestrian_crossing, no_overtaking, roundabout, keep_right,
)  # fmt: skip


@functools.cache
def class_face(class_id: int) -> Face:
    """The face of a class, drawn once a process."""
    return _CLASS_FACES[class_id]()


def _plain(outline: Points, *fills: tuple[Points, Colour]) -> Face:
    painter = Painter()
    for points, colour in fills:
        painter.fill(points, colour)
    return painter.finish(outline)


def _back(outline: Points) -> Face:
    """The grey back of a sign, with its two mounting rails."""
    painter = Painter()
    painter.fill(outline, GREY)
    for y in (-0.32, 0.32):
        painter.stroke(np.array([(-0.5, y), (0.5, y)]), 0.09, (96, 98, 98))
    return painter.finish(outline)


def _parking() -> Face:
    painter, outline = Painter(), rounded(rectangle(-1, -1, 1, 1), 0.12)
    painter.fill(outline, WHITE)
    painter.fill(outline * 0.94, BLUE)
    write(painter, "P", (-0.3, -0.5, 0.4, 0.5), 0.22, WHITE)
    return painter.finish(outline)


def _no_parking() -> Face:
    painter, outline = Painter(), circle(1)
    painter.fill(outline, RED)
    painter.fill(outline * 0.8, BLUE)
    painter.stroke(np.array([(-0.6, -0.6), (0.6, 0.6)]), 0.18, RED)
    return painter.finish(outline)


def _clock() -> Face:
    painter, outline = Painter(), circle(1)
    painter.fill(outline, BLACK)
    painter.fill(outline * 0.9, WHITE)
    for angle in range(0, 360, 30):
        x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        painter.stroke(np.array([(0.7 * x, 0.7 * y), (0.8 * x, 0.8 * y)]), 0.06, BLACK)
    painter.stroke(np.array([(0.35, -0.3), (0.0, 0.0), (0.0, -0.62)]), 0.08, BLACK)
    return painter.finish(outline)


def _danger() -> Face:
    painter, corners = Painter(), np.array([(-1.08, 0.92), (0.0, -0.95), (1.08, 0.92)])
    outline = rounded(corners, 0.09)
    painter.fill(outline, RED)
    painter.fill((corners - (0, 0.297)) * 0.6 + (0, 0.297), WHITE)
    painter.stroke(np.array([(0.0, -0.12), (0.0, 0.3)]), 0.16, BLACK)
    painter.fill(circle(0.1, 0, 0.58), BLACK)
    return painter.finish(outline)


_SQUARE, _DIAMOND = rounded(rectangle(-1, -1, 1, 1), 0.12), rounded(polygon(4, 1.04, -90), 0.09)
_OCTAGON, _DISC = polygon(8, 1 / math.cos(math.pi / 8), 22.5), circle(1)
_TIP_DOWN = rounded(np.array([(-1.08, -0.92), (1.08, -0.92), (0.0, 0.95)]), 0.09)

_DISTRACTOR_FACES: Sequence[Callable[[], Face]] = (
    lambda: _plain(_DISC, (_DISC, RED), (_DISC * 0.78, WHITE)),  # closed to vehicles: a ring without a number
    lambda: _plain(_DISC, (_DISC, WHITE), (_DISC * 0.94, BLUE)),  # a blue disc without an arrow
    lambda: _plain(_DISC, (_DISC, RED)),
    lambda: _plain(_DISC, (_DISC, (30, 120, 240)), (_DISC * 0.6, YELLOW)),
    lambda: _plain(_DISC, (_DISC, WHITE), (_DISC * 0.9, (70, 130, 20))),
    lambda: _plain(_SQUARE, (_SQUARE, WHITE), (_SQUARE * 0.9, (70, 130, 20))),
    lambda: _plain(_SQUARE, (_SQUARE, YELLOW), (_SQUARE * 0.5, BLACK)),
    lambda: _plain(_OCTAGON, (_OCTAGON, (200, 200, 200)), (_OCTAGON * 0.8, (90, 120, 60))),
    _parking, _no_parking, _clock, _danger,
    *(functools.partial(_back, outline) for outline in (_DISC, _SQUARE, _OCTAGON, _TIP_DOWN, _DIAMOND, _DISC)),
)  # fmt: skip
DISTRACTOR_COUNT = len(_DISTRACTOR_FACES)


@functools.cache
def distractor_face(index: int) -> Face:
    """A face that looks like a sign's and belongs to no class, drawn once a process."""
    return _DISTRACTOR_FACES[index]()
