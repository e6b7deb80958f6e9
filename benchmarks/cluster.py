"""What a Ray cluster gives: the same rows as a plain run, whatever is killed, and how it grows.

    python benchmarks/cluster.py pictures SOURCE_FOLDER pictures/ --count 2000
    python benchmarks/cluster.py kill yolov5n.engine pictures/
    python benchmarks/cluster.py speed yolov5n.engine pictures/ --limit 600

`pictures` makes many pictures of few, by cropping and scaling at random, and a broken one.
`kill` runs on two simulated machines (ray.cluster_utils), kills one in the middle, compares all rows with those of a
plain detector, and runs again. `speed` runs with one worker and with two, of one thread each, in turn; the time of a
run without its start is taken between the first and the last finished block.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster

from yolotrt import Detector
from yolotrt.distributed import items
from yolotrt.distributed.run import DETECTIONS, MANIFEST, DistributedRun, Settings
from yolotrt.errors import ImageError
from yolotrt.media.sources import expand_sources

POLL_S = 0.05


def make_pictures(options: argparse.Namespace) -> None:
    """Crops of random place and scale, JPEG and PNG in turn."""
    sources = [cv2.imread(str(path)) for path in expand_sources([str(options.source)]) if isinstance(path, Path)]
    sources = [picture for picture in sources if picture is not None]
    dice = random.Random(0)
    options.target.mkdir(parents=True)
    for number in range(options.count):
        picture = sources[number % len(sources)]
        height, width = picture.shape[:2]
        top, left = dice.randrange(height // 4), dice.randrange(width // 4)
        crop = picture[top : top + height * 3 // 4, left : left + width * 3 // 4]
        scaled = cv2.resize(crop, None, fx=(scale := dice.uniform(0.6, 1.4)), fy=scale)
        cv2.imwrite(str(options.target / f"{number:05}{'.png' if number % 10 == 9 else '.jpg'}"), scaled)
    whole = (options.target / "00000.jpg").read_bytes()
    (options.target / "00000.jpg").write_bytes(whole[: len(whole) // 2])


def kill(options: argparse.Namespace) -> None:
    """Two machines, of which one is lost."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)  # this program belongs to the machine that stays
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    folder = Path(tempfile.mkdtemp(prefix="yolotrt-cluster-"))
    threading.Thread(target=remove_at_half, args=(cluster, second, folder, options.pictures), daemon=True).start()
    try:
        run(options, folder, None)
        rows = read_rows(folder)
        expected = plain_rows(options.engine, options.pictures)
        print(f"{len(rows)} rows, a plain run has {len(expected)}; equal: {rows == expected}")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        run(options, folder, None)
        print(f"second run changed nothing: {before == {path: path.stat().st_mtime_ns for path in folder.rglob('*')}}")
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder)


def remove_at_half(cluster: Cluster, node: Any, folder: Path, pictures: Path) -> None:
    """Kill a machine when half of the blocks are finished."""
    half = len(list(pictures.iterdir())) // items.PICTURES_A_BLOCK // 2
    while len(list((folder / MANIFEST).glob("*.json"))) < half:
        time.sleep(POLL_S)
    cluster.remove_node(node, allow_graceful=False)
    print(f"one of two machines killed after {half} finished blocks", flush=True)


def speed(options: argparse.Namespace) -> None:
    """One worker and two, in turn."""
    items.PICTURES_A_BLOCK = 32  # many blocks, so that the ends of a run do not count
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for workers, measured in rates.items():
            folder = Path(tempfile.mkdtemp(prefix="yolotrt-cluster-"))
            run(options, folder, workers)
            measured.append(steady_rate(folder))
            shutil.rmtree(folder)
    for workers, measured in rates.items():
        print(f"{workers} workers: {', '.join(f'{rate:.1f}' for rate in measured)} pictures/s")
    print(f"ratio of the best: {max(rates[2]) / max(rates[1]):.2f}")


def steady_rate(folder: Path) -> float:
    """Pictures a second between the first and the last finished block."""
    records = sorted((path.stat().st_mtime, path) for path in (folder / MANIFEST).glob("*.json"))
    done = sum(len(json.loads(path.read_text())["items"]) for _, path in records[1:])
    return done / (records[-1][0] - records[0][0])


def run(options: argparse.Namespace, folder: Path, workers: int | None) -> None:
    """A distributed run."""
    sources = expand_sources([str(options.pictures)])[: options.limit]
    settings = Settings("local", str(folder), concurrency=workers)
    DistributedRun(options.engine, [str(source) for source in sources], settings).execute()


COMPARED = ("path", "class_id", "confidence", "x1", "y1", "x2", "y2", "error")


def read_rows(folder: Path) -> list[tuple[Any, ...]]:
    """All rows, in the order of the paths; each picture's keep theirs."""
    rows = pq.read_table(folder / DETECTIONS).select(COMPARED).to_pylist()
    return sorted((tuple(row.values()) for row in rows), key=lambda row: row[0])


def plain_rows(engine: Path, pictures: Path) -> list[tuple[Any, ...]]:
    """What a plain detector with one thread finds."""
    rows: list[tuple[Any, ...]] = []
    with Detector(engine, threads=1) as detector:
        for source in expand_sources([str(pictures.absolute())]):
            try:
                found = detector(source)
            except ImageError as error:
                rows.append((str(source), *(None,) * 6, str(error)))
                continue
            boxes = [(str(source), index, score, *map(float, box), None) for box, score, index, _ in found]
            rows += boxes or [(str(source), *(None,) * 7)]
    return sorted(rows, key=lambda row: row[0])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("pictures")
    making.set_defaults(function=make_pictures)
    making.add_argument("source", type=Path)
    making.add_argument("target", type=Path)
    making.add_argument("--count", type=int, default=2000)
    for name, function in (("kill", kill), ("speed", speed)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("engine", type=Path)
        command.add_argument("pictures", type=Path)
        command.add_argument("--limit", type=int)
        command.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
