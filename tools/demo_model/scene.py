"""Road-sign pictures with exact boxes.

A picture depends on its seed and size alone: the same seed gives the same bytes with the same OpenCV. A sign is placed
no smaller than a person could still read it: the lower limit of 12 px rises for fine print, blur, noise, coarse JPEG.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from signs import (
    CLASS_NAMES,
    DISTRACTOR_COUNT,
    LEVELS,
    MARGIN,
    TOP_LEVEL,
    Face,
    Points,
    class_face,
    distractor_face,
)
from street import (
    EYE_HEIGHT,
    Camera,
    Colour,
    Image,
    draw_advert,
    draw_clutter,
    draw_foliage,
    draw_street,
    draw_wall,
    make_street,
    muted_colour,
    noise_crop,
    shade,
)

Matrix = npt.NDArray[np.float64]
Box = tuple[float, float, float, float]
Scene = tuple[Image, npt.NDArray[np.float32], npt.NDArray[np.int32]]

SMALLEST, LARGEST = 12.0, 300.0
"""Longer side of a sign's box in pixels."""
FINE_PRINT_SMALLEST = 18.0
"""Below this, numbers and the two cars cannot be told apart by eye."""
FINE_PRINT = frozenset(CLASS_NAMES.index(name) for name in CLASS_NAMES if "limit" in name or "overtaking" in name)
DISTRACTOR_SMALLEST = 20.0
MAX_SIGNS = 8
MAX_OCCLUSION = 0.6
SIGN_METRES = 0.75
SIGN_HEIGHT_METRES = 2.4
SEED_STEP = 1_000_003
"""Distance between the seeds of two datasets' pictures; a dataset may have as many pictures."""


@dataclass(frozen=True)
class Conditions:
    """Light and camera of one picture.

    Attributes:
        gain: Light on the street, by channel (BGR).
        sign_gain: Light on signs; at night they throw back the headlights.
        night: Lamps glow.
        blur: Length of the motion blur in pixels; below 1.5 there is none.
        blur_angle: Direction of the blur in degrees.
        softness: Sigma of the lens blur in pixels.
        noise: Standard deviation of the sensor's noise in grey levels.
        haze: Share of grey that is mixed in.
        jpeg_quality: OpenCV's JPEG quality.
    """

    gain: tuple[float, float, float]
    sign_gain: float
    night: bool
    blur: float
    blur_angle: float
    softness: float
    noise: float
    haze: float
    jpeg_quality: int

    @property
    def smallest(self) -> float:
        """The smallest sign that a person can still read, in pixels."""
        coarse = 18.0 if self.jpeg_quality < 65 else SMALLEST
        return max(coarse, 7 * self.blur, 14 * self.softness, SMALLEST + 0.8 * self.noise + 20 * self.haze)


@dataclass(frozen=True)
class Placed:
    """A face in the picture: homography from the unit square to pixels, and the exact box of its outline."""

    face: Face
    homography: Matrix
    box: Box
    class_id: int


def pick_conditions(rng: random.Random) -> Conditions:
    """Day in six of ten pictures, dusk in two, night in two."""
    time = rng.choices(("day", "dusk", "night"), (6, 2, 2))[0]
    warm = rng.uniform(-0.08, 0.08)
    if time == "day":
        level = rng.uniform(0.75, 1.15)
        sign_gain = level * rng.uniform(0.75, 1.1)
    elif time == "dusk":
        level, warm = rng.uniform(0.35, 0.65), rng.uniform(-0.15, 0.25)
        sign_gain = rng.uniform(0.5, 0.9)
    else:
        level, warm = rng.uniform(0.1, 0.3), rng.uniform(-0.25, 0.1)
        sign_gain = rng.uniform(0.45, 1.05)
    return Conditions(
        gain=(level * (1 - warm), level, level * (1 + warm)),
        sign_gain=sign_gain,
        night=time == "night",
        blur=rng.uniform(2, 8) if rng.random() < 0.2 else 0.0,
        blur_angle=rng.gauss(0, 25),
        softness=rng.uniform(0.4, 1.5) if rng.random() < 0.3 else 0.0,
        noise=rng.uniform(3, 14) if time == "night" else rng.uniform(0, 8),
        haze=rng.uniform(0.05, 0.35) if rng.random() < 0.15 else 0.0,
        jpeg_quality=rng.randint(40, 97),
    )


def render_scene(seed: int, size: tuple[int, int], max_signs: int = MAX_SIGNS) -> Scene:
    """Render one picture.

    Args:
        seed: Decides everything.
        size: Width and height in pixels, each at least 64.
        max_signs: Most signs in the picture; 0 renders distractors only.

    Returns:
        The picture, uint8 (height, width, 3) BGR; the signs' boxes, float32 (N, 4) as left, top, right, bottom in
        pixels (pixel i covers i to i + 1), tight around the warped face whether or not something hides a part of it;
        and their class indices, int32 (N,).
    """
    rng = random.Random(seed)
    width, height = size
    conditions = pick_conditions(rng)
    image = np.empty((height, width, 3), np.uint8)
    horizon = _draw_background(image, rng)
    _light_background(image, rng, conditions, horizon)
    placed: list[Placed] = []
    for sign in _choose(rng, size, horizon, conditions, max_signs):
        _add(image, rng, sign, placed, (conditions, horizon))
    image = _photograph(image, rng, conditions)
    signs = [sign for sign in placed if sign.class_id >= 0]
    boxes = np.array([sign.box for sign in signs], np.float32).reshape(-1, 4)
    return image, boxes, np.array([sign.class_id for sign in signs], np.int32)


def _draw_background(image: Image, rng: random.Random) -> float:
    """Draw the surroundings in daylight and return the horizon's row."""
    height, width = image.shape[:2]
    horizon = height * rng.uniform(0.42, 0.72)
    kind = rng.random()
    if kind < 0.82:
        camera = Camera(width, height, width * rng.uniform(0.7, 1.3), horizon, width * rng.uniform(0.25, 0.75), 0.0,
                        rng.uniform(-2.5, 2.5))  # fmt: skip
        draw_street(image, make_street(rng), camera)
    else:
        rng.choice((draw_wall, draw_foliage, draw_clutter))(image, rng)
    return horizon


def _light_background(image: Image, rng: random.Random, conditions: Conditions, horizon: float) -> None:
    """Shadows, the time of the day and glowing lamps, in place."""
    height, width = image.shape[:2]
    light = np.ones((max(2, height // 16), max(2, width // 16)), np.float32)
    for _ in range(rng.randint(0, 3)):  # shadows of what is out of the picture
        x, y = rng.uniform(-0.3, 1.0) * light.shape[1], rng.uniform(horizon / height, 1) * light.shape[0] + 1
        across, down = rng.uniform(0.2, 0.8) * light.shape[1], rng.uniform(0.05, 0.3) * light.shape[0]
        lean = rng.uniform(-0.5, 0.5) * light.shape[1]
        corners = [(x, y), (x + across, y), (x + across + lean, y + down), (x + lean, y + down)]
        cv2.fillPoly(light, [np.array(corners, np.int32)], rng.uniform(0.4, 0.8))
    tilt = np.linspace(1 - rng.uniform(0, 0.25), 1, light.shape[1], dtype=np.float32)
    light = cv2.resize(light * (tilt if rng.random() < 0.5 else tilt[::-1]), (width, height))
    factors = cv2.merge([light * gain for gain in conditions.gain])
    cv2.multiply(image, factors, image, dtype=cv2.CV_8U)
    if conditions.night:
        for _ in range(rng.randint(1, 8)):
            colour = rng.choice(((120, 200, 255), (200, 230, 255), (40, 40, 255), (90, 255, 120), (255, 240, 230)))
            place = (rng.randrange(width), rng.randrange(height), height * rng.uniform(0.02, 0.12))
            _add_glow(image, place, colour)


@functools.cache
def _glow_sprite() -> npt.NDArray[np.float32]:
    axis = np.linspace(-1, 1, 64, dtype=np.float32)
    distance = np.hypot(axis[:, None], axis[None])
    return np.clip(np.exp(-9 * distance**2) * 0.55 + (distance < 0.12), 0, 1)


def _add_glow(image: Image, place: tuple[int, int, float], colour: Colour) -> None:
    """Add a lamp with its halo: (column, row, radius)."""
    x, y, radius = place[0], place[1], max(2, int(place[2]))
    top, left = max(0, y - radius), max(0, x - radius)
    sprite = cv2.resize(_glow_sprite(), (2 * radius, 2 * radius))
    sprite = sprite[top - y + radius :, left - x + radius :][: image.shape[0] - top, : image.shape[1] - left]
    region = image[top : top + sprite.shape[0], left : left + sprite.shape[1]]
    cv2.add(region, (sprite[..., None] * np.float32(colour)).astype(np.uint8), region)


def tilt(outline: Points, side: float, angles: tuple[float, float, float]) -> tuple[Matrix, tuple[float, float]]:
    """A homography that shows a face turned in space, its box's longer side being `side` pixels, its middle at (0, 0).

    Args:
        outline: The face's edge in the unit square.
        side: Longer side of the box in pixels.
        angles: Yaw, pitch and roll in radians.

    Returns:
        The homography, float64 (3, 3), and half the width and half the height of the box.
    """
    yaw, pitch, roll = angles
    turn_y = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    turn_x = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    turn_z = np.array([[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]])
    rotation = turn_y @ turn_x @ turn_z
    distance = 8.0  # from the camera, in units of half a sign: a stronger perspective than most streets give
    view = np.eye(3)
    view[:2, :2], view[2, :2] = rotation[:2, :2], rotation[2, :2] / distance
    low, high = _extent(outline, view)
    scale = side / float(max(high - low))
    shift = -(low + high) / 2 * scale
    half = (high - low) / 2 * scale
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]]) @ view, (float(half[0]), float(half[1]))


def _extent(points: Points, homography: Matrix) -> tuple[Points, Points]:
    """Least and greatest coordinates of the warped points."""
    warped = points @ homography[:2, :2].T + homography[:2, 2]
    warped = warped / (points @ homography[2, :2] + homography[2, 2])[:, None]
    return warped.min(axis=0), warped.max(axis=0)


def place(face: Face, class_id: int, side: float, centre: tuple[float, float], angles: Sequence[float]) -> Placed:
    """Turn and move a face; see `tilt`."""
    homography, (half_width, half_height) = tilt(face.outline, side, (angles[0], angles[1], angles[2]))
    x, y = centre
    moved = np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]]) @ homography
    return Placed(face, moved, (x - half_width, y - half_height, x + half_width, y + half_height), class_id)


def _choose(
    rng: random.Random, size: tuple[int, int], horizon: float, conditions: Conditions, max_signs: int
) -> list[Placed]:
    """Signs and distractors that do not hide each other, the small (far) ones first."""
    count = min(max_signs, rng.choices(range(MAX_SIGNS + 1), (8, 18, 20, 17, 13, 9, 7, 5, 3))[0])
    wanted = [rng.randrange(len(CLASS_NAMES)) for _ in range(count)]
    wanted += [-1] * rng.choices(range(5), (20, 30, 25, 15, 10))[0]
    chosen: list[Placed] = []
    for class_id in wanted:
        above = chosen[-1] if chosen and class_id >= 0 and rng.random() < 0.2 else None
        for _ in range(12):
            candidate = _candidate(rng, class_id, (size, horizon, conditions), above)
            above = None
            if candidate is not None and not any(_touch(candidate.box, other.box) for other in chosen):
                chosen.append(candidate)
                break
    return sorted(chosen, key=lambda sign: sign.box[3] - sign.box[1])


def _candidate(
    rng: random.Random, class_id: int, view: tuple[tuple[int, int], float, Conditions], above: Placed | None
) -> Placed | None:
    """One try at a sign; under `above`, on the same pole, if given. None if it does not fit."""
    (width, height), horizon, conditions = view
    face = class_face(class_id) if class_id >= 0 else distractor_face(rng.randrange(DISTRACTOR_COUNT))
    smallest = max(conditions.smallest, FINE_PRINT_SMALLEST if class_id in FINE_PRINT else SMALLEST)
    smallest = max(smallest, DISTRACTOR_SMALLEST) if class_id < 0 else smallest
    largest = min(LARGEST, 0.55 * min(width, height))
    if smallest >= largest:
        return None
    side = smallest * (largest / smallest) ** (rng.random() ** 1.25)
    yaw = rng.uniform(-0.9, 0.9) if rng.random() < 0.25 else rng.gauss(0, 0.25)
    angles = (max(-0.95, min(0.95, yaw)), rng.gauss(0, 0.08), rng.gauss(0, 0.05))
    x = rng.uniform(0, width)
    y = horizon + (EYE_HEIGHT - SIGN_HEIGHT_METRES * rng.uniform(0.9, 1.3)) * side / SIGN_METRES
    if rng.random() < 0.35 or not side < y < height - side:
        y = rng.uniform(0, height)
    if above is not None:
        side = min(largest, max(smallest, above.box[2] - above.box[0], above.box[3] - above.box[1]))
        x, y = (above.box[0] + above.box[2]) / 2, above.box[3] + side * 0.72
    candidate = place(face, class_id, side, (x, y), angles)
    left, top, right, bottom = candidate.box
    inside = left >= 1 and top >= 1 and right <= width - 1 and bottom <= height - 1
    return candidate if inside and min(right - left, bottom - top) >= 0.5 * smallest else None


def _touch(a: Box, b: Box) -> bool:
    """Whether two boxes come nearer than a tenth of the smaller one's size."""
    gap = 0.1 * min(a[2] - a[0], b[2] - b[0])
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def _add(image: Image, rng: random.Random, sign: Placed, placed: list[Placed], view: tuple[Conditions, float]) -> None:
    """Draw one sign with its pole and what belongs to it, and note it in `placed`."""
    conditions, horizon = view
    others = [other.box for other in placed]
    _draw_pole(image, rng, sign, others, (horizon, max(conditions.gain)))
    opacity, origin = draw_face(image, sign, _sign_light(rng, conditions))
    if rng.random() < 0.2:
        _hide_partly(image, rng, (opacity, origin), conditions)
    placed.append(sign)


def _draw_pole(image: Image, rng: random.Random, sign: Placed, others: list[Box], view: tuple[float, float]) -> None:
    """A pole down to the ground and perhaps a small plate, unless they would hide another sign."""
    horizon, light = view
    left, top, right, bottom = sign.box
    side, x = max(right - left, bottom - top), (left + right) / 2
    foot = max(bottom + 0.2 * side, horizon + EYE_HEIGHT * side / SIGN_METRES)
    half = max(0.6, 0.035 * side)
    if rng.random() > 0.85 or any(x - half < b[2] and x + half > b[0] and b[3] > top and b[1] < foot for b in others):
        return
    grey = shade(rng.choice(((150, 152, 150), (110, 112, 112), (60, 75, 95))), light * rng.uniform(0.7, 1.1))
    corners = np.array([(x - half, top + 0.1 * side), (x + half, top + 0.1 * side), (x + half, foot), (x - half, foot)])
    cv2.fillPoly(image, [np.rint(corners * 16).astype(np.int32)], grey, cv2.LINE_AA, 4)
    plate = (int(x - 0.4 * side), int(bottom + 0.06 * side), int(0.8 * side), int(0.32 * side))
    free = all(
        plate[0] > b[2] or plate[0] + plate[2] < b[0] or plate[1] > b[3] or plate[1] + plate[3] < b[1] for b in others
    )
    if rng.random() < 0.15 and free:
        draw_advert(image, rng, plate)


def _sign_light(rng: random.Random, conditions: Conditions) -> npt.NDArray[np.float32]:
    """Light over the unit square of a face, float32 (32, 32): a gradient, perhaps a shadow's edge or leaves' shadow."""
    level = conditions.sign_gain * rng.uniform(0.85, 1.12)
    axis = np.linspace(-1, 1, 32, dtype=np.float32)
    angle, slope = rng.uniform(0, 6.283), rng.uniform(0, 0.16)
    ramp = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    light = level * (1 + slope * ramp)
    kind = rng.random()
    if kind < 0.18 and not conditions.night:
        light = light * np.where(ramp > rng.uniform(-0.6, 0.6), rng.uniform(0.45, 0.75), 1).astype(np.float32)
    elif kind < 0.3 and not conditions.night:
        leaves = noise_crop(2, 160, 160, rng.randrange(800), rng.randrange(800))
        leaves = cv2.resize(leaves, (32, 32), interpolation=cv2.INTER_AREA) > 128
        light = light * np.where(leaves, rng.uniform(0.5, 0.8), 1).astype(np.float32)
    return np.clip(light, 0.2, 1.2)


def draw_face(
    image: Image, sign: Placed, light: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
    """Warp a face into the picture with antialiasing.

    Args:
        image: uint8 (height, width, 3) BGR, changed in place.
        sign: What to draw and where; its box must touch the picture.
        light: float32 (32, 32), the light over the face's canvas.

    Returns:
        The face's opacity in 0..1, float32 (rows, columns), and its origin's row and column in the picture.
    """
    height, width = image.shape[:2]
    left, top = max(0, math.floor(sign.box[0]) - 1), max(0, math.floor(sign.box[1]) - 1)
    right, bottom = min(width, math.ceil(sign.box[2]) + 1), min(height, math.ceil(sign.box[3]) + 1)
    side = max(sign.box[2] - sign.box[0], sign.box[3] - sign.box[1])
    samples = 4 if side < 40 else 2 if side < 130 else 1
    level = max(0, min(LEVELS - 1, int(math.log2(TOP_LEVEL / (MARGIN * side * samples))))) if side > 1 else LEVELS - 1
    pixels = TOP_LEVEL >> level
    step, shift = 2 * MARGIN / pixels, MARGIN * (1 / pixels - 1)
    to_unit = np.array([[step, 0, shift], [0, step, shift], [0, 0, 1.0]])
    to_region = np.array([[samples, 0, -samples * left - 0.5], [0, samples, -samples * top - 0.5], [0, 0, 1.0]])
    lit = sign.face.levels[level].copy()
    lamp = cv2.resize(light, (pixels, pixels))
    cv2.multiply(lit, cv2.merge([lamp, lamp, lamp, np.ones_like(lamp)]), lit, dtype=cv2.CV_8U)
    shape = ((right - left) * samples, (bottom - top) * samples)
    warped = cv2.warpPerspective(lit, to_region @ sign.homography @ to_unit, shape, flags=cv2.INTER_LINEAR)
    if samples > 1:
        warped = cv2.resize(warped, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    opacity = warped[..., 3].astype(np.float32) / 255
    region = image[top:bottom, left:right]
    region[:] = (region * (1 - opacity[..., None]) + warped[..., :3]).clip(0, 255).astype(np.uint8)
    return opacity, (top, left)


def _hide_partly(
    image: Image, rng: random.Random, drawn: tuple[npt.NDArray[np.float32], tuple[int, int]], conditions: Conditions
) -> None:
    """Draw leaves, a post or a sticker over a part of a face, unless too much of it would be hidden."""
    opacity, (top, left) = drawn
    rows, columns = opacity.shape
    cover, colours = _cover(rng, rows, columns)
    if float((cover * opacity).sum()) > (MAX_OCCLUSION - 0.1) * float(opacity.sum()):
        return
    region = image[top : top + rows, left : left + columns]
    light = max(conditions.gain) if not conditions.night else 0.35
    region[:] = (region * (1 - cover[..., None]) + colours * light * cover[..., None]).astype(np.uint8)


def _cover(rng: random.Random, rows: int, columns: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Opacity (rows, columns) and colour (rows, columns, 3) of something in front of a face."""
    mask, paint = np.zeros((rows, columns), np.uint8), np.zeros((rows, columns, 3), np.uint8)
    kind = rng.random()
    if kind < 0.6:
        green = rng.choice(((40, 105, 60), (35, 85, 45), (45, 125, 95), (40, 95, 130)))
        edge, depth = rng.uniform(0, 6.283), rng.uniform(0.75, 1.15)
        for _ in range(rng.randint(8, 24)):
            spread, reach = edge + rng.gauss(0, 0.5), depth * rng.uniform(0.7, 1.1) / 2
            centre = (int(columns * (0.5 + math.cos(spread) * reach)), int(rows * (0.5 + math.sin(spread) * reach)))
            axes = (max(1, int(columns * rng.uniform(0.05, 0.15))), max(1, int(rows * rng.uniform(0.03, 0.08))))
            for canvas, colour in ((mask, (255,)), (paint, shade(green, rng.uniform(0.6, 1.4)))):
                cv2.ellipse(canvas, centre, axes, math.degrees(spread), 0, 360, colour, -1, cv2.LINE_AA)
    elif kind < 0.8:
        start, wide = int(columns * rng.uniform(0, 0.85)), max(1, int(columns * rng.uniform(0.06, 0.2)))
        mask[:, start : start + wide] = 255
        paint[:] = shade((130, 132, 132), rng.uniform(0.4, 1.2))
    else:
        centre = (int(columns * rng.uniform(0.2, 0.8)), int(rows * rng.uniform(0.2, 0.8)))
        cv2.circle(mask, centre, max(1, int(columns * rng.uniform(0.06, 0.16))), (255,), -1, cv2.LINE_AA)
        paint[:] = muted_colour(rng)
    return mask.astype(np.float32) / 255, paint.astype(np.float32)


def _photograph(image: Image, rng: random.Random, conditions: Conditions) -> Image:
    """Haze, lens, motion, sensor and file format."""
    if conditions.haze:
        image = cv2.addWeighted(
            image, 1 - conditions.haze, np.full_like(image, 205), conditions.haze * max(conditions.gain), 0
        )
    if conditions.softness:
        image = cv2.GaussianBlur(image, (0, 0), conditions.softness)
    if conditions.blur >= 1.5:
        image = cv2.filter2D(image, -1, _motion_kernel(conditions.blur, conditions.blur_angle))
    if conditions.noise >= 0.5:
        image = _add_noise(image, rng, conditions.noise)
    _, coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, conditions.jpeg_quality])
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)


def _motion_kernel(length: float, angle: float) -> npt.NDArray[np.float32]:
    """A line through the middle of a small square, summing to 1."""
    side = 2 * math.ceil(length / 2) + 3
    kernel, half = np.zeros((side, side), np.uint8), length / 2
    dx, dy = half * math.cos(math.radians(angle)), half * math.sin(math.radians(angle))
    ends = np.rint(np.array([(side // 2 - dx, side // 2 - dy), (side // 2 + dx, side // 2 + dy)]) * 16).astype(np.int32)
    cv2.polylines(kernel, [ends], False, (255,), 1, cv2.LINE_AA, 4)
    return kernel.astype(np.float32) / float(kernel.sum())


@functools.cache
def _noise_bank() -> npt.NDArray[np.int16]:
    """Normal noise x 64, int16 (2048 x 2048): drawing it anew for every picture would cost a third of the time."""
    return np.rint(np.random.RandomState(5).randn(2048, 2048) * 64).astype(np.int16)


def _add_noise(image: Image, rng: random.Random, sigma: float) -> Image:
    """Independent noise on every channel; rows of the bank start at random places, so that no two pictures share it."""
    height, width = image.shape[:2]
    bank, needed = _noise_bank().reshape(-1), height * width * 3
    start = rng.randrange(bank.size)
    values = np.resize(np.roll(bank, -start) if needed > bank.size - start else bank[start:], needed)
    return cv2.add(image, values.reshape(height, width, 3) * np.float32(sigma / 64), dtype=cv2.CV_8U)
