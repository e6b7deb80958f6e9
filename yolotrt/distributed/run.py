"""A run of -d on a Ray cluster that can be interrupted anywhere and goes on where it was.

Results lie in ``detections/BLOCK.parquet``. When all pictures of a block are there, its file is written, then a record
in ``manifest/BLOCK.json`` with the keys of its items. Both writes are atomic. A run begins by removing results
that were not recorded, and does all items that no record names: whatever was interrupted, each row is there once.
"""

from __future__ import annotations

import io
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from yolotrt.distributed.cluster import (
    WorkerLostError,
    connected,
    one_line_errors,
    show_bars_on_a_terminal,
)
from yolotrt.distributed.items import Block, in_blocks, list_items
from yolotrt.distributed.reading import MediaSource
from yolotrt.distributed.storage import Storage
from yolotrt.distributed.worker import detect, reserved_by
from yolotrt.engines.file import EngineFile
from yolotrt.errors import InputError, OutputError
from yolotrt.media.frames import Span
from yolotrt.shell import print_beside_progress, printable

PROGRAM = "yolotrt"
RUN_FILE = "run.json"
MANIFEST = "manifest"
DETECTIONS = "detections"
PICTURES = "pictures"

ATTEMPTS_WITHOUT_PROGRESS = 3
"""So often a run starts again after a loss if no block was finished in between."""
_RETRY_PAUSE_S = 5.0
"""In this time a cluster notices that a machine is gone (Ray's health checks fail after some seconds)."""
_ERRORS_SHOWN = 20

COLUMNS = (
    "path", "frame", "time_s", "width", "height", "class_id", "name", "confidence", "x1", "y1", "x2", "y2",
    "segmentation", "error", "engine",
)  # fmt: skip
"""Of the Parquet files. A picture without detections has a row without `class_id`, one that is broken an `error`."""


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        address: Of the cluster; see `connected`.
        folder: For results: a path that this machine can write to, or a URL.
        concurrency: Number of workers; None takes one a GPU, or as many as the CPUs give.
        gpus_per_worker: See `detect`.
        threads: CPU threads of a worker; None takes 1.
        annotate: Whether workers write annotated pictures, for which all need to have the folder.
        span: Which frames of videos.
        detector: `confidence`, `iou`, `max_detections`, `classes` and `agnostic` of `Detector`.
    """

    address: str
    folder: str
    concurrency: int | None = None
    gpus_per_worker: float | None = None
    threads: int | None = None
    annotate: bool = False
    span: Span = field(default_factory=Span)
    detector: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Tally:
    """What a run did."""

    pictures: int = 0
    failures: int = 0
    again: int = 0
    counts: Counter[str] = field(default_factory=Counter)


class DistributedRun:
    """Sources through the detectors of a cluster to Parquet files.

    Args:
        engine: The engine or its path.
        sources: See `list_items`.
        settings: How to run.

    Raises:
        InputError: if a source or an option cannot be used.
        EngineFileError: if the engine file cannot be used.
    """

    def __init__(self, engine: str | Path | EngineFile, sources: Sequence[str | Path], settings: Settings) -> None:
        self._engine = engine if isinstance(engine, EngineFile) else EngineFile.load(engine)
        self._settings = settings
        self._sources = sources
        self._storage = Storage(settings.folder)
        self._tally = _Tally()
        reserved_by(self._engine, settings.gpus_per_worker, settings.threads)

    def execute(self) -> int:
        """Do what is not done yet.

        Returns:
            The exit status: 0, or 1 if something could not be read.

        Raises:
            YolotrtError: if the run cannot go on; what is finished stays so.
        """
        items = list_items(self._sources, self._settings.span)
        self._claim_folder()
        self._remove_unrecorded()
        done = self._finished_items()
        blocks = list(in_blocks(item for item in items if item.key not in done))
        began = time.perf_counter()
        if not blocks:
            print(f"{self._settings.folder}: everything is done already ({_count_of(len(items), 'item')})")
            return 0
        if len(done):
            print(f"{_count_of(sum(item.key in done for item in items), 'item')} of {len(items)} are done already")
        with connected(self._settings.address) as ray:
            show_bars_on_a_terminal(ray)
            self._work_off(ray, blocks)
        self._summarise(time.perf_counter() - began)
        return 1 if self._tally.failures or self._tally.again else 0

    # --- what is finished ---

    def _claim_folder(self) -> None:
        """Write down what the folder holds results of.

        Raises:
            OutputError: if it holds others.
        """
        own = {
            "engine": self._engine.header.plan_sha256,
            "detector": self._settings.detector,
            "span": asdict(self._settings.span),
        }
        data = self._storage.read(RUN_FILE)
        if data is None:
            self._storage.write(RUN_FILE, json.dumps(own, indent=2).encode())
            return
        try:
            there = json.loads(data)
        except ValueError:
            there = None
        if there != json.loads(json.dumps(own)):
            raise OutputError(
                f"{self._settings.folder} holds results of another engine or other thresholds: choose another --out"
            )

    def _remove_unrecorded(self) -> None:
        """Remove results whose record is missing: their pictures are done again, perhaps in other blocks."""
        recorded = {Path(name).stem for name in self._storage.names(MANIFEST)}
        for name in self._storage.names(DETECTIONS):
            if Path(name).stem not in recorded:
                self._storage.remove(f"{DETECTIONS}/{name}")

    def _finished_items(self) -> set[str]:
        """Keys of the items of finished blocks."""
        keys: set[str] = set()
        for data in self._storage.contents(MANIFEST):
            try:
                keys.update(json.loads(data)["items"])
            except (ValueError, KeyError, TypeError) as problem:
                raise InputError(
                    f"{self._settings.folder}/{MANIFEST} holds a file that is no record of a block: remove it"
                ) from problem
        return keys

    # --- the work ---

    def _work_off(self, ray: Any, blocks: Sequence[Block]) -> None:
        """Finish all blocks; after a loss those that are left, on what is left of the cluster.

        Ray could try again by itself what a lost worker had in hand, but waits without end where the machines that are
        left have no room for the worker. One that was idle Ray may bring back: nothing waits for it.
        """
        left = {block.key: block for block in blocks}
        failures = 0
        while left:
            before = len(left)
            try:
                with one_line_errors(ray):
                    for key in self._finished(ray, list(left.values())):
                        del left[key]
            except WorkerLostError as error:
                failures = failures + 1 if len(left) == before else 1
                if failures >= ATTEMPTS_WITHOUT_PROGRESS:
                    raise WorkerLostError(self._gave_up(error, list(left.values()))) from error
                print_beside_progress(f"{PROGRAM}: {error}: going on with {_count_of(len(left), 'block')}")
                time.sleep(_RETRY_PAUSE_S)
            else:
                if left:
                    raise OutputError(f"{_count_of(len(left), 'block')} came back incomplete: run it again")

    def _gave_up(self, error: WorkerLostError, left: Sequence[Block]) -> str:
        """What to say when attempts come to nothing."""
        return (
            f"{error}, {ATTEMPTS_WITHOUT_PROGRESS} times without progress, {_count_of(len(left), 'block')} left "
            f"(first {left[0].label}): take fewer workers (--concurrency) or machines with more memory, then run the "
            "same command, which goes on here"
        )

    def _finished(self, ray: Any, blocks: Sequence[Block]) -> Iterator[str]:
        """Keys of blocks as they are finished and recorded."""
        by_key = {block.key: block for block in blocks}
        collected: dict[str, _Collected] = {}
        for table in self._results(ray, blocks):
            for key in pc.unique(table["block"]).to_pylist():
                parts = collected.setdefault(key, _Collected())
                parts.add(table.filter(pc.equal(table["block"], key)))
                if parts.is_complete:
                    self._record(by_key[key], collected.pop(key).table())
                    yield key

    def _results(self, ray: Any, blocks: Sequence[Block]) -> Iterator[pa.Table]:
        """Rows of all blocks, as they come."""
        settings = self._settings
        workers, readers = self._places(ray, len(blocks))
        dataset = ray.data.read_datasource(
            MediaSource(blocks),
            override_num_blocks=len(blocks),
            concurrency=readers.count,
            num_cpus=readers.cpus,
        )
        with warnings.catch_warnings():
            # there is no other way yet to say that what a lost worker had in hand fails at once, see _work_off
            warnings.filterwarnings("ignore", ".*ray_remote_args.*")
            results = detect(
                dataset,
                self._engine,
                concurrency=workers,
                gpus_per_worker=settings.gpus_per_worker,
                threads=settings.threads or 1,
                pictures=f"{settings.folder}/{PICTURES}" if settings.annotate else None,
                ray_options={"max_restarts": -1, "max_task_retries": 0},
                **settings.detector,
            )
        return iter(results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))

    def _places(self, ray: Any, blocks: int) -> tuple[int, _Readers]:
        """How many workers there are, and how many tasks read for them.

        Raises:
            InputError: if the cluster has no room for a worker, or not for as many as were asked for.
        """
        there = ray.cluster_resources()
        reserved = reserved_by(self._engine, self._settings.gpus_per_worker, self._settings.threads or 1)
        kinds = {"CPU": reserved["num_cpus"], "GPU": reserved.get("num_gpus", 0)}
        room = min(int(there.get(kind, 0) / amount) for kind, amount in kinds.items() if amount)
        asked = self._settings.concurrency
        if room < 1:
            needed = ", ".join(f"{amount:g} {kind}" for kind, amount in kinds.items() if amount)
            raise InputError(f"the cluster has no room for a worker ({needed}): add machines, or ask for less")
        on_cpu = not kinds["GPU"]
        usual = room - 1 if on_cpu and room > 2 else room
        workers = min(usual if asked is None else asked, room, blocks)
        if asked is not None and asked > room:
            print_beside_progress(f"{PROGRAM}: the cluster has room for {room} of {asked} workers: taking {room}")
        spare = int(there.get("CPU", 0) - workers * reserved["num_cpus"])
        # with no CPU to spare, readers share those of the workers: a reserved one would never come free
        return workers, _Readers(max(spare, 1), 1 if spare >= 1 else 0)

    def _record(self, block: Block, table: pa.Table) -> None:
        """Write a finished block, then that it is finished."""
        again = set(_keys_of(block, table.filter(pc.fill_null(table["again"], False))))
        self._check_store(block, again)
        if again:
            table = table.filter(pc.invert(pc.fill_null(table["again"], False)))
        self._count(table)
        columns = [name for name in COLUMNS if name in table.column_names]
        engine = pa.repeat(pa.scalar(self._engine.header.plan_sha256), len(table)).dictionary_encode()
        buffer = io.BytesIO()
        pq.write_table(table.select(columns).append_column("engine", engine), buffer)
        self._storage.write(f"{DETECTIONS}/{block.key}.parquet", buffer.getvalue())
        record = {
            "items": [item.key for item in block.items if item.key not in again],
            "first": block.items[0].source,
            "rows": len(table),
            "errors": pc.sum(pc.is_valid(table["error"])).as_py() or 0,
        }
        self._storage.write(f"{MANIFEST}/{block.key}.json", json.dumps(record).encode())

    def _check_store(self, block: Block, again: set[str]) -> None:
        """A store that gives nothing of a block would give nothing of the others.

        Raises:
            InputError: if nothing of the block could be had.
        """
        self._tally.again += len(again)
        if len(again) == len(block.items):
            raise InputError(
                f"nothing of {block.label} could be read from its store: check your rights to it and the network, then "
                "run the same command, which goes on here"
            )

    def _count(self, table: pa.Table) -> None:
        """Count pictures and classes; name the first errors."""
        errors = table.filter(pc.is_valid(table["error"]))
        for message in errors["error"].to_pylist()[: max(0, _ERRORS_SHOWN - self._tally.failures)]:
            print_beside_progress(f"{PROGRAM}: error: {message}")
        self._tally.failures += len(errors)
        self._tally.pictures += pc.count_distinct(table["position"]).as_py() - len(errors)
        for entry in pc.value_counts(table["name"].drop_null()).to_pylist():
            self._tally.counts[entry["values"]] += entry["counts"]

    def _summarise(self, seconds: float) -> None:
        """What was found, how long it took, where it is."""
        tally = self._tally
        counts = (f"{number} {printable(name)}" for name, number in tally.counts.most_common())
        print(f"{_count_of(tally.pictures, 'picture')}: {', '.join(counts) or 'nothing'}")
        print(f"{tally.pictures / seconds:.1f} pictures/s with starting the workers; {seconds:.1f} s")
        print(f"results: {printable(self._settings.folder)}/{DETECTIONS}")
        if tally.failures:
            print(f"{PROGRAM}: {_count_of(tally.failures, 'row')} with an error", file=sys.stderr)
        if tally.again:
            print(
                f"{PROGRAM}: {_count_of(tally.again, 'item')} could not be had from the store: run it again for them",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class _Readers:
    """Tasks that read at a time, and CPUs that each reserves."""

    count: int
    cpus: int


class _Collected:
    """What has come of a block."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._rows: Counter[int] = Counter()
        self._whole = 0
        self._total: int | None = None

    def add(self, table: pa.Table) -> None:
        """Rows of the block, in any order."""
        totals = table["total"].drop_null()
        if len(totals):
            self._total = totals[0].as_py()
            table = table.filter(pc.is_null(table["total"]))
        self._tables.append(table)
        positions, first, rows = np.unique(table["position"].to_numpy(), return_index=True, return_counts=True)
        for position, count, found in zip(positions, rows, table["found"].to_numpy()[first], strict=True):
            self._rows[int(position)] += int(count)
            self._whole += self._rows[int(position)] == found

    @property
    def is_complete(self) -> bool:
        """Whether all rows of all its pictures are there."""
        return self._total is not None and self._whole == self._total

    def table(self) -> pa.Table:
        """All rows, in the order of the pictures, each picture's best first."""
        table = pa.concat_tables(self._tables)
        order = np.argsort(table["position"].to_numpy(), kind="stable")
        return table.take(pa.array(order))


def _keys_of(block: Block, table: pa.Table) -> Iterable[str]:
    """Keys of the items that a table's rows belong to."""
    return (block.items[number].key for number in pc.unique(table["item"]).to_pylist())


def _count_of(number: int, what: str) -> str:
    """Such as ``1 picture`` or ``9 pictures``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
