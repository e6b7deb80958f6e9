from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed")

import pyarrow as pa
import pyarrow.parquet as pq

from yolotrt import Detector
from yolotrt.cli import main
from yolotrt.distributed import items
from yolotrt.distributed import run as run_module
from yolotrt.distributed.cluster import WorkerLostError
from yolotrt.distributed.run import COLUMNS, DistributedRun, Settings, _Collected
from yolotrt.engines.file import EngineFile
from yolotrt.errors import EngineFileError, ImageError, InputError, OutputError
from yolotrt.media.frames import Span, host_memory
from yolotrt.media.video import read_video


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(items, "PICTURES_A_BLOCK", 3)
    monkeypatch.setattr(run_module, "_RETRY_PAUSE_S", 0.5)


def rows_of(folder: Path) -> list[dict]:
    rows = [row for path in (folder / "detections").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: (row["path"], row["frame"] or 0))


def plain_rows(engine: Path, pictures: Path) -> list[dict]:
    """What the detector says itself, in the form of the Parquet files."""
    rows = []
    with Detector(engine) as detector:
        empty = dict.fromkeys(COLUMNS) | {"engine": detector.engine.header.plan_sha256}
        for path in sorted(pictures.iterdir()):
            try:
                found = detector(path)
            except ImageError as error:
                rows.append(empty | {"path": str(path), "error": str(error)})
                continue
            height, width = found.image_size
            picture = empty | {"path": str(path), "height": height, "width": width}
            rows += [
                picture
                | {"class_id": index, "name": name, "confidence": score}
                | dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True))
                for box, score, index, name in found
            ] or [picture]
    return rows


def test_rows_are_those_of_the_detector_and_a_second_run_does_nothing(ray_cluster, engine_path, pictures, capsys):
    folder = pictures.parent / "out"
    arguments = ["-d", str(pictures), "--engine", str(engine_path), "--ray", "--out", str(folder)]
    assert main(arguments) == 1  # one picture is broken
    captured = capsys.readouterr()
    assert "broken.jpg is truncated" in captured.err
    assert "10 pictures: " in captured.out
    expected = plain_rows(engine_path, pictures)
    assert sum(row["class_id"] is not None for row in expected) > 20
    assert rows_of(folder) == expected
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(arguments) == 0
    assert "everything is done already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_only_what_is_missing_is_done(ray_cluster, engine_path, pictures, capsys):
    folder = pictures.parent / "out"
    settings = Settings("local", str(folder))
    DistributedRun(engine_path, [pictures], settings).execute()
    records = sorted((folder / "manifest").iterdir())
    (folder / "manifest" / records[1]).unlink()  # as if it was killed between the results and the record
    (pictures / "00.png").write_bytes((pictures / "0.png").read_bytes())  # and the blocks are cut elsewhere now
    untouched = {path: path.stat().st_mtime_ns for path in (records[0], records[2])}
    capsys.readouterr()
    DistributedRun(engine_path, [pictures], settings).execute()
    assert "items of 12 are done already" in capsys.readouterr().out
    assert rows_of(folder) == plain_rows(engine_path, pictures)
    assert untouched == {path: path.stat().st_mtime_ns for path in untouched}


@pytest.mark.slow
def test_a_lost_worker_costs_nothing(ray_cluster, engine_path, pictures, monkeypatch):
    """The process of a detector is killed after the first finished block, as the kernel does when memory ends."""
    folder = pictures.parent / "out"
    killed = []
    record = DistributedRun._record

    def record_and_kill(self, block, table):
        record(self, block, table)
        if not killed:
            killed.extend(worker_processes())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(DistributedRun, "_record", record_and_kill)
    for number in range(10, 40):  # enough that work is left when the first block is finished
        (pictures / f"{number}.png").write_bytes((pictures / f"{number % 10}.png").read_bytes())
    assert DistributedRun(engine_path, [pictures], Settings("local", str(folder), concurrency=1)).execute() == 1
    assert killed  # at work, when the run starts its block again, or idle, when Ray replaces it unnoticed
    assert rows_of(folder) == plain_rows(engine_path, pictures)


def worker_processes() -> list[int]:
    """This cluster's processes of detectors, which Ray names after their class."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (folder / "cmdline").read_bytes().startswith(b"ray::MapWorker") and os.getpid() in ancestors(folder):
                found.append(int(folder.name))
    return found


def ancestors(folder: Path) -> Iterator[int]:
    """Processes above one of /proc."""
    while folder.name != "0":
        parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        yield int(parent)
        folder = folder.parent / parent


def test_videos_are_rows_of_frames_whose_parts_meet(ray_cluster, engine_path, tmp_path, monkeypatch):
    monkeypatch.setattr(items, "SEGMENT_S", 0.3)
    video = tmp_path / "clip.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(25):
            picture = np.random.RandomState(index).randint(0, 256, (64, 96, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        container.mux(stream.encode(None))
    assert len(items.list_items([video], Span())) == 4
    folder = tmp_path / "out"
    settings = Settings("local", str(folder), annotate=True)
    assert DistributedRun(engine_path, [video], settings).execute() == 0
    rows = [row for row in rows_of(folder) if row["class_id"] is not None]
    with Detector(engine_path) as detector:
        expected = [
            (frame.index, frame.time_s, index, *map(float, box))
            for frame in read_video(video, host_memory)
            for box, _, index, _ in detector(frame.image)
        ]
    columns = ("frame", "time_s", "class_id", "x1", "y1", "x2", "y2")
    assert [tuple(row[name] for name in columns) for row in rows] == expected
    assert len(list((folder / "pictures").glob("clip_*.jpg"))) == 25


def test_an_engine_that_does_not_fit_a_machine_is_one_line_that_names_it(
    ray_cluster, engine_path, pictures, monkeypatch
):
    """The engine says another input rule than this version's, which only shows where it is opened."""
    engine = EngineFile.load(engine_path)
    other = EngineFile(replace(engine.header, letterbox={"pad_value": 0}), engine.plan, engine_path)
    with pytest.raises(
        EngineFileError, match=r"^machine [\d.]+: engine .* wants its pictures prepared by another rule"
    ):
        DistributedRun(other, [pictures], Settings("local", str(pictures.parent / "out"))).execute()


def test_a_run_without_progress_ends(engine_path, pictures, monkeypatch):
    attempts = []

    def lose(self, ray, blocks):
        attempts.append(len(blocks))
        raise WorkerLostError("a worker ran out of memory")
        yield

    run = DistributedRun(engine_path, [pictures], Settings("local", str(pictures.parent / "out")))
    monkeypatch.setattr(DistributedRun, "_finished", lose)
    import ray

    with pytest.raises(
        WorkerLostError, match=r"ran out of memory, 3 times without progress, 4 blocks left .*--concurr"
    ):
        run._work_off(ray, list(items.in_blocks(items.list_items([pictures], Span()))))
    assert attempts == [4, 4, 4]


def test_results_of_another_engine_are_not_mixed(engine_path, pictures):
    folder = pictures.parent / "out"
    DistributedRun(engine_path, [pictures], Settings("local", str(folder)))._claim_folder()
    other = Settings("local", str(folder), detector={"confidence": 0.5})
    with pytest.raises(OutputError, match="other thresholds: choose another --out"):
        DistributedRun(engine_path, [pictures], other)._claim_folder()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray", "127.0.0.1:1"], r"no Ray cluster answers at 127.0.0.1:1 \(.*refused\): start one"),
        (["--ray", "nowhere"], "'nowhere' is no address of a cluster: give local, auto or HOST:PORT"),
        (["--ray", "--save-txt"], "--save-txt has no effect with --ray"),
        (["--ray", "--gpus-per-worker", "1"], "runs on the CPU: leave out --gpus-per-worker"),
        (["--ray", "--stride", "2"], "no effect on pictures"),
        (["--concurrency", "2"], "--concurrency has no effect without --ray"),
    ],
)
def test_wrong_options_are_one_line(engine_path, pictures, capsys, monkeypatch, options, message):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    began = time.monotonic()
    status = main(["-d", str(pictures), "--engine", str(engine_path), "--out", str(pictures.parent / "out"), *options])
    assert status == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rtsp://camera/live", "is a live source, which has no end: run it without --ray"),
        ("0", "is a live source"),
        ("nothing://bucket/pictures", "cannot be opened .*check the URL"),
        ("memory://bucket/pictures", "holds no picture or video"),
    ],
)
def test_sources_that_cannot_be_listed_are_one_line(source, message):
    with pytest.raises(InputError, match=message):
        items.list_items([source], Span())


def test_a_block_is_complete_with_all_rows_of_all_pictures():
    def table(*rows):
        columns = {"position": [r[0] for r in rows], "found": [r[1] for r in rows], "total": [r[2] for r in rows]}
        schema = pa.schema([("position", pa.int64()), ("found", pa.int64()), ("total", pa.int64())])
        return pa.table(columns, schema)

    block = _Collected()
    for part in (table((1, 2, None)), table((2, 1, 2)), table((0, 1, None))):
        block.add(part)
        assert not block.is_complete
    block.add(table((1, 2, None)))
    assert block.is_complete
    assert block.table()["position"].to_pylist() == [0, 1, 1]


def test_names_of_annotated_pictures_are_unique(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(b"x")
    (tmp_path / "c" / "X_2.png").write_bytes(b"x")
    found = items.list_items([tmp_path / name for name in "abc"], Span())
    assert len({item.name.casefold() for item in found}) == len(found) == 4
