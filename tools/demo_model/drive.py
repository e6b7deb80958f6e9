"""A video of a drive past signs of all classes."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from scene import SIGN_HEIGHT_METRES, draw_face, place
from signs import CLASS_NAMES, class_face
from street import EYE_HEIGHT, ROAD_HALF_WIDTH, Camera, Image, Street, Thing, draw_building, draw_street, make_street

from yolotrt.errors import OutputError

SIZE, FPS, SECONDS, SPEED = (1280, 720), 30, 10, 13.0
"""Width and height in pixels, frames a second, length in seconds, metres a second."""
BUILDING_DEPTH = 14.0
"""Metres that `draw_building` goes back at most."""
H264_OPTIONS = {
    "crf": "24",
    "preset": "slow",
    "x264-params": "colorprim=bt709:transfer=bt709:colormatrix=bt709",
}
"""x264's constant quality; the drawn surfaces are plain, so that coarse steps stay invisible."""


def render_drive(path: Path, seed: int, seconds: float = SECONDS) -> tuple[int, str]:
    """Write the video: H.264, which browsers play, where PyAV has x264, otherwise MPEG-4 part 2 by OpenCV.

    Returns:
        The number of frames and the codec's name.

    Raises:
        OutputError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    codec, write = ("H.264", _write_h264) if _has_x264() else ("MPEG-4 part 2", _write_mpeg4)
    try:
        count = write(temporary, frames(seed, seconds))
        temporary.replace(path)
    except (OSError, ValueError) as problem:  # PyAV's errors are of these classes
        raise OutputError(f"cannot write {path} ({problem}): choose a writable .mp4 path") from problem
    finally:
        temporary.unlink(missing_ok=True)
    return count, codec


def frames(seed: int, seconds: float = SECONDS) -> Iterator[Image]:
    """The pictures of the drive, uint8 (720, 1280, 3) BGR; the seed decides the street and the order of the signs."""
    rng = random.Random(seed)
    width, height = SIZE
    street = _with_signs(make_street(rng, 5.0, SPEED * SECONDS + 170), rng)
    for frame in range(int(seconds * FPS)):
        time = frame / FPS
        horizon = 0.56 * height + 3 * math.sin(5 * time)  # the car nods and sways
        camera = Camera(width, height, 1150, horizon, 0.5 * width, SPEED * time, 1.2 + 0.25 * math.sin(0.9 * time))
        image = np.empty((height, width, 3), np.uint8)
        draw_street(image, street, camera)
        image = cv2.convertScaleAbs(image, alpha=0.98 + 0.06 * math.sin(0.7 * time))
        yield cv2.GaussianBlur(image, (0, 0), 0.7)


def _has_x264() -> bool:
    try:
        import av
    except ImportError:
        return False
    return "libx264" in av.codecs_available


def _write_h264(path: Path, images: Iterable[Image]) -> int:
    """Write with PyAV; returns the number of frames."""
    import av

    count = 0
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=H264_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.thread_count = 1  # x264's bytes depend on the number of its threads
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
            count += 1
        container.mux(stream.encode(None))
    return count


def _write_mpeg4(path: Path, images: Iterable[Image]) -> int:
    """Write with OpenCV; returns the number of frames."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FPS, SIZE)
    if not writer.isOpened():
        raise OSError("OpenCV has no MP4 writer for it")
    count = 0
    for image in images:
        writer.write(image)
        count += 1
    writer.release()
    return count


def _with_signs(street: Street, rng: random.Random) -> Street:
    """The same street with a sign every ten metres or so, without what would hide signs or stand in the car's way."""
    order = list(range(len(CLASS_NAMES))) + [rng.randrange(len(CLASS_NAMES)) for _ in range(4)]
    rng.shuffle(order)
    things = [thing for thing in street.things if _stays(thing)]
    for index, class_id in enumerate(order):
        side = -1 if index % 3 == 2 else 1
        x = side * (ROAD_HALF_WIDTH + rng.uniform(0.6, 1.3))
        draw = functools.partial(_draw_street_sign, class_id=class_id)
        things.append(Thing(draw, x, 18.0 + 9.5 * index, rng.getrandbits(30)))
    # Grain that changes from frame to frame would be most of the file.
    return replace(street, things=tuple(sorted(things, key=_distance, reverse=True)), grain=0.0)


def _stays(thing: Thing) -> bool:
    """Whether a thing is in the other lane, far enough not to surprise, or well off the road."""
    return abs(thing.x) > ROAD_HALF_WIDTH + 2.4 or (-ROAD_HALF_WIDTH < thing.x < 0 and thing.z >= 60)


def _distance(thing: Thing) -> float:
    """Where a thing ends: a house reaches so far back that a sign before its wall may stand behind its corner."""
    return thing.z + (BUILDING_DEPTH if thing.draw is draw_building else 0.0)


def _draw_street_sign(image: Image, camera: Camera, thing: Thing, class_id: int) -> None:
    """A sign of the drive, on its pole."""
    rng = random.Random(thing.seed)
    scale = camera.focal / (thing.z - camera.z)
    x = camera.centre + scale * (thing.x - camera.x)
    y = camera.horizon + scale * (EYE_HEIGHT - SIGN_HEIGHT_METRES)
    angles = (rng.gauss(0, 0.12), rng.gauss(0, 0.03), rng.gauss(0, 0.03))
    sign = place(class_face(class_id), class_id, 0.9 * scale, (x, y), angles)
    outside = sign.box[2] < 2 or sign.box[0] > camera.width - 2 or sign.box[3] < 2 or sign.box[1] > camera.height - 2
    if outside:
        return
    foot, half = camera.horizon + scale * EYE_HEIGHT, max(0.6, 0.035 * scale)
    corners = np.array([(x - half, y), (x + half, y), (x + half, foot), (x - half, foot)])
    cv2.fillPoly(image, [np.rint(corners * 16).astype(np.int32)], (128, 130, 130), cv2.LINE_AA, 4)
    draw_face(image, sign, np.full((32, 32), 0.95, np.float32))
