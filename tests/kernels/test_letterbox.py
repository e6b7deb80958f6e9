"""letterbox.cu, run on the CPU, gives the bytes of OpenCV."""

from __future__ import annotations

import numpy as np
import pytest
from comparisons import letterbox_case, letterbox_differences, picture, resize_differences

from yolotrt.cuda.kernels import LetterboxKernel, resize_taps
from yolotrt.errors import InputError


def test_a_thousand_random_sizes_differ_in_no_value(machine):
    rng = np.random.default_rng(0)
    for case in range(1000):
        network, frame = letterbox_case(rng, 144)
        padding = int(rng.integers(0, 70))
        differences = letterbox_differences(
            machine, network, [picture(rng, *frame)], half=bool(case % 2), padding=padding
        )
        assert differences == 0, f"frame {frame}, network {network}"


def test_cv2_resize_itself_differs_in_no_byte(machine):
    # a network input of the frame's aspect ratio has no padding, so that the sizes are free of the letterbox's rule
    rng = np.random.default_rng(1)
    for _ in range(100):
        sides, factors = rng.integers(1, 40, 2), rng.integers(1, 7, 2)
        frame, scaled = tuple(int(s) for s in sides * factors[0]), tuple(int(s) for s in sides * factors[1])
        assert resize_differences(rng, machine, frame, scaled) == 0, f"{frame} to {scaled}"


@pytest.mark.parametrize(
    "frame",
    [
        (1080, 1920),  # full HD
        (1280, 1280),  # exact halving, which OpenCV does by averaging
        (640, 640),  # a copy
        (360, 640),
        (479, 637),  # widths that leave a remainder for every vector width
        (3, 4000),
        (4000, 1),  # becomes one column
    ],
)
def test_common_and_extreme_frames_at_640(machine, frame):
    rng = np.random.default_rng(2)
    assert letterbox_differences(machine, (640, 640), [picture(rng, *frame)], half=False) == 0


def test_frames_of_different_sizes_share_a_launch(machine):
    rng = np.random.default_rng(3)
    frames = [picture(rng, *size) for size in ((100, 50), (64, 96), (7, 300), (1, 1))]
    assert letterbox_differences(machine, (64, 96), frames, half=True) == 0


@pytest.mark.parametrize("half", [False, True])
def test_each_byte_is_divided_as_numpy_divides_it(machine, half):
    every_byte = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert letterbox_differences(machine, (16, 16), [every_byte], half=half) == 0


def test_rows_beyond_the_border_keep_their_weights_and_columns_do_not():
    rows, columns = resize_taps(2, 8, clamp=False), resize_taps(2, 8, clamp=True)
    assert rows[0].tolist() == (-1, 768, 1280)  # coordinate -0.375: 0.375 and 0.625 of 2048
    assert columns[0].tolist() == (0, 2048, 0)


def test_a_pitch_below_a_row_is_refused(machine):
    with pytest.raises(InputError, match="10 pixels wide cannot have 29 bytes a row"):
        LetterboxKernel(machine.device, (32, 32), half=False).plan((4, 10), 0, 29)
