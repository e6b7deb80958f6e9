from __future__ import annotations

import io
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolotrt.errors import ImageError, OutputError
from yolotrt.media.images import WRITABLE_SUFFIXES, opencv_quiet, read_image, write_image

BLUE, GREEN, RED = 30, 120, 220


def flat(height: int = 8, width: int = 12, dtype: type = np.uint8) -> np.ndarray:
    return np.full((height, width, 3), (BLUE, GREEN, RED), dtype)


def ramp(height: int = 64, width: int = 96) -> np.ndarray:
    """A picture whose halves differ in every direction, smooth enough for JPEG."""
    y, x = np.mgrid[0:height, 0:width]
    return np.dstack([255 * x // width, 255 * y // height, 255 - 255 * x // width]).astype(np.uint8)


def noise(height: int = 200, width: int = 300) -> np.ndarray:
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(picture, (0, 0), 3)


def encoded(suffix: str, image: np.ndarray, options: tuple[int, ...] = ()) -> bytes:
    ok, data = cv2.imencode(suffix, image, options)
    assert ok
    return bytes(data.tobytes())


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, color_type: int, rows: bytes, *extra: bytes, bits: int = 8) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + png_chunk(b"IEND", b"")


def exif_segment(orientation: int, thumbnail: bytes = b"") -> bytes:
    """A JPEG APP1 segment with the orientation tag (0x0112, SHORT), little-endian."""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff + thumbnail
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


# --- what is read ---


@pytest.mark.parametrize("suffix", [".bmp", ".dib", ".png", ".ppm", ".tif", ".tiff", ".jp2"])
def test_a_lossless_format_gives_the_same_pixels(tmp_path: Path, suffix: str) -> None:
    path = put(tmp_path, f"picture{suffix}", encoded(suffix, noise(), (cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000)))
    # JPEG 2000 goes through a rounded colour transform; all others are exact.
    np.testing.assert_allclose(read_image(path).astype(int), noise().astype(int), atol=2 if suffix == ".jp2" else 0)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".jpe", ".webp"])
def test_a_lossy_format_gives_nearly_the_same_pixels(tmp_path: Path, suffix: str) -> None:
    path = put(tmp_path, f"picture{suffix}", encoded(suffix, ramp()))
    # Quantization at the default quality of 95 moves a smooth ramp by a few levels.
    assert np.abs(read_image(path).astype(int) - ramp().astype(int)).max() < 16


@pytest.mark.parametrize(("height", "width"), [(1, 1), (50, 10000), (10000, 50)])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_extreme_shapes_are_read(tmp_path: Path, suffix: str, height: int, width: int) -> None:
    image = read_image(put(tmp_path, f"picture{suffix}", encoded(suffix, flat(height, width))))
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


GREY = bytes([0, 10, 200])
PALETTE = png_chunk(b"PLTE", bytes([RED, GREEN, BLUE, 1, 2, 3]))


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("grey png", png(2, 1, 0, GREY), [(10, 10, 10), (200, 200, 200)]),
        ("grey + alpha png", png(2, 1, 4, bytes([0, 10, 0, 200, 255])), [(10, 10, 10), (200, 200, 200)]),
        # Transparent pixels keep their colour: alpha is dropped, not blended.
        ("rgba png", png(2, 1, 6, bytes([0, RED, GREEN, BLUE, 0, 1, 2, 3, 9])), [(BLUE, GREEN, RED), (3, 2, 1)]),
        ("palette png", png(2, 1, 3, bytes([0, 0, 1]), PALETTE), [(BLUE, GREEN, RED), (3, 2, 1)]),
        ("bilevel png", png(2, 1, 0, bytes([0, 0b01000000]), bits=1), [(0, 0, 0), (255, 255, 255)]),
        # 0x0AFF rounds to 0x0B but its high byte is 0x0A.
        ("16-bit grey png", png(2, 1, 0, bytes([0, 0x0A, 0xFF, 0xC8, 0]), bits=16), [(10, 10, 10), (200, 200, 200)]),
        ("pgm", b"P5 2 1 255\n" + GREY[1:], [(10, 10, 10), (200, 200, 200)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_pixel_layout_becomes_bgr(
    tmp_path: Path, name: str, data: bytes, expected: list[tuple[int, int, int]]
) -> None:
    assert read_image(put(tmp_path, "picture", data)).tolist() == [[list(pixel) for pixel in expected]]


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".jp2", ".ppm"])
def test_16_bit_pictures_are_scaled_to_8_bit(tmp_path: Path, suffix: str) -> None:
    path = put(tmp_path, f"picture{suffix}", encoded(suffix, flat(64, 64, np.uint16) * 256 + 90))
    # OpenCV's TIFF reader divides by 257 and rounds; the others take the high byte.
    np.testing.assert_allclose(read_image(path), flat(64, 64), atol=1 if suffix == ".tiff" else 0)


def test_cmyk_jpeg_becomes_bgr(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="Pillow, which writes CMYK JPEG here, is not installed")
    buffer = io.BytesIO()
    pillow.new("CMYK", (8, 8), (255, 0, 0, 0)).save(buffer, "JPEG")  # full cyan
    blue, green, red = read_image(put(tmp_path, "cyan.jpg", buffer.getvalue()))[4, 4]
    assert blue > 250
    assert green > 250
    assert red < 5


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, np.rot90),
    ],
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, upright) -> None:
    jpeg = encoded(".jpg", ramp())
    stored = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    path = put(tmp_path, "picture.jpg", jpeg[:2] + exif_segment(orientation) + jpeg[2:])
    np.testing.assert_array_equal(read_image(path), upright(stored))


def test_names_outside_ascii_work(tmp_path: Path) -> None:
    path = tmp_path / "Größe 人 🚌.png"
    write_image(path, flat())
    np.testing.assert_array_equal(read_image(path), flat())


def test_the_suffix_does_not_decide(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(put(tmp_path, "picture.jpg", encoded(".png", flat()))), flat())


def test_reference_pictures(golden: Path) -> None:
    cmyk = read_image(golden / "images" / "sn_african_elephants_cmyk.jpg")
    grey = read_image(golden / "images" / "sn_african_elephants_bw.jpg")
    rotated = read_image(golden / "images" / "sn_african_elephants_with_exif_orientation.jpg")
    assert cmyk.shape == grey.shape == rotated.shape == (1536, 2048, 3)
    # The same scene three times, upright: each codec's loss is below ten levels on average.
    luminance = cv2.cvtColor(rotated, cv2.COLOR_BGR2GRAY).astype(int)
    assert np.abs(grey[..., 0].astype(int) - luminance).mean() < 10
    assert np.abs(cmyk.astype(int) - rotated.astype(int)).mean() < 10
    with pytest.raises(ImageError, match=r"sn_african_elephants_truncated_file.jpg is truncated.*: copy"):
        read_image(golden / "images" / "sn_african_elephants_truncated_file.jpg")


# --- what is refused ---

JPEG = encoded(".jpg", noise())
PNG = encoded(".png", noise())
PROGRESSIVE = encoded(".jpg", noise(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1))
RESTARTS = encoded(".jpg", noise(), (cv2.IMWRITE_JPEG_RST_INTERVAL, 4))
WITH_THUMBNAIL = JPEG[:2] + exif_segment(1, encoded(".jpg", flat())) + JPEG[2:]


@pytest.mark.parametrize("whole", [JPEG, PROGRESSIVE, RESTARTS, WITH_THUMBNAIL, JPEG + b"after the end", PNG + b"more"])
def test_a_whole_file_is_not_taken_for_a_truncated_one(tmp_path: Path, whole: bytes) -> None:
    assert read_image(put(tmp_path, "picture", whole)).shape == noise().shape


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, None])
@pytest.mark.parametrize(
    "whole",
    [JPEG, PROGRESSIVE, RESTARTS, WITH_THUMBNAIL, PNG],
    ids=["jpeg", "progressive", "restarts", "thumbnail", "png"],
)
def test_a_truncated_file_is_refused(tmp_path: Path, whole: bytes, share: float | None, capfd) -> None:
    end = int(len(whole) * share) if share else len(whole) - 2
    with pytest.raises(ImageError, match=r"picture .*cut\.jpg is truncated, its end is missing: copy or download"):
        read_image(put(tmp_path, "cut.jpg", whole[:end]))
    assert capfd.readouterr().err == ""  # found before a decoder could complain


@pytest.mark.parametrize("suffix", [".bmp", ".tiff", ".webp", ".jp2", ".ppm"])
def test_other_truncated_formats_are_refused_too(tmp_path: Path, suffix: str) -> None:
    whole = encoded(suffix, noise())
    with pytest.raises(ImageError, match=r"cut.* cannot be decoded.*: save it again"):
        read_image(put(tmp_path, f"cut{suffix}", whole[: len(whole) // 2]))


def jpeg_of_declared_size(width: int, height: int) -> bytes:
    frame = JPEG.index(b"\xff\xc0")
    return JPEG[: frame + 5] + struct.pack(">HH", height, width) + JPEG[frame + 9 :]


@pytest.mark.parametrize(
    "data",
    [
        png(100_000, 100_000, 2, bytes(1000)),
        jpeg_of_declared_size(65_000, 65_000),
        b"P6 100000 100000 255\n123",
    ],
    ids=["png", "jpeg", "ppm"],
)
def test_a_memory_bomb_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ImageError, match=r"bomb\.png declares more pixels than OpenCV's limit: scale it down"):
        read_image(put(tmp_path, "bomb.png", data))


def test_too_little_memory_is_an_image_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(cv2, "imdecode", fail)
    with pytest.raises(ImageError, match="does not fit into memory: scale it down"):
        read_image(put(tmp_path, "picture.png", PNG))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"is empty: "),
        (b"just text\n", r"cannot be decoded.*: save it again"),
        (b"\0" * 1000, r"cannot be decoded.*: save it again"),
        (b"\xff\xd8\xff\xd9", r"is truncated.*: copy"),
        (b"\xff\xd8\xff", r"is truncated.*: copy"),
        (b"\x89PNG\r\n\x1a\n", r"is truncated.*: copy"),
        (b"BM", r"cannot be decoded.*: save it again"),
        (png(100, 100, 2, bytes(10)), r"cannot be decoded.*: save it again"),
        (PNG[:200] + b"\x55" * 50 + PNG[250:], r"cannot be decoded.*: save it again"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        read_image(put(tmp_path, "picture.jpg", data))
    assert "picture.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.jpg does not exist: check the path"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="is a directory: name a file"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match=r"is not a regular file|does not exist"):
        read_image(Path("/dev/zero"))


def test_opencv_does_not_write_to_stderr(tmp_path: Path, capfd) -> None:
    with pytest.raises(ImageError):
        read_image(put(tmp_path, "cut.tiff", encoded(".tiff", noise())[:5000]))
    assert "OpenCV" not in capfd.readouterr().err


def test_opencv_log_level_is_restored_after_concurrent_use() -> None:
    log = getattr(cv2.utils, "logging", cv2)
    if not hasattr(log, "getLogLevel"):
        pytest.skip("this OpenCV has no log level")
    before = log.getLogLevel()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with opencv_quiet():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with opencv_quiet():
        assert log.getLogLevel() == 0
    assert log.getLogLevel() == 0  # the other thread still decodes
    leave.set()
    thread.join()
    assert log.getLogLevel() == before != 0


# --- what is written ---


@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
@pytest.mark.parametrize("image", [ramp(), flat(1, 1), flat(50, 10_000)], ids=["ramp", "1x1", "strip"])
def test_every_writable_suffix_can_be_read_back(tmp_path: Path, suffix: str, image: np.ndarray) -> None:
    path = tmp_path / "new folder" / f"picture{suffix.upper()}"
    write_image(path, image)
    # JPEG and WebP at quality 95 with chroma at half resolution, see above.
    assert np.abs(read_image(path).astype(int) - image.astype(int)).max() < 16
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_jpeg_quality_is_95(tmp_path: Path) -> None:
    write_image(tmp_path / "picture.jpg", noise())
    assert (tmp_path / "picture.jpg").read_bytes() == encoded(".jpg", noise(), (cv2.IMWRITE_JPEG_QUALITY, 95))


@pytest.mark.parametrize("name", ["picture", "picture.gif", "picture.xyz", "picture.pgm", "picture.jp2", ".png"])
def test_an_unsupported_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"cannot write picture .*: name it with one of .*\.jpg"):
        write_image(tmp_path / name, flat())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("picture.jpg", (2, 70_000, 3), "70000x2"),
        ("picture.webp", (2, 20_000, 3), "20000x2"),
        ("picture.png", (0, 5, 3), "5x0"),
    ],
)
def test_a_format_that_cannot_hold_the_picture_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], size: str
) -> None:
    with pytest.raises(OutputError, match=rf"cannot write picture .*{name}: .* cannot hold {size} pixels: choose"):
        write_image(tmp_path / name, np.zeros(shape, np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    put(tmp_path, "file", b"x")
    with pytest.raises(OutputError, match="cannot write"):
        write_image(tmp_path / "file" / "picture.png", flat())
