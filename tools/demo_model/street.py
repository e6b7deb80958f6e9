"""Procedural streets: a ground with a road, and upright objects beside it, drawn far to near.

World coordinates are metres: x right of the road's middle, y up from the ground, z ahead. All randomness comes from the
`random.Random` that the caller gives, so that a seed gives the same street on every machine with the same OpenCV.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]
Image = npt.NDArray[np.uint8]

EYE_HEIGHT = 1.4
ROAD_HALF_WIDTH = 3.6
FAR = 160.0
NOISE_SIDE = 1024


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along z.

    Attributes:
        width: Picture width in pixels.
        height: Picture height in pixels.
        focal: Focal length in pixels.
        horizon: The horizon's row.
        centre: The vanishing point's column.
        z: The camera's own position on the road, in metres.
        x: The camera's distance right of the road's middle, in metres.
    """

    width: int
    height: int
    focal: float
    horizon: float
    centre: float
    z: float = 0.0
    x: float = 0.0

    def project(self, x: float, y: float, z: float) -> tuple[int, int]:
        """The pixel of a world point ahead of the camera."""
        scale = self.focal / max(z - self.z, 0.3)
        column, row = self.centre + scale * (x - self.x), self.horizon + scale * (EYE_HEIGHT - y)
        return int(min(max(column, -9e3), 9e3)), int(min(max(row, -9e3), 9e3))


@dataclass(frozen=True)
class Thing:
    """An upright object: what draws it, where it stands and the seed of its looks."""

    draw: Callable[[Image, Camera, Thing], None]
    x: float
    z: float
    seed: int


@dataclass(frozen=True)
class Street:
    """All that a street's picture depends on besides the camera."""

    things: tuple[Thing, ...]
    sky: tuple[Colour, Colour]
    ground: Colour
    road: Colour
    pavement: Colour | None
    clouds: tuple[int, int, float]
    marking: str
    hills: tuple[tuple[float, float, Colour], ...] = ()
    grain: float = 0.16


@functools.cache
def noise(kind: int) -> Image:
    """A tileable-enough grey texture (1024, 1024), mean 128: 0 fine grain, 1 blotches, 2 clouds."""
    generator = np.random.RandomState(77 + kind)
    total = np.zeros((NOISE_SIDE, NOISE_SIDE), np.float32)
    for cells, weight in {0: ((1024, 1.0), (300, 0.6)), 1: ((12, 1.0), (60, 0.6), (250, 0.4)),
                          2: ((5, 1.0), (14, 0.6), (40, 0.35), (120, 0.2))}[kind]:  # fmt: skip
        grid = generator.randn(cells, cells).astype(np.float32)
        total += weight * cv2.resize(grid, (NOISE_SIDE, NOISE_SIDE), interpolation=cv2.INTER_CUBIC)
    total = (total - total.mean()) / total.std()
    return np.clip(128 + 42 * total, 0, 255).astype(np.uint8)


def noise_crop(kind: int, width: int, height: int, left: int, top: int) -> Image:
    """A piece of `noise`, enlarged where the picture is larger than the texture."""
    texture = noise(kind)
    if width > NOISE_SIDE // 2 or height > NOISE_SIDE // 2:
        texture = texture[top % 256 :, left % 256 :][: NOISE_SIDE * 3 // 4, : NOISE_SIDE * 3 // 4]
        return cv2.resize(texture, (width, height), interpolation=cv2.INTER_LINEAR)
    top, left = top % (NOISE_SIDE - height), left % (NOISE_SIDE - width)
    return texture[top : top + height, left : left + width]


def shade(colour: Colour, factor: float) -> Colour:
    """A darker (below 1) or lighter colour."""
    return tuple(int(min(255, max(0, channel * factor))) for channel in colour)  # type: ignore[return-value]


def pick_colour(rng: random.Random, low: int = 30, high: int = 230) -> Colour:
    """A random colour."""
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def muted_colour(rng: random.Random) -> Colour:
    """A house's colour: a grey with a light tint."""
    base = rng.randint(70, 205)
    return (base + rng.randint(-35, 10), base + rng.randint(-20, 12), min(255, base + rng.randint(-10, 38)))


def make_street(rng: random.Random, near: float = 5.0, far: float = FAR) -> Street:
    """A street in a town, in a suburb or in the country."""
    kind = rng.choice(("town", "town", "suburb", "country"))
    things: list[Thing] = []
    for side in (-1, 1):
        things += _row_of_buildings(rng, side, kind, near, far)
        things += _row_of_small_things(rng, side, kind, near, far)
    things += _traffic(rng, far)
    top = rng.choice(((225, 170, 110), (235, 200, 160), (205, 200, 195), (180, 175, 170), (240, 160, 90)))
    bottom = rng.choice(((240, 225, 205), (225, 225, 228), (215, 225, 240)))
    green, road = rng.randint(75, 135), rng.randint(62, 125)
    hills = tuple(
        (rng.uniform(0.0, 6.28), rng.uniform(0.02, 0.09), shade((110, 125, 95), rng.uniform(0.6, 1.3)))
        for _ in range(rng.randint(0, 2))
    )
    return Street(
        tuple(sorted(things, key=lambda thing: -thing.z)),
        (top, bottom),
        (rng.randint(35, 70), green, rng.randint(60, 110)),
        (road + rng.randint(-4, 6), road, road + rng.randint(-6, 4)),
        None if kind == "country" else shade((150, 152, 155), rng.uniform(0.7, 1.2)),
        (rng.randint(0, 999), rng.randint(0, 999), rng.choice((0.0, 0.5, 0.9, 0.9))),
        rng.choice(("dashed", "dashed", "solid", "none")),
        hills,
    )


def _row_of_buildings(rng: random.Random, side: int, kind: str, near: float, far: float) -> list[Thing]:
    step = {"town": (9, 16), "suburb": (14, 34), "country": (45, 120)}[kind]
    things, z = [], near + rng.uniform(-3, 10)
    while z < far:
        x = side * (ROAD_HALF_WIDTH + rng.uniform(3.2, 6.5) + (0 if kind == "town" else rng.uniform(2, 9)))
        things.append(Thing(draw_building, x, z, rng.getrandbits(30)))
        z += rng.uniform(*step)
    return things


def _row_of_small_things(rng: random.Random, side: int, kind: str, near: float, far: float) -> list[Thing]:
    makers = {
        "town": (
            draw_tree,
            draw_lamp_post,
            draw_traffic_light,
            draw_parked_car,
            draw_billboard,
            draw_person,
            draw_person,
        ),
        "suburb": (draw_tree, draw_tree, draw_bush, draw_lamp_post, draw_parked_car, draw_billboard, draw_person),
        "country": (draw_tree, draw_tree, draw_conifer, draw_conifer, draw_bush, draw_billboard),
    }[kind]
    things, z = [], near + rng.uniform(0, 6)
    while z < far:
        offset = rng.uniform(1.2, 2.8) if kind == "town" else rng.uniform(1.5, 9.0)
        things.append(Thing(rng.choice(makers), side * (ROAD_HALF_WIDTH + offset), z, rng.getrandbits(30)))
        z += rng.uniform(2.5, 11.0)
    return things


def _traffic(rng: random.Random, far: float) -> list[Thing]:
    lanes = (-ROAD_HALF_WIDTH / 2, ROAD_HALF_WIDTH / 2)
    return [
        Thing(draw_car, rng.choice(lanes), rng.uniform(9, min(far, 70)), rng.getrandbits(30))
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))
    ]


def draw_street(image: Image, street: Street, camera: Camera) -> None:
    """Draw everything, in place."""
    _draw_sky(image, street, camera)
    _draw_ground(image, street, camera)
    for thing in street.things:
        if 2.0 < thing.z - camera.z < FAR:
            thing.draw(image, camera, thing)


def _draw_sky(image: Image, street: Street, camera: Camera) -> None:
    rows = max(1, min(camera.height, int(camera.horizon) + 1))
    blend = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    top, bottom = np.float32(street.sky[0]), np.float32(street.sky[1])
    column = top * (1 - blend) + bottom * blend  # (rows, 1, 3)
    left, upper, strength = street.clouds
    small = (max(2, camera.width // 4), max(2, rows // 4))
    cover = noise_crop(2, small[0], small[1], left, upper).astype(np.float32)
    cover = np.clip((cover - 120) / 90, 0, 1)[..., None] * strength
    shrunk = cv2.resize(column, (1, small[1]), interpolation=cv2.INTER_AREA)[:, None, :].reshape(small[1], 1, 3)
    sky = shrunk * (1 - cover) + 246 * cover
    image[:rows] = cv2.resize(sky.astype(np.uint8), (camera.width, rows), interpolation=cv2.INTER_LINEAR)
    columns = np.arange(0, camera.width + 8, 8)
    for phase, height, colour in street.hills:
        wave = np.sin(columns / camera.width * 5 + phase) + 0.4 * np.sin(columns / camera.width * 17 + 3 * phase)
        edge = camera.horizon - camera.height * height * (1.2 + wave) / 2
        points = np.stack([columns, edge], 1).tolist()
        points += [[camera.width + 8, camera.horizon + 2], [0, camera.horizon + 2]]
        cv2.fillPoly(image, [np.array(points, np.int32)], colour)


def _draw_ground(image: Image, street: Street, camera: Camera) -> None:
    first = max(0, min(camera.height, int(camera.horizon)))
    image[first:] = street.ground
    near, far = camera.z + 0.8, camera.z + 4 * FAR
    if street.pavement is not None:
        _strip(image, camera, (-ROAD_HALF_WIDTH - 3, ROAD_HALF_WIDTH + 3), (near, far), street.pavement)
        _strip(
            image, camera, (-ROAD_HALF_WIDTH - 0.2, ROAD_HALF_WIDTH + 0.2), (near, far), shade(street.pavement, 0.75)
        )
    _strip(image, camera, (-ROAD_HALF_WIDTH, ROAD_HALF_WIDTH), (near, far), street.road)
    paint = (205, 208, 208)
    if street.marking == "solid":
        _strip(image, camera, (-0.07, 0.07), (near, far), paint)
    elif street.marking == "dashed":
        start = camera.z - camera.z % 6.0
        for dash in range(22):
            _strip(image, camera, (-0.08, 0.08), (start + 6.0 * dash, start + 6.0 * dash + 3.0), paint)
    for x in (-ROAD_HALF_WIDTH + 0.25, ROAD_HALF_WIDTH - 0.35):
        _strip(image, camera, (x, x + 0.1), (near, far), paint)
    grain = noise_crop(0, camera.width, camera.height - first, int(street.clouds[0] + 40 * camera.z), street.clouds[1])
    if len(grain) and street.grain:
        grain = cv2.cvtColor(cv2.convertScaleAbs(grain, alpha=street.grain), cv2.COLOR_GRAY2BGR)
        image[first:] = cv2.subtract(
            cv2.add(image[first:], grain), np.full_like(image[first:], int(128 * street.grain))
        )


def _strip(image: Image, camera: Camera, xs: tuple[float, float], zs: tuple[float, float], colour: Colour) -> None:
    near, far = max(zs[0], camera.z + 0.8), zs[1]
    if far <= near:
        return
    corners = [camera.project(xs[0], 0, far), camera.project(xs[1], 0, far),
               camera.project(xs[1], 0, near), camera.project(xs[0], 0, near)]  # fmt: skip
    cv2.fillPoly(image, [np.array(corners, np.int32)], colour, cv2.LINE_AA)


def _box(
    image: Image, camera: Camera, thing: Thing, xs: tuple[float, float], ys: tuple[float, float], colour: Colour
) -> None:
    """A rectangle that faces the camera; xs are relative to the thing."""
    a = camera.project(thing.x + xs[0], ys[1], thing.z)
    b = camera.project(thing.x + xs[1], ys[0], thing.z)
    cv2.rectangle(image, a, b, colour, -1)


def draw_building(image: Image, camera: Camera, thing: Thing) -> None:
    """A house: the wall along the road, the wall that faces the camera, windows, perhaps a pitched roof."""
    rng = random.Random(thing.seed)
    wall, glass = muted_colour(rng), shade((150, 120, 90), rng.uniform(0.4, 1.3))
    floors, depth, width = rng.randint(1, 6), rng.uniform(8, 14), rng.uniform(8, 16)
    height, side = floors * 3.1 + 0.8, 1 if thing.x > 0 else -1
    if rng.random() < 0.15:
        glass = (140, 215, 250)
    back = thing.z + depth
    corners = [camera.project(thing.x, 0, back), camera.project(thing.x, height, back),
               camera.project(thing.x, height, thing.z), camera.project(thing.x, 0, thing.z)]  # fmt: skip
    cv2.fillPoly(image, [np.array(corners, np.int32)], shade(wall, 0.72), cv2.LINE_AA)
    front = (0.0, width) if side > 0 else (-width, 0.0)
    _box(image, camera, thing, front, (0, height), wall)
    if floors < 3:
        gable = [(front[0] - 0.4, height), (front[1] + 0.4, height), ((front[0] + front[1]) / 2, height + width * 0.3)]
        points = [camera.project(thing.x + x, y, thing.z) for x, y in gable]
        cv2.fillPoly(image, [np.array(points, np.int32)], shade((70, 80, 150), rng.uniform(0.5, 1.1)), cv2.LINE_AA)
    _windows(image, camera, thing, (front, depth, floors), glass)


def _windows(
    image: Image, camera: Camera, thing: Thing, shape: tuple[tuple[float, float], float, int], glass: Colour
) -> None:
    front, depth, floors = shape
    if camera.focal / (thing.z - camera.z) < 3:  # windows below three pixels
        return
    for floor in range(floors):
        low, high = floor * 3.1 + 1.1, floor * 3.1 + 2.6
        for x in np.arange(front[0] + 1.0, front[1] - 1.2, 2.6).tolist():
            _box(image, camera, thing, (x, x + 1.2), (low, high), glass)
        for z in np.arange(thing.z + 1.0, thing.z + depth - 1.2, 2.6).tolist():
            corners = [camera.project(thing.x, low, z), camera.project(thing.x, high, z),
                       camera.project(thing.x, high, z + 1.2), camera.project(thing.x, low, z + 1.2)]  # fmt: skip
            cv2.fillConvexPoly(image, np.array(corners, np.int32), shade(glass, 0.75))


def _blobs(image: Image, camera: Camera, thing: Thing, crown: tuple[float, float, float], colour: Colour) -> None:
    """A crown of leaves: (height of its middle, half width, half height) filled with discs, dark below, light above."""
    rng = random.Random(thing.seed ^ 0x5EED)
    scale = camera.focal / (thing.z - camera.z)
    middle, half_width, half_height = crown
    for index in range(34 if scale * half_width > 12 else 9):
        angle, distance = rng.uniform(0, 6.283), math.sqrt(rng.random())
        x, y = math.cos(angle) * distance * half_width, math.sin(angle) * distance * half_height
        centre = camera.project(thing.x + x, middle + y, thing.z)
        radius = max(1, int(scale * half_width * rng.uniform(0.16, 0.34)))
        light = (0.75 + 0.35 * y / half_height) * rng.uniform(0.8, 1.15) * (0.7 if index < 8 else 1.0)
        cv2.circle(image, centre, radius, shade(colour, light), -1)


def _leaf_colour(rng: random.Random) -> Colour:
    return rng.choice(((40, 105, 60), (35, 85, 45), (45, 125, 95), (40, 95, 130), (30, 70, 50)))


def draw_tree(image: Image, camera: Camera, thing: Thing) -> None:
    """A tree with a round crown."""
    rng = random.Random(thing.seed)
    trunk, half = rng.uniform(1.8, 3.2), rng.uniform(1.3, 2.6)
    _box(image, camera, thing, (-0.15, 0.15), (0, trunk + 0.6), (45, 60, 80))
    _blobs(image, camera, thing, (trunk + half * 0.9, half, half * rng.uniform(0.9, 1.3)), _leaf_colour(rng))


def draw_bush(image: Image, camera: Camera, thing: Thing) -> None:
    """A bush or a piece of hedge."""
    rng = random.Random(thing.seed)
    _blobs(image, camera, thing, (0.6, rng.uniform(0.8, 2.2), rng.uniform(0.5, 0.8)), _leaf_colour(rng))


def draw_conifer(image: Image, camera: Camera, thing: Thing) -> None:
    """A fir: stacked triangles."""
    rng = random.Random(thing.seed)
    height, half, colour = rng.uniform(5, 10), rng.uniform(1.1, 2.0), shade((50, 80, 40), rng.uniform(0.6, 1.1))
    _box(image, camera, thing, (-0.15, 0.15), (0, 1), (40, 55, 75))
    for layer in range(4):
        base, wide = 0.6 + height * 0.21 * layer, half * (1 - 0.2 * layer)
        shape = [(-wide, base), (wide, base), (0, base + height * 0.38)]
        points = [camera.project(thing.x + x, y, thing.z) for x, y in shape]
        cv2.fillPoly(image, [np.array(points, np.int32)], shade(colour, 0.8 + 0.12 * layer), cv2.LINE_AA)


def draw_lamp_post(image: Image, camera: Camera, thing: Thing) -> None:
    """A street lamp whose arm reaches over the road."""
    reach = -1.6 if thing.x > 0 else 1.6
    thickness = max(1, int(camera.focal / (thing.z - camera.z) * 0.12))
    base, top = camera.project(thing.x, 0, thing.z), camera.project(thing.x, 6.5, thing.z)
    head = camera.project(thing.x + reach, 6.8, thing.z)
    cv2.line(image, base, top, (95, 98, 100), thickness, cv2.LINE_AA)
    cv2.line(image, top, head, (95, 98, 100), thickness, cv2.LINE_AA)
    cv2.circle(image, head, max(1, thickness), (225, 245, 255), -1, cv2.LINE_AA)


def draw_traffic_light(image: Image, camera: Camera, thing: Thing) -> None:
    """A traffic light with one lamp lit: a round coloured lamp that is no sign."""
    rng, scale = random.Random(thing.seed), camera.focal / (thing.z - camera.z)
    _box(image, camera, thing, (-0.05, 0.05), (0, 2.4), (70, 72, 74))
    _box(image, camera, thing, (-0.18, 0.18), (2.3, 3.4), (30, 30, 30))
    lit = rng.randrange(3)
    for index, colour in enumerate(((30, 30, 235), (20, 190, 250), (110, 210, 40))):
        centre = camera.project(thing.x, 3.22 - 0.36 * index, thing.z)
        cv2.circle(
            image, centre, max(1, int(0.14 * scale)), shade(colour, 1.0 if index == lit else 0.22), -1, cv2.LINE_AA
        )


def draw_person(image: Image, camera: Camera, thing: Thing) -> None:
    """A walker."""
    rng, scale = random.Random(thing.seed), camera.focal / (thing.z - camera.z)
    shirt, trousers = pick_colour(rng), pick_colour(rng, 20, 120)
    for x in (-0.12, 0.12):
        foot, hip = camera.project(thing.x + 1.6 * x, 0, thing.z), camera.project(thing.x + 0.5 * x, 0.85, thing.z)
        cv2.line(image, foot, hip, trousers, max(1, int(0.16 * scale)), cv2.LINE_AA)
    _box(image, camera, thing, (-0.22, 0.22), (0.8, 1.45), shirt)
    cv2.circle(
        image, camera.project(thing.x, 1.62, thing.z), max(1, int(0.13 * scale)), (130, 160, 205), -1, cv2.LINE_AA
    )


def draw_parked_car(image: Image, camera: Camera, thing: Thing) -> None:
    """A car at the kerb."""
    kerb = ROAD_HALF_WIDTH - 0.4 if thing.x > 0 else -ROAD_HALF_WIDTH + 0.4
    draw_car(image, camera, Thing(draw_car, kerb, thing.z, thing.seed))


def draw_car(image: Image, camera: Camera, thing: Thing) -> None:
    """A car from behind, with red lamps and a plate."""
    rng, scale = random.Random(thing.seed), camera.focal / (thing.z - camera.z)
    paint = rng.choice((pick_colour(rng), (200, 200, 200), (40, 40, 40), (40, 30, 160), (150, 70, 30), (235, 235, 235)))
    height = rng.choice((1.45, 1.5, 1.8, 2.6))
    for x in (-0.7, 0.55):
        _box(image, camera, thing, (x, x + 0.2), (0, 0.4), (20, 20, 20))
    _box(image, camera, thing, (-0.9, 0.9), (0.25, 0.95), paint)
    roof = [(-0.86, 0.94), (0.86, 0.94), (0.68, height), (-0.68, height)]
    points = [camera.project(thing.x + x, y, thing.z) for x, y in roof]
    cv2.fillPoly(image, [np.array(points, np.int32)], shade(paint, 0.9), cv2.LINE_AA)
    pane = [(-0.72, 1.0), (0.72, 1.0), (0.6, height - 0.1), (-0.6, height - 0.1)]
    points = [camera.project(thing.x + x, y, thing.z) for x, y in pane]
    cv2.fillPoly(image, [np.array(points, np.int32)], (70, 62, 55), cv2.LINE_AA)
    lamp = (40, 40, rng.randint(140, 250))
    for x in (-0.76, 0.76):
        if rng.random() < 0.5:
            cv2.circle(
                image, camera.project(thing.x + x, 0.78, thing.z), max(1, int(0.13 * scale)), lamp, -1, cv2.LINE_AA
            )
        else:
            _box(image, camera, thing, (x - 0.13, x + 0.13), (0.66, 0.88), lamp)
    _box(image, camera, thing, (-0.26, 0.26), (0.42, 0.54), (235, 235, 235))
    left, top = camera.project(thing.x - 0.22, 0.52, thing.z)
    write_text(image, _random_text(rng, 6), (left, top), 0.09 * scale, (30, 30, 30))


_LETTERS = {
    "A": "062046 1434", "E": "40000646 0333", "F": "400006 0333", "H": "0006 4046 0343", "K": "0006 400346",
    "L": "000646", "M": "0600234046", "N": "06004640", "T": "0040 2026", "V": "002640", "W": "0016233640",
    "X": "0046 4006", "Y": "002340 2326", "Z": "00400646", "U": "00064640", "I": "2026", "O": "0040460600",
    "1": "102026", "2": "0040430306 0646", "4": "30034344 3036", "7": "004026", "8": "0040460600 0343",
    "9": "464000034333",
}  # fmt: skip
"""Plain letters as strokes on a grid of 4 x 6: pairs of digits are points, a blank lifts the pen."""


def _random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(tuple(_LETTERS), k=length))


def write_text(image: Image, text: str, origin: tuple[int, int], height: float, colour: Colour) -> None:
    """Write capitals of the given height in pixels, right of and below `origin`."""
    if height < 3:
        return
    unit, thickness = height / 6, max(1, round(height / 7))
    for index, letter in enumerate(text):
        left = origin[0] + index * 5.6 * unit
        for stroke in _LETTERS[letter].split():
            pairs = [
                (left + int(stroke[i]) * unit, origin[1] + int(stroke[i + 1]) * unit) for i in range(0, len(stroke), 2)
            ]
            points = np.rint(np.array(pairs) * 16).astype(np.int32)
            cv2.polylines(image, [points], False, colour, thickness, cv2.LINE_AA, 4)


def draw_billboard(image: Image, camera: Camera, thing: Thing) -> None:
    """An advert or a board with names and arrows: colourful, and no sign."""
    rng, scale = random.Random(thing.seed), camera.focal / (thing.z - camera.z)
    width, height, base = rng.uniform(1.2, 3.8), rng.uniform(0.8, 2.2), rng.uniform(0.6, 2.6)
    for x in (-width * 0.35, width * 0.35):
        _box(image, camera, thing, (x - 0.05, x + 0.05), (0, base), (80, 82, 84))
    left, top = camera.project(thing.x - width / 2, base + height, thing.z)
    draw_advert(image, rng, (left, top, int(width * scale), int(height * scale)))


def draw_advert(image: Image, rng: random.Random, box: tuple[int, int, int, int]) -> None:
    """Fill `box` = (left, top, width, height) with a board: a ground colour, discs, bars, words."""
    left, top, width, height = box
    ground = rng.choice(
        (pick_colour(rng), (160, 80, 20), (60, 120, 20), (235, 235, 235), (40, 30, 190), (30, 190, 245))
    )
    cv2.rectangle(image, (left, top), (left + width, top + height), ground, -1)
    ink = (245, 245, 245) if sum(ground) < 380 else (30, 30, 30)
    if rng.random() < 0.6:
        cv2.rectangle(image, (left, top), (left + width, top + height), ink, max(1, height // 24))
    for _ in range(rng.randint(0, 3)):
        x, y = left + int(width * rng.uniform(0.2, 0.8)), top + int(height * rng.uniform(0.25, 0.75))
        radius = max(1, int(min(width, height) * rng.uniform(0.08, 0.24)))
        _advert_shape(image, rng, (x, y, radius))
    for line in range(rng.randint(0, 3)):
        text = _random_text(rng, rng.randint(2, 7))
        size = min(height * 0.2, width / len(text))
        write_text(image, text, (left + width // 12, int(top + height * (0.12 + 0.28 * line))), size, ink)


def _advert_shape(image: Image, rng: random.Random, place: tuple[int, int, int]) -> None:
    x, y, radius = place
    colour, kind = pick_colour(rng), rng.randrange(4)
    if kind == 0:
        cv2.circle(image, (x, y), radius, colour, -1, cv2.LINE_AA)
    elif kind == 1:
        cv2.circle(image, (x, y), radius, colour, max(1, radius // 3), cv2.LINE_AA)
    elif kind == 2:
        cv2.rectangle(image, (x - radius, y - radius // 2), (x + radius, y + radius // 2), colour, -1)
    else:
        points = np.array([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], np.int32)
        cv2.fillPoly(image, [points], colour, cv2.LINE_AA)


def draw_wall(image: Image, rng: random.Random) -> None:
    """Fill the picture with a wall from near, with posters: no street at all."""
    height, width = image.shape[:2]
    colour, rows = muted_colour(rng), rng.randint(8, 26)
    image[:] = colour
    if rng.random() < 0.6:
        step, joint = height / rows, shade(colour, rng.uniform(0.7, 1.2))
        for row in range(rows + 1):
            y = int(row * step)
            cv2.line(image, (0, y), (width, y), joint, max(1, int(step / 12)))
            for column in range(int(width / (2.2 * step)) + 2):
                x = int((column + 0.5 * (row % 2)) * 2.2 * step)
                cv2.line(image, (x, y), (x, int(y + step)), joint, max(1, int(step / 12)))
    for _ in range(rng.randint(0, 4)):
        size = (int(width * rng.uniform(0.08, 0.3)), int(height * rng.uniform(0.08, 0.3)))
        draw_advert(image, rng, (rng.randrange(width), rng.randrange(height), *size))
    _texture(image, rng, 1, rng.uniform(0.1, 0.3))


def draw_foliage(image: Image, rng: random.Random) -> None:
    """Fill the picture with leaves."""
    height, width = image.shape[:2]
    base = _leaf_colour(rng)
    image[:] = shade(base, 0.6)
    size = min(height, width)
    for _ in range(rng.randint(250, 500)):
        centre = (rng.randrange(width), rng.randrange(height))
        axes = (int(size * rng.uniform(0.01, 0.05)) + 1, int(size * rng.uniform(0.005, 0.025)) + 1)
        cv2.ellipse(image, centre, axes, rng.uniform(0, 180), 0, 360, shade(base, rng.uniform(0.5, 1.6)), -1)
    _texture(image, rng, 1, rng.uniform(0.1, 0.3))


def draw_clutter(image: Image, rng: random.Random) -> None:
    """Fill the picture with shapes in all colours: a shop window, a fair."""
    height, width = image.shape[:2]
    image[:] = pick_colour(rng, 60, 200)
    for _ in range(rng.randint(20, 60)):
        place = (rng.randrange(width), rng.randrange(height), int(min(height, width) * rng.uniform(0.01, 0.14)) + 1)
        _advert_shape(image, rng, place)
    _texture(image, rng, 2, rng.uniform(0.1, 0.4))


def _texture(image: Image, rng: random.Random, kind: int, strength: float) -> None:
    crop = noise_crop(kind, image.shape[1], image.shape[0], rng.randrange(1000), rng.randrange(1000))
    grey = cv2.cvtColor(crop, cv2.COLOR_GRAY2BGR)
    cv2.addWeighted(image, 1.0, grey, strength, -128 * strength, image)
