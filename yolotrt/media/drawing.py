"""Detections drawn into a picture."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from yolotrt.detections import Classification, Detections
from yolotrt.masks import Window

Color = tuple[int, int, int]

# Farthest-point choice from a grid of saturated sRGB colours in CIELAB: any two are at least 29 CIELAB units apart, and
# the first few, which most models use, are far more. Red, green, blue in hexadecimal.
_PALETTE_RGB = (
    "ff3c3c 00ff00 6900ff 00b4ff 5a6900 ff78e1 00f0c3 ffd200 005ae1 e1965a 96e15a ff0fff "
    "a52d5a 0f964b 961eb4 ff7800 a596f0 ff0087 a53c1e e1d269 ff8796 964b96 00f087 00c30f"
)
PALETTE: tuple[Color, ...] = tuple((int(c[4:], 16), int(c[2:4], 16), int(c[:2], 16)) for c in _PALETTE_RGB.split())
"""Colours of the classes as (blue, green, red); class k has colour k modulo their number."""

BLACK: Color = (0, 0, 0)
WHITE: Color = (255, 255, 255)

# Measured on cv2.FONT_HERSHEY_SIMPLEX at scale 1 and thickness 1, in pixels. OpenCV 4 (strokes) and 5 (TrueType) agree.
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FONT_ASCENT = 26
_FONT_DESCENT = 9
_MIN_FONT_SCALE = 0.4  # capitals of 9 pixels; below it e, a and s become one blob

# Latin letters that Unicode does not decompose into an ASCII letter and an accent.
_ASCII_LETTERS = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d"}
)
_ELLIPSIS = ".."
_HARMLESS_SHARE = 0.03
"""A label may hide this share of other boxes before it looks for another place."""
_LABEL_WEIGHT = 5
"""Hiding a part of a label is worse than hiding the same part of an object."""


@dataclass(frozen=True)
class _Style:
    """Sizes in pixels that follow from the picture's size."""

    line_width: int
    font_scale: float
    thickness: int
    padding: int

    @property
    def ascent(self) -> int:
        """Height of a label above its baseline."""
        return round(_FONT_ASCENT * self.font_scale) + self.thickness

    @property
    def label_height(self) -> int:
        """Height of a label."""
        return self.ascent + round(_FONT_DESCENT * self.font_scale) + self.thickness

    def text_width(self, text: str) -> int:
        """Width of a label with this text."""
        return int(cv2.getTextSize(text, _FONT, self.font_scale, self.thickness)[0][0]) + 2 * self.padding


@dataclass(frozen=True)
class _Label:
    """A text, and where its filled rectangle's left upper corner is."""

    text: str
    left: int
    top: int
    width: int
    color: Color


def draw(
    image: npt.NDArray[np.uint8],
    detections: Detections | Classification,
    *,
    line_width: int | None = None,
    show_confidence: bool = True,
) -> npt.NDArray[np.uint8]:
    """Draw boxes and labels such as ``person 0.87`` into a copy of a picture; the most confident are on top.

    Masks tint what they cover in the colour of the class. A classification's best five classes are written into the
    left upper corner, such as ``dog 0.62``.

    Labels stay inside the picture: above their box, or where there is no room or another box or label is in the way,
    below, beside or inside it; shortened if wider than the picture, and left out where not even a few letters would be
    legible.

    OpenCV 5 draws Latin, Greek, Cyrillic, Hebrew, Arabic (unjoined), Chinese, Japanese and Korean names, OpenCV 4 ASCII
    only. Of other names accents are dropped; if that does not help, the class index ``#3`` stands for the name.

    Args:
        image: uint8 (H, W, 3), BGR, of the size that the detections belong to. It is not changed.
        detections: What to draw.
        line_width: Width of the box lines in pixels, at least 1; chosen from the picture's size if None.
        show_confidence: Whether labels end with the confidence.

    Returns:
        uint8 (H, W, 3), BGR, a new array.

    Raises:
        ValueError: if the picture is not uint8 (H, W, 3), or the detections belong to one of another size.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"picture of shape {image.shape} and dtype {image.dtype}: uint8 (H, W, 3) is needed")
    if image.shape[:2] != tuple(detections.image_size):
        raise ValueError(f"detections of a {detections.image_size} picture do not fit one of {image.shape[:2]}")
    canvas = np.array(image, order="C")  # a copy, also of a view such as image[:, ::-1]
    if isinstance(detections, Classification):
        _write_classes(canvas, detections, line_width)
        return canvas
    if not len(detections) or not canvas.size:
        return canvas
    height, width = canvas.shape[:2]
    style = _style(height, width, line_width)
    boxes = _pixel_boxes(detections.xyxy, height, width)
    # The best one chooses its label's place first and is drawn last; of equals that is the first.
    order = np.argsort(-detections.confidence, kind="stable")
    if detections.masks is not None:
        for index in order[::-1]:
            _tint(canvas, detections.masks.window(int(index)), class_color(int(detections.class_id[index])))
    labels: list[_Label] = []
    for index in order:
        class_id = int(detections.class_id[index])
        confidence = f"{detections.confidence[index]:.2f}" if show_confidence else ""
        text = _fitted_text(drawable_name(detections.class_names[class_id], class_id), confidence, style, width)
        if text and 2 * style.label_height <= height:
            left, top = _label_place(int(index), boxes, labels, style.text_width(text), style, (height, width))
            labels.append(_Label(text, left, top, style.text_width(text), class_color(class_id)))
    for index in order[::-1]:
        _draw_box(canvas, boxes[index], class_color(int(detections.class_id[index])), style.line_width)
    for label in labels[::-1]:  # after all boxes, so that no line crosses a text
        _draw_label(canvas, label, style)
    return canvas


def _write_classes(canvas: npt.NDArray[np.uint8], classification: Classification, line_width: int | None) -> None:
    """Write the best classes below each other, as far as there is room."""
    height, width = canvas.shape[:2]
    if not canvas.size:
        return
    style = _style(height, width, line_width)
    for row, (class_id, name, probability) in enumerate(classification.top()):
        text = _fitted_text(drawable_name(name, class_id), f"{probability:.2f}", style, width)
        top = row * style.label_height
        if text and top + style.label_height <= height:
            _draw_label(canvas, _Label(text, 0, top, style.text_width(text), class_color(class_id)), style)


def _tint(canvas: npt.NDArray[np.uint8], window: Window, color: Color) -> None:
    """Mix the colour half and half into what the mask covers."""
    part = canvas[window.area]
    part[window.mask] = (part[window.mask].astype(np.uint16) + np.array(color, np.uint16)) // 2


def class_color(class_id: int) -> Color:
    """The fixed colour of a class as (blue, green, red)."""
    return PALETTE[class_id % len(PALETTE)]


def text_color(background: Color) -> Color:
    """Black or white, whichever contrasts more with `background` (relative luminance and contrast of WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in background)]
    luminance = 0.0722 * linear[0] + 0.7152 * linear[1] + 0.2126 * linear[2]
    return BLACK if (luminance + 0.05) ** 2 > 0.05 * 1.05 else WHITE


@lru_cache(maxsize=1024)
def drawable_name(name: str, class_id: int) -> str:
    """The class name as far as this OpenCV's font can draw it: as it is, in ASCII, or ``#`` and the class index."""
    composed = unicodedata.normalize("NFC", " ".join(name.split()))
    decomposed = unicodedata.normalize("NFKD", composed.translate(_ASCII_LETTERS))
    plain = "".join(character for character in decomposed if not unicodedata.combining(character))
    for candidate in (composed, plain):
        if candidate and all(_is_drawable(character) for character in candidate):
            return candidate
    return f"#{class_id}"


def _is_drawable(character: str) -> bool:
    """Whether cv2.putText draws the character, and not a question mark; OpenCV 4 draws up to one for each byte."""
    if character.isascii():
        return character.isprintable()
    if unicodedata.category(character) == "Cs":
        return False  # a lone surrogate has no UTF-8 form; cv2.putText (4.8 to 5.0) crashes on it
    drawn = _drawn(character)
    substitutes = (_drawn("?" * count) for count in range(1, len(character.encode()) + 1))
    return bool(drawn.any()) and not any(np.array_equal(drawn, substitute) for substitute in substitutes)


def _drawn(text: str) -> npt.NDArray[np.uint8]:
    """A few characters in black and white."""
    canvas = np.zeros((40, 120), np.uint8)
    cv2.putText(canvas, text, (4, 28), _FONT, 1.0, 255)
    return canvas


def _style(height: int, width: int, line_width: int | None) -> _Style:
    """Sizes for a picture: proportional to it, but for a long strip to its short side."""
    reference = min((height + width) / 2, 3 * min(height, width))
    line = max(1, round(reference * 0.003)) if line_width is None else max(1, line_width)
    scale = max(_MIN_FONT_SCALE, reference * 0.0007)
    return _Style(line, scale, thickness=max(1, round(scale * 1.5)), padding=max(2, round(scale * 6)))


def _pixel_boxes(xyxy: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.int64]:
    """Whole pixels inside the picture; shape (N, 4)."""
    limits = np.array([width - 1, height - 1, width - 1, height - 1])
    finite = np.nan_to_num(xyxy.astype(np.float64), nan=0.0)
    whole: npt.NDArray[np.int64] = np.clip(finite.round(), 0, limits).astype(np.int64)
    return whole


def _draw_box(canvas: npt.NDArray[np.uint8], box: npt.NDArray[np.int64], color: Color, line_width: int) -> None:
    """Draw the outline as four filled bars: its corners are sharp, and at the picture's edge it keeps its width."""
    height, width = canvas.shape[:2]
    x1, y1, x2, y2 = (int(value) for value in box)
    outer = line_width // 2
    inner = line_width - outer
    left, right = max(0, min(x1 - outer, width - line_width)), min(width, max(x2 + inner, line_width))
    top, bottom = max(0, min(y1 - outer, height - line_width)), min(height, max(y2 + inner, line_width))
    _fill(canvas, left, top, right, top + line_width, color)
    _fill(canvas, left, bottom - line_width, right, bottom, color)
    _fill(canvas, left, top, left + line_width, bottom, color)
    _fill(canvas, right - line_width, top, right, bottom, color)


def _fill(canvas: npt.NDArray[np.uint8], left: int, top: int, right: int, bottom: int, color: Color) -> None:
    """Fill the columns left..right-1 of the rows top..bottom-1. OpenCV clips; NumPy's strided copy is slower."""
    cv2.rectangle(canvas, (left, top), (right - 1, bottom - 1), color, cv2.FILLED)


def _fitted_text(name: str, confidence: str, style: _Style, width: int) -> str:
    """The longest label text that fits into the picture's width; empty if none does."""

    def label(length: int) -> str:
        shown = name if length == len(name) else name[:length] + _ELLIPSIS
        return f"{shown} {confidence}" if confidence else shown

    if style.text_width(label(len(name))) <= width:
        return label(len(name))
    low, high = 0, len(name) - 1  # a label of `low` letters fits, or is none at all
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if style.text_width(label(middle)) <= width else (low, middle - 1)
    if low:
        return label(low)
    return confidence if confidence and style.text_width(confidence) <= width else ""


def _label_place(
    index: int,
    boxes: npt.NDArray[np.int64],
    labels: Sequence[_Label],
    label_width: int,
    style: _Style,
    size: tuple[int, int],
) -> tuple[int, int]:
    """Left and top of the label of box `index`, inside the picture: the first place where it hides little."""
    places = _label_places(boxes[index], label_width, style, size)  # (places, 2)
    if len(boxes) == 1:
        return int(places[0, 0]), int(places[0, 1])
    rectangles = np.concatenate([places, places + np.array((label_width, style.label_height))], 1)
    others = np.delete(boxes, index, axis=0)
    hidden = _hidden_shares(rectangles, others)
    if labels:
        taken = np.array([(a.left, a.top, a.left + a.width, a.top + style.label_height) for a in labels])
        hidden += _LABEL_WEIGHT * _hidden_shares(rectangles, taken)
    good = np.flatnonzero(hidden <= _HARMLESS_SHARE)
    left, top = places[good[0] if good.size else hidden.argmin()]
    return int(left), int(top)


def _label_places(
    box: npt.NDArray[np.int64], label_width: int, style: _Style, size: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Left and top of every place for a label, the usual ones first: above, below, beside; inside comes last."""
    height, width = size
    outer = style.line_width // 2
    x1, y1, x2, y2 = (int(v) for v in (box[0] - outer, box[1] - outer, box[2] + outer + 1, box[3] + outer + 1))
    above, below = y1 - style.label_height, y2
    left, right = max(0, min(x1, width - label_width)), max(0, min(x2 - label_width, width - label_width))
    inside = max(0, min(max(0, y1), height - style.label_height))
    places = [(left, above), (right, above)] if above >= 0 else [(left, inside)]
    if below + style.label_height <= height:
        places += [(left, below), (right, below)]
    places += [(x, inside) for x in (x2, x1 - label_width) if 0 <= x <= width - label_width]
    return np.array([*places, (left, inside)])


def _hidden_shares(rectangles: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """For each rectangle (n, 4) the sum over `others` (m, 4) of the share of each that it covers."""
    low = np.maximum(rectangles[:, None, :2], others[None, :, :2])
    high = np.minimum(rectangles[:, None, 2:], others[None, :, 2:])
    covered = np.maximum(high - low, 0).prod(2)  # (n, m)
    areas = np.maximum(others[:, 2:] - others[:, :2], 1).prod(1)
    shares: npt.NDArray[np.float64] = (covered / areas).sum(1)
    return shares


def _draw_label(canvas: npt.NDArray[np.uint8], label: _Label, style: _Style) -> None:
    """Fill the label's rectangle and write its text."""
    _fill(canvas, label.left, label.top, label.left + label.width, label.top + style.label_height, label.color)
    origin = (label.left + style.padding, label.top + style.ascent)
    color = text_color(label.color)
    cv2.putText(canvas, label.text, origin, _FONT, style.font_scale, color, style.thickness, cv2.LINE_AA)
