from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from yolotrt.media.images import read_image
from yolotrt.preprocess import LETTERBOX_RULE, PAD_VALUE, CentreCrop, Letterbox, input_rule

SIDES = st.integers(1, 20_000)
NETWORK_SIDES = st.integers(1, 40).map(lambda cells: 32 * cells)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8)


def network_input(letterbox: Letterbox, image: np.ndarray) -> np.ndarray:
    out = np.full((3, *letterbox.network_size), np.nan, np.float32)  # whatever is not written is seen
    letterbox.to_input(image, out)
    return out


# --- size and padding ---


# By hand from YOLOv5's rule: r = min(H/h, W/w), sides round(side r), padding round(d/2 - 0.1) above and to the left.
@pytest.mark.parametrize(
    ("source", "network", "scaled", "top", "left"),
    [
        ((640, 640), (640, 640), (640, 640), 0, 0),
        ((1080, 810), (640, 640), (640, 480), 0, 80),  # bus.jpg
        ((720, 1280), (640, 640), (360, 640), 140, 0),  # zidane.jpg
        ((720, 1280), (384, 640), (360, 640), 12, 0),
        ((720, 1280), (640, 384), (216, 384), 212, 0),
        ((480, 640), (640, 640), (480, 640), 80, 0),
        ((320, 320), (640, 640), (640, 640), 0, 0),  # enlarged
        ((427, 640), (640, 640), (427, 640), 106, 0),  # 213 rows of padding: 106 above, 107 below
        ((640, 427), (640, 640), (640, 427), 0, 106),
        ((1000, 333), (640, 640), (640, 213), 0, 213),  # 333 x 0.64 = 213.12; 427 columns: 213 and 214
        ((500, 375), (640, 640), (640, 480), 0, 80),
        ((1, 1), (640, 640), (640, 640), 0, 0),
        ((50, 10_000), (640, 640), (3, 640), 318, 0),  # 50 x 0.064 = 3.2; 637 rows: 318 and 319
        ((10_000, 50), (640, 640), (640, 3), 0, 318),
        ((1, 20_000), (640, 640), (1, 640), 319, 0),  # 0.032 pixels would be none; 639 rows: 319 and 320
        ((20_000, 1), (640, 640), (640, 1), 0, 319),
        ((3, 5), (32, 32), (19, 32), 6, 0),  # 3 x 6.4 = 19.2; 13 rows: 6 and 7
        ((5, 64), (32, 32), (2, 32), 15, 0),  # 2.5 rounds to even
        ((7, 64), (32, 32), (4, 32), 14, 0),  # 3.5 rounds to even
    ],
)
def test_size_and_padding_follow_yolov5s_rule(source, network, scaled, top, left):
    letterbox = Letterbox.fit(source, network)
    assert (letterbox.scaled_size, letterbox.top, letterbox.left) == (scaled, top, left)
    assert (letterbox.source_size, letterbox.network_size) == (source, network)


@given(st.tuples(SIDES, SIDES), st.tuples(NETWORK_SIDES, NETWORK_SIDES))
def test_the_picture_always_fits_and_touches_two_edges(source, network):
    letterbox = Letterbox.fit(source, network)
    (height, width), (full_height, full_width) = letterbox.scaled_size, network
    assert height == full_height or width == full_width
    bottom, right = full_height - height - letterbox.top, full_width - width - letterbox.left
    # the odd row or column of padding lies below or to the right
    assert bottom - letterbox.top in (0, 1)
    assert right - letterbox.left in (0, 1)
    assert min(letterbox.top, letterbox.left, bottom, right, height - 1, width - 1) >= 0


@pytest.mark.parametrize(("source", "network"), [((0, 5), (32, 32)), ((5, 0), (32, 32)), ((5, 5), (0, 32))])
def test_an_empty_picture_or_network_is_refused(source, network):
    with pytest.raises(ValueError, match="cannot fit"):
        Letterbox.fit(source, network)


# --- coordinates ---


@given(st.tuples(SIDES, SIDES), st.tuples(NETWORK_SIDES, NETWORK_SIDES), st.integers(0, 2**32 - 1))
@example((1, 20_000), (32, 1280), 0)
@example((20_000, 20_000), (32, 32), 0)
def test_coordinates_survive_the_way_there_and_back(source, network, seed):
    height, width = source
    letterbox = Letterbox.fit(source, network)
    inside = np.random.RandomState(seed).rand(50, 4) * (width, height, width, height)
    corners = [(0, 0, width, height), (width, height, 0, 0)]
    points = np.concatenate([inside, corners]).astype(np.float32)
    # half a pixel of the picture; float32 leaves 0.05 where 20,000 pixels become 32
    np.testing.assert_allclose(letterbox.inverse(letterbox.forward(points)), points, rtol=0, atol=0.5)


@pytest.mark.parametrize(
    ("picture", "network"),
    [
        ((0, 0), (80, 0)),
        ((810, 1080), (560, 640)),
        ((405, 540), (320, 320)),
        ((810, 0), (560, 0)),
    ],
)
def test_coordinates_of_a_portrait_picture(picture, network):
    letterbox = Letterbox.fit((1080, 810), (640, 640))
    # exact in float32 but for the factor 640 / 1080
    np.testing.assert_allclose(letterbox.forward(np.array(picture, np.float32)), network, rtol=0, atol=1e-4)
    np.testing.assert_allclose(letterbox.inverse(np.array(network, np.float32)), picture, rtol=0, atol=1e-4)


def test_each_axis_has_its_own_scale():
    # 333 columns become 213, not 213.12: a box at the right edge must come back to the right edge
    letterbox = Letterbox.fit((1000, 333), (640, 640))
    assert letterbox.scale == (213 / 333, 0.64)
    assert letterbox.inverse(np.array([213 + 213, 640], np.float32)).tolist() == [333, 1000]


def test_boxes_are_clipped_to_the_picture():
    letterbox = Letterbox.fit((1080, 810), (640, 640))
    boxes = np.array([[-5, -5, 700, 700], [0, 10, 79, 20]], np.float32)
    clipped = letterbox.inverse(boxes)
    assert clipped[0].tolist() == [0, 0, 810, 1080]
    assert clipped[1, [0, 2]].tolist() == [0, 0]  # wholly in the padding


@pytest.mark.parametrize("shape", [(2,), (4,), (0, 4), (5, 4), (2, 3, 6)])
def test_any_number_of_points_is_scaled_at_once(shape):
    letterbox = Letterbox.fit((100, 200), (64, 64))
    for convert in (letterbox.forward, letterbox.inverse):
        result = convert(np.ones(shape, np.float32))
        assert result.shape == shape
        assert result.dtype == np.float32


# --- pixels ---


def reference_apply(image: np.ndarray, letterbox: Letterbox) -> np.ndarray:
    """YOLOv5's letterbox with OpenCV's own functions."""
    height, width = letterbox.scaled_size
    scaled = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    bottom = letterbox.network_size[0] - height - letterbox.top
    right = letterbox.network_size[1] - width - letterbox.left
    border = (letterbox.top, bottom, letterbox.left, right)
    return cv2.copyMakeBorder(scaled, *border, cv2.BORDER_CONSTANT, value=(114, 114, 114))


SIZES = [
    (1, 1),
    (10_000, 50),
    (50, 10_000),
    (1, 20_000),
    (20_000, 1),
    (64, 96),
    (65, 97),
    (96, 64),
    (128, 192),
    (31, 7),
]


@pytest.mark.parametrize("source", SIZES)
@pytest.mark.parametrize("network", [(64, 96), (96, 64), (32, 32)])
def test_pixels_are_opencvs(source, network):
    letterbox = Letterbox.fit(source, network)
    image = noise(*source)
    np.testing.assert_array_equal(letterbox.apply(image), reference_apply(image, letterbox))


@pytest.mark.parametrize("source", SIZES)
@pytest.mark.parametrize("network", [(64, 96), (96, 64), (32, 32)])
def test_the_input_is_the_letterboxed_picture_as_rgb_from_0_to_1(source, network):
    letterbox = Letterbox.fit(source, network)
    image = noise(*source)
    rgb = letterbox.apply(image)[..., ::-1].transpose(2, 0, 1)
    expected = rgb.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(network_input(letterbox, image), expected)  # to the last bit


@pytest.mark.parametrize(
    "view",
    [
        lambda image: image[::-1],
        lambda image: image[:, ::-1],
        lambda image: image[..., ::-1],
        lambda image: image[::2, ::3],
        lambda image: image.transpose(1, 0, 2),
        np.asfortranarray,
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (60, 90)])
def test_views_of_a_picture_give_what_their_copies_give(view, size):
    image = view(noise(*size))
    letterbox = Letterbox.fit(image.shape[:2], (64, 64))
    copied = network_input(letterbox, np.array(image, order="C"))
    np.testing.assert_array_equal(network_input(letterbox, image), copied)


def test_a_picture_is_not_changed_and_not_shared():
    image = noise(64, 64)
    before = image.copy()
    letterbox = Letterbox.fit((64, 64), (64, 64))
    letterbox.apply(image)[:] = 0
    network_input(letterbox, image)
    np.testing.assert_array_equal(image, before)


def test_a_reused_buffer_shows_nothing_of_the_picture_before():
    out = np.empty((3, 64, 64), np.float32)
    Letterbox.fit((64, 64), (64, 64)).to_input(np.full((64, 64, 3), 255, np.uint8), out)
    image = noise(64, 16)
    letterbox = Letterbox.fit((64, 16), (64, 64))
    letterbox.to_input(image, out)
    np.testing.assert_array_equal(out, network_input(letterbox, image))


def test_a_part_of_a_batch_can_be_written():
    batch = np.zeros((3, 3, 64, 96), np.float32)
    letterbox = Letterbox.fit((50, 50), (64, 96))
    letterbox.to_input(noise(50, 50), batch[1])
    assert (batch[[0, 2]] == 0).all()
    np.testing.assert_array_equal(batch[1], network_input(letterbox, noise(50, 50)))


@pytest.mark.parametrize("name", ["bus", "zidane"])
@pytest.mark.parametrize("kind", ["square", "auto"])
def test_the_input_of_a_photo_is_yolov5s_to_the_byte(golden, name, kind):
    expected = np.load(golden / "expected" / "yolov5n_det.npz")[f"{name}_{kind}_input_u8_chw_rgb"]
    image = read_image(golden / "images" / f"{name}.jpg")
    letterbox = Letterbox.fit(image.shape[:2], expected.shape[1:])
    np.testing.assert_array_equal(letterbox.apply(image)[..., ::-1].transpose(2, 0, 1), expected)


def test_the_rule_in_words_says_what_the_code_does():
    assert LETTERBOX_RULE["pad_value"] == PAD_VALUE == 114
    letterbox = Letterbox.fit((1, 3), (96, 96))
    out = network_input(letterbox, np.array([[[255, 0, 0]] * 3], np.uint8))  # blue
    assert LETTERBOX_RULE["color_order"] == "RGB"
    assert out[:, 48, 48].tolist() == [0, 0, 1]
    assert LETTERBOX_RULE["scale"] == "1/255"
    assert out[0, 0, 0] == np.float32(114) / np.float32(255)


# --- classifiers ---


@pytest.mark.parametrize(
    ("size", "network", "square"),
    [
        ((40, 60), (40, 40), (slice(None), slice(10, 50))),
        ((61, 40), (40, 40), (slice(10, 50), slice(None))),  # of an odd surplus the larger part is cut off below
        ((32, 32), (32, 32), (slice(None), slice(None))),
        ((64, 100), (32, 48), (slice(None), slice(18, 82))),
    ],
)
def test_a_classifier_sees_the_square_in_the_middle(size, network, square):
    image = np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8)
    expected = cv2.resize(image[square], network[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(CentreCrop(network).apply(image), expected)


def test_a_classifiers_input_is_normalised_as_torch_does_it():
    """ToTensor divides by 255, Normalize subtracts and divides in place, all in float32."""
    torch = pytest.importorskip("torch", reason="torch, which computes the reference, is not installed")
    image = np.random.RandomState(0).randint(0, 256, (32, 48, 3), np.uint8)
    out = np.zeros((3, 32, 32), np.float32)
    CentreCrop((32, 32)).to_input(image, out)
    planes = np.ascontiguousarray(CentreCrop((32, 32)).apply(image).transpose(2, 0, 1)[::-1])
    expected = torch.from_numpy(planes).float()
    expected /= 255.0
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_array_equal(out, expected.sub_(mean).div_(deviation).numpy())


@pytest.mark.parametrize(("task", "rule"), [("detect", "pad_value"), ("segment", "pad_value"), ("classify", "crop")])
def test_every_task_has_its_rule(task, rule):
    assert rule in input_rule(task)
