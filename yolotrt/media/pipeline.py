"""Stages in threads of their own, joined by bounded queues: decode, detect, draw and encode work at the same time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from yolotrt.shell import THREAD_PREFIX

QUEUE_CAPACITY = 4
"""Frames that wait between two stages: enough to even out unequal frames, few enough to keep memory small."""


class Aborted(BaseException):
    """Raised in a stage that waits while the pipeline stops. Not an Exception, which a stage may catch."""


class Inbox:
    """A bounded first-in-first-out queue with an end; iterate over it to receive.

    Args:
        capacity: Items that fit in before the sender waits.
    """

    def __init__(self, capacity: int = QUEUE_CAPACITY) -> None:
        self._items: deque[Any] = deque()
        self._capacity = capacity
        self._changed = threading.Condition()
        self._has_ended = False
        self._is_aborted = False

    def put(self, item: Any) -> None:
        """Add an item; wait while the queue is full.

        Raises:
            Aborted: if the pipeline stops.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_aborted or len(self._items) < self._capacity)
            self._check()
            self._items.append(item)
            self._changed.notify_all()

    def is_ready(self) -> bool:
        """Whether the next item, or the end, is there at once."""
        with self._changed:
            return bool(self._items) or self._has_ended or self._is_aborted

    def end(self) -> None:
        """No item will follow."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Drop what is inside; whoever waits here gets `Aborted`."""
        with self._changed:
            self._is_aborted = True
            self._items.clear()
            self._changed.notify_all()

    def _check(self) -> None:
        if self._is_aborted:
            raise Aborted

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.receive(None)

    def receive(self, timeout_s: float | None) -> Any:
        """The next item, or None if there is none for that long.

        Raises:
            StopIteration: after the last one.
            Aborted: if the pipeline stops.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._has_ended or self._is_aborted, timeout_s):
                return None
            self._check()
            if not self._items:
                raise StopIteration
            item = self._items.popleft()
            self._changed.notify_all()
            return item


class _TimedInbox(Inbox):
    """An inbox that notes how long its receiver waited."""

    waited_s = 0.0

    def receive(self, timeout_s: float | None) -> Any:
        """See `Inbox.receive`."""
        began = time.perf_counter()
        try:
            return super().receive(timeout_s)
        finally:
            self.waited_s += time.perf_counter() - began


StageFunction = Callable[[Inbox], Generator[Any, None, None]]
"""A generator function: takes items from its inbox and yields what the next stage gets. Its clean-up belongs into
`finally`; it also runs when the pipeline stops early."""


@dataclass
class StageTime:
    """How long one stage worked.

    Attributes:
        name: The stage.
        busy_s: Seconds at work, without waiting for its neighbours.
        items: Items that it gave on.
    """

    name: str
    busy_s: float = 0.0
    items: int = 0

    @property
    def ms_per_item(self) -> float:
        """Milliseconds of work an item."""
        return self.busy_s * 1e3 / max(self.items, 1)


class Pipeline:
    """Runs generator functions as a chain, each in a thread; iterate over it to get what the last one yields.

    Order is kept. At most `capacity` items wait between two stages, so memory stays flat, whichever stage is slow. The
    first exception of any stage stops all of them and is raised to the iterating thread once every stage has ended.

    Args:
        stages: Names and functions; the first gets an inbox that ends at once.
        capacity: Of each queue.

    Attributes:
        times: Per stage the time it worked so far.
    """

    def __init__(self, stages: Sequence[tuple[str, StageFunction]], *, capacity: int = QUEUE_CAPACITY) -> None:
        self.times = [StageTime(name) for name, _ in stages]
        self._inboxes = [_TimedInbox(capacity) for _ in range(len(stages) + 1)]
        self._inboxes[0].end()
        self._error: BaseException | None = None
        self._error_lock = threading.Lock()
        self._is_ending = False
        self._threads = [
            threading.Thread(target=self._work, args=(index, function), name=f"{THREAD_PREFIX}-{name}", daemon=True)
            for index, (name, function) in enumerate(stages)
        ]

    def end_early(self) -> None:
        """Take nothing more from the source; what is under way is finished. Safe to call in a signal handler."""
        self._is_ending = True

    @property
    def is_ending(self) -> bool:
        """Whether `end_early` was called; a source that waits looks at this now and then."""
        return self._is_ending

    @property
    def slowest(self) -> StageTime:
        """The stage with most work: the others wait for it."""
        return max(self.times, key=lambda stage: stage.busy_s)

    def __enter__(self) -> Pipeline:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abort()
        for thread in self._threads:
            thread.join()

    def __iter__(self) -> Iterator[Any]:
        """Yield what the last stage yields, in order; see `results`."""
        return self.results(None)

    def results(self, tick_s: float | None) -> Iterator[Any]:
        """Yield what the last stage yields, in order, and None whenever nothing came for `tick_s` seconds.

        Raises:
            BaseException: the first one that a stage raised.
        """
        outbox = self._inboxes[-1]
        with contextlib.suppress(Aborted, StopIteration):
            while True:
                yield outbox.receive(tick_s)
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _work(self, index: int, function: StageFunction) -> None:
        """Run one stage to its end."""
        inbox, outbox, stage = self._inboxes[index], self._inboxes[index + 1], self.times[index]
        began = time.perf_counter()
        given = 0.0
        try:
            with contextlib.closing(function(inbox)) as items:
                for item in items:
                    stage.items += 1
                    stage.busy_s = time.perf_counter() - began - given - inbox.waited_s
                    waiting = time.perf_counter()
                    outbox.put(item)
                    given += time.perf_counter() - waiting
                    if index == 0 and self._is_ending:
                        break
        except Aborted:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again to the thread that iterates
            self._fail(error)
        stage.busy_s = time.perf_counter() - began - given - inbox.waited_s
        outbox.end()

    def _fail(self, error: BaseException) -> None:
        """Note the first error and stop."""
        with self._error_lock:
            if self._error is None:
                self._error = error
        self._abort()

    def _abort(self) -> None:
        for inbox in self._inboxes:
            inbox.abort()
