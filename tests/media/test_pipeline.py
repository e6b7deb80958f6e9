from __future__ import annotations

import threading
import time
import tracemalloc

import numpy as np
import pytest

from yolotrt.media.pipeline import QUEUE_CAPACITY, Pipeline


def numbers(count: int):
    def stage(_inbox):
        yield from range(count)

    return stage


def passes_on(inbox):
    yield from inbox


def stage_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("yolotrt-")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert stage_threads() == []


@pytest.mark.parametrize("capacity", [1, 4])
def test_order_is_kept_and_all_arrive(capacity):
    def grouped(inbox):  # takes many, gives many
        group = []
        for item in inbox:
            group.append(item)
            if len(group) == 7:
                yield from group
                group = []
        yield from group

    with Pipeline([("a", numbers(1000)), ("b", grouped), ("c", passes_on)], capacity=capacity) as pipeline:
        assert list(pipeline) == list(range(1000))
        assert [stage.items for stage in pipeline.times] == [1000] * 3


def test_nothing_is_an_end_too():
    with Pipeline([("a", numbers(0)), ("b", passes_on)]) as pipeline:
        assert list(pipeline) == []


def test_stages_work_at_the_same_time():
    def slow(inbox):
        for item in inbox:
            time.sleep(0.02)
            yield item

    began = time.monotonic()
    with Pipeline([("a", numbers(20)), ("b", slow), ("c", slow), ("d", slow)]) as pipeline:
        assert list(pipeline) == list(range(20))
    assert time.monotonic() - began < 0.9  # one after the other: 1.2 s


@pytest.mark.parametrize("capacity", [1, 3])
def test_a_slow_reader_holds_the_source_back(capacity):
    made = []

    def source(_inbox):
        for index in range(1000):
            made.append(index)
            yield index

    with Pipeline([("a", source), ("b", passes_on)], capacity=capacity) as pipeline:
        results = iter(pipeline)
        assert next(results) == 0
        time.sleep(0.1)
        # in each of two queues `capacity`, one in the hands of each of two stages, one taken
        assert len(made) <= 2 * capacity + 3


class TroubleError(Exception):
    pass


def fails_at_its_fifth(inbox):
    for item in inbox:
        if item == 5:
            raise TroubleError("five")
        yield item


def fails_at_its_end(inbox):
    try:
        yield from inbox
    finally:
        raise TroubleError("five")


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_exception_of_any_stage_stops_all_and_is_raised_once(place):
    def source(_inbox):
        index = 0
        while True:  # only the failure ends it
            if place == 0 and index == 5:
                raise TroubleError("five")
            yield index
            index += 1

    stages = [("source", source), *((name, passes_on) for name in "abc")]
    if place:
        stages[place] = ("bad", fails_at_its_fifth)
    cleaned = []

    def cleans_up(inbox):
        try:
            yield from inbox
        finally:
            cleaned.append(True)

    got = []
    with pytest.raises(TroubleError, match="five"), Pipeline([*stages, ("last", cleans_up)]) as pipeline:
        for item in pipeline:
            got.append(item)
        pytest.fail("it ended as if all were well")
    assert got == list(range(len(got)))
    assert len(got) <= 5
    assert cleaned == [True]


def test_a_failure_while_a_stage_finishes_is_raised():
    with pytest.raises(TroubleError), Pipeline([("a", numbers(3)), ("b", fails_at_its_end)]) as pipeline:
        list(pipeline)


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_what_is_no_exception_arrives_as_well(problem):
    def bad(inbox):
        yield next(inbox)
        raise problem

    with pytest.raises(type(problem)), Pipeline([("a", numbers(9)), ("b", bad)]) as pipeline:
        list(pipeline)


def test_ending_early_finishes_what_is_under_way():
    closed = []

    def source(_inbox):
        try:
            yield from range(10**9)
        finally:
            closed.append(True)

    with Pipeline([("a", source), ("b", passes_on)]) as pipeline:
        got = []
        for item in pipeline:
            got.append(item)
            if item == 10:
                pipeline.end_early()
        assert pipeline.is_ending
    assert got == list(range(len(got)))
    assert 11 <= len(got) <= 11 + 2 * QUEUE_CAPACITY + 3
    assert closed == [True]


def test_leaving_in_the_middle_stops_the_stages():
    with pytest.raises(ZeroDivisionError), Pipeline([("a", numbers(10**9)), ("b", passes_on)]) as pipeline:
        for item in pipeline:
            _ = 1 / (item - 3)


def test_a_tick_comes_while_nothing_else_does():
    release = threading.Event()

    def source(_inbox):
        yield 1
        release.wait(10)
        yield 2

    got = []
    with Pipeline([("a", source)]) as pipeline:
        for item in pipeline.results(0.02):
            got.append(item)
            if got.count(None) == 3:
                release.set()
    assert [item for item in got if item is not None] == [1, 2]


def test_the_slowest_stage_is_named_and_waiting_is_no_work():
    def slow(inbox):
        for item in inbox:
            time.sleep(0.01)
            yield item

    with Pipeline([("fast", numbers(20)), ("slow", slow), ("idle", passes_on)]) as pipeline:
        for _ in pipeline:
            time.sleep(0.002)
    times = {stage.name: stage for stage in pipeline.times}
    assert pipeline.slowest.name == "slow"
    assert 10 <= times["slow"].ms_per_item < 20
    assert times["fast"].ms_per_item < 3
    assert times["idle"].ms_per_item < 3


def test_memory_stays_flat_over_many_frames():
    def frames(_inbox):
        for _ in range(50_000):
            yield np.empty((8, 8, 3), np.uint8)

    tracemalloc.start()
    try:
        with Pipeline([("a", frames), ("b", passes_on), ("c", passes_on)]) as pipeline:
            for number, _ in enumerate(pipeline):
                if number == 5000:
                    before = tracemalloc.get_traced_memory()[0]
        assert number == 49_999
        assert tracemalloc.get_traced_memory()[0] - before < 100_000  # a leak of 3 bytes a frame would show
    finally:
        tracemalloc.stop()
