"""upload.cu, run on the CPU, fetches exactly the bytes that the letterbox needs, whatever their alignment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from comparisons import copied_differences, letterbox_case, picture, uploaded_letterbox_differences

from yolotrt.cuda.device import Lines
from yolotrt.cuda.kernels import (
    _PLAN,
    CopyKernel,
    LetterboxKernel,
    NeededRows,
    UploadKernel,
    needed_lines,
    needed_rows,
    upload_bytes,
)

NETWORK = (64, 64)
BEHIND = 64
"""Bytes that are looked at behind the room of a frame."""


def bytes_at(offset: int, content: np.ndarray) -> np.ndarray:
    """A copy of `content` whose address leaves the remainder `offset` when divided by 16."""
    room = np.empty(content.size + 32, np.uint8)
    start = (offset - room.ctypes.data) % 16
    room[start : start + content.size] = content.ravel()
    return room[start : start + content.size]


@dataclass
class Slot:
    """A frame to fetch, and room for it."""

    frame: np.ndarray
    source: np.ndarray
    room: np.ndarray
    plan: np.ndarray
    expected: np.ndarray  # the bytes that must lie at the begin of `room`


def make_slot(machine, frame: np.ndarray, *, gathered: bool, source_at: int = 0, room_at: int = 0) -> Slot:
    kernel = LetterboxKernel(machine.device, NETWORK, half=False)
    rows = kernel.needed_rows(frame.shape[:2])
    needed = frame if rows.numbers is None else frame[rows.numbers]
    there = needed if gathered else frame
    padding = np.full(upload_bytes(there.size) - there.size, 1, np.uint8)
    source = bytes_at(source_at, np.concatenate((there.ravel(), padding)))
    room = bytes_at(room_at, np.full(upload_bytes(needed.size) + BEHIND, 0xA5, np.uint8))
    plan = kernel.upload_plan(frame.shape[:2], room.ctypes.data, source.ctypes.data, gathered=gathered)
    return Slot(frame, source, room, plan, needed.ravel())


def fetch(machine, plans: np.ndarray) -> None:
    UploadKernel(machine.device).launch(plans.ctypes.data, plans.shape[1], len(plans))


def check(slot: Slot) -> None:
    np.testing.assert_array_equal(slot.room[: slot.expected.size], slot.expected)
    assert (slot.room[-BEHIND:] == 0xA5).all()


@pytest.mark.parametrize("gathered", [False, True], ids=["listed", "gathered"])
@pytest.mark.parametrize(
    "size",
    [
        (192, 192),  # every third row; rows of a multiple of 16 bytes
        (300, 100),  # two of five rows; of 4 bytes
        (333, 101),  # an odd number of bytes a row
        (64, 64),  # all rows
        (40, 33),  # all rows, an odd number of bytes in all
        (1, 1),
    ],
)
@pytest.mark.parametrize(("source_at", "room_at"), [(0, 0), (4, 0), (8, 12), (1, 0), (0, 2), (3, 5)])
def test_units_of_any_size_fetch_exactly_the_needed_bytes(machine, size, gathered, source_at, room_at):
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    slot = make_slot(machine, frame, gathered=gathered, source_at=source_at, room_at=room_at)
    fetch(machine, slot.plan[None])
    check(slot)


def test_slots_share_a_launch_and_slots_of_zeros_fetch_nothing(machine):
    rng = np.random.default_rng(1)
    slots = [
        make_slot(machine, rng.integers(0, 256, (*size, 3), np.uint8), gathered=gathered)
        for size, gathered in (((192, 192), False), ((70, 31), True), ((500, 7), False))
    ]
    plans = [slots[0].plan, slots[1].plan, np.zeros_like(slots[0].plan), slots[2].plan]
    fetch(machine, np.stack(plans))
    for slot in slots:
        check(slot)


def test_only_the_asked_number_of_slots_is_fetched(machine):
    rng = np.random.default_rng(2)
    first, second = (make_slot(machine, rng.integers(0, 256, (30, 40, 3), np.uint8), gathered=False) for _ in range(2))
    plans = np.stack([first.plan, second.plan])
    UploadKernel(machine.device).launch(plans.ctypes.data, plans.shape[1], 1)
    check(first)
    assert (second.room == 0xA5).all()


def test_a_frame_on_the_device_is_not_fetched(machine):
    slot = make_slot(machine, np.zeros((192, 192, 3), np.uint8), gathered=False)
    kernel = LetterboxKernel(machine.device, NETWORK, half=False)
    fetch(machine, kernel.plan((192, 192), slot.room.ctypes.data, 576)[None])
    assert (slot.room == 0xA5).all()


@pytest.mark.parametrize("size", [16, 4080, 4096, 4112, 20_000])  # one block copies 4096 bytes
def test_copying_copies_all_bytes_and_no_more(machine, size):
    source = bytes_at(0, np.random.default_rng(8).integers(0, 256, size, np.uint8))
    target = bytes_at(0, np.full(size + BEHIND, 0xA5, np.uint8))
    CopyKernel(machine.device).launch(target.ctypes.data, source.ctypes.data, size)
    np.testing.assert_array_equal(target[:size], source)
    assert (target[size:] == 0xA5).all()
    assert copied_differences(machine, source) == 0


@pytest.mark.parametrize(
    ("size", "rows", "listed"),
    [
        ((1080, 1920), 360, True),  # a third: one row for each scaled one
        ((2160, 3840), 720, True),  # a sixth: two rows for each scaled one
        ((720, 1280), 720, False),  # a half: all rows
        ((1440, 2560), 720, True),  # a quarter
        ((640, 640), 640, False),  # a copy
        ((100, 100), 100, False),  # enlarged
        ((3200, 3200), 640, True),  # a fifth
        ((1, 2000), 1, False),
        ((2000, 1), 1280, True),
    ],
)
def test_rows_of_common_frames_at_640(size, rows, listed):
    needed = needed_rows(size, (640, 640))
    assert needed.count == rows
    assert (needed.numbers is not None) == listed
    assert needed.taps["first"].max() < rows


def test_a_full_hd_frame_costs_the_bus_a_third(machine):
    kernel = LetterboxKernel(machine.device, (640, 640), half=False)
    plan = kernel.upload_plan((1080, 1920), 0, 0, gathered=False)[: _PLAN.itemsize].view(_PLAN)[0]
    assert (plan["row_count"], plan["row_bytes"], plan["source_pitch"]) == (360, 5760, 5760)
    gathered = kernel.upload_plan((1080, 1920), 0, 0, gathered=True)[: _PLAN.itemsize].view(_PLAN)[0]
    assert int(gathered["row_count"]) * int(gathered["row_bytes"]) == 360 * 5760 == 1080 * 5760 // 3
    np.testing.assert_array_equal(kernel.needed_rows((1080, 1920)).numbers, np.arange(360) * 3 + 1)


@pytest.mark.parametrize(
    ("size", "before", "lines"),
    [
        ((1080, 1920), 1, Lines(1, 3, 360)),
        ((2160, 3840), 2, Lines(2, 6, 360)),
        ((1440, 2560), 1, Lines(2, 4, 360)),
        ((3200, 3200), 2, Lines(1, 5, 640)),
        ((720, 1280), 0, Lines(720, 720, 1)),
        ((100, 100), 0, Lines(100, 100, 1)),
    ],
)
def test_rows_of_common_frames_are_lines_for_a_copy_command(size, before, lines):
    assert needed_rows(size, (640, 640)).lines == (before, lines)
    row_bytes = 3 * size[1]
    in_bytes = Lines(lines.size * row_bytes, lines.pitch * row_bytes, lines.count)
    assert needed_lines(size, (640, 640)) == (before * row_bytes, in_bytes)


def test_lines_are_the_needed_rows_or_none():
    rng = np.random.default_rng(5)
    found = {True: 0, False: 0}
    for _ in range(500):
        source, scaled = int(rng.integers(1, 900)), int(rng.integers(1, 200))
        needed = NeededRows.of(source, scaled)
        found[needed.lines is None] += 1
        if needed.lines is None:
            continue
        before, lines = needed.lines
        rows = before + lines.pitch * np.arange(lines.count)[:, None] + np.arange(lines.size)
        numbers = np.arange(source) if needed.numbers is None else needed.numbers
        np.testing.assert_array_equal(rows.ravel(), numbers, f"{source} to {scaled}")
        assert 0 < lines.size <= lines.pitch
        assert rows.max() < source
    assert min(found.values()) > 50


def test_needed_rows_are_the_rows_with_weight():
    rng = np.random.default_rng(3)
    for _ in range(300):
        source, scaled = (int(side) for side in rng.integers(1, 400, 2))
        everything, needed = NeededRows.all(source, scaled), NeededRows.of(source, scaled)
        numbers = np.arange(source) if needed.numbers is None else needed.numbers
        for step, weight in ((0, "weight"), (1, "next_weight")):
            used = everything.taps[weight] != 0
            np.testing.assert_array_equal(everything.taps[weight], needed.taps[weight])
            expected = np.clip(everything.taps["first"] + step, 0, source - 1)
            actual = numbers[np.clip(needed.taps["first"] + step, 0, needed.count - 1)]
            np.testing.assert_array_equal(actual[used], expected[used], f"{source} to {scaled}")


@pytest.mark.parametrize("gathered", [False, True], ids=["listed", "gathered"])
def test_hundreds_of_random_sizes_differ_in_no_value(machine, gathered):
    rng = np.random.default_rng(4 + gathered)
    for case in range(300):
        network, frame = letterbox_case(rng, 128)
        differences = uploaded_letterbox_differences(
            machine, network, [picture(rng, *frame)], half=bool(case % 2), gathered=gathered
        )
        assert differences == 0, f"frame {frame}, network {network}"


@pytest.mark.parametrize("gathered", [False, True], ids=["listed", "gathered"])
@pytest.mark.parametrize(
    "frame",
    [
        (1080, 1920),
        (720, 1280),
        (2160, 3840),
        (1281, 1283),  # odd widths
        (2001, 333),
        (4000, 1),
        (1, 4000),
        (100, 75),  # enlarged
    ],
)
def test_common_and_extreme_frames_at_640(machine, frame, gathered):
    rng = np.random.default_rng(6)
    pixels = picture(rng, *frame)
    assert uploaded_letterbox_differences(machine, (640, 640), [pixels], half=False, gathered=gathered) == 0


def test_frames_of_different_sizes_share_a_launch(machine):
    rng = np.random.default_rng(7)
    frames = [picture(rng, *size) for size in ((300, 150), (64, 96), (7, 300), (1, 1))]
    for gathered in (False, True):
        assert uploaded_letterbox_differences(machine, (64, 96), frames, half=True, gathered=gathered) == 0
