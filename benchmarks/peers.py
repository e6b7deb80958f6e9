"""Other ways to run the same YOLOv5 model, on the same pictures, in turn, and their ratios to yolotrt.

    python benchmarks/peers.py yolov5n.engine pictures/ --onnx yolov5n.onnx --yolov5 ../yolov5 --threads 2

Each peer is a process of its own that holds its model and waits. In every round all of them go through all pictures,
one after the other, while the others are idle; a picture's time is from its file to boxes in its pixels. Peers:

- ``yolotrt``: `Detector(path)`.
- ``official``: the official YOLOv5 repository's own way of detect.py with an ONNX model: its `LoadImages`,
  `DetectMultiBackend`, `non_max_suppression` and `scale_boxes`, called as detect.py calls them; nothing is drawn or
  saved. `--yolov5` is a checkout, `--peer-python` an interpreter that has its requirements, `--onnx` what its export.py
  wrote.
- ``opencv``: OpenCV's dnn module with the same ONNX model, OpenCV's blobFromImage and its NMS by class.
- ``ultralytics``: the package ultralytics with a model of its own (`--ultralytics yolov5nu.pt`), another network of
  about the same cost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

CONFIDENCE = 0.25
IOU = 0.45
MAX_DETECTIONS = 300
SIZE = 640

Peer = Callable[[Sequence[str]], Iterator[int]]
"""Goes through pictures; yields the number of boxes of each as soon as they are there."""


# --- the peers; each runs in a process of its own ---


def yolotrt_peer(options: argparse.Namespace) -> Peer:
    """This project."""
    from yolotrt import Detector

    detector = Detector(
        options.engine, confidence=CONFIDENCE, iou=IOU, max_detections=MAX_DETECTIONS, threads=options.threads
    )

    def run(paths: Sequence[str]) -> Iterator[int]:
        for path in paths:
            yield len(detector(path))

    return run


def official_peer(options: argparse.Namespace) -> Peer:
    """The official repository's functions in the order of its detect.py."""
    sys.path.insert(0, str(options.yolov5))
    import torch
    from models.common import DetectMultiBackend
    from utils.dataloaders import LoadImages
    from utils.general import non_max_suppression, scale_boxes

    torch.set_num_threads(options.threads)
    model = DetectMultiBackend(str(options.onnx), device=torch.device("cpu"))
    model.warmup(imgsz=(1, 3, SIZE, SIZE))

    def run(paths: Sequence[str]) -> Iterator[int]:
        with torch.inference_mode():
            for _, picture, original, *_ in LoadImages(
                list(paths), img_size=(SIZE, SIZE), stride=model.stride, auto=model.pt
            ):
                batch = torch.from_numpy(picture).to(model.device).float()[None] / 255
                (boxes,) = non_max_suppression(model(batch), CONFIDENCE, IOU, max_det=MAX_DETECTIONS)
                boxes[:, :4] = scale_boxes(batch.shape[2:], boxes[:, :4], original.shape)
                yield len(boxes)

    return run


def opencv_peer(options: argparse.Namespace) -> Peer:
    """OpenCV alone: reading, letterbox, network and NMS."""
    import cv2
    import numpy as np

    cv2.setNumThreads(options.threads)
    network = cv2.dnn.readNetFromONNX(str(options.onnx))

    def run(paths: Sequence[str]) -> Iterator[int]:
        for path in paths:
            image = cv2.imread(path)
            height, width = image.shape[:2]
            ratio = min(SIZE / height, SIZE / width)
            scaled = cv2.resize(image, (round(width * ratio), round(height * ratio)))
            left, top = (SIZE - scaled.shape[1]) // 2, (SIZE - scaled.shape[0]) // 2
            canvas = cv2.copyMakeBorder(
                scaled,
                top,
                SIZE - scaled.shape[0] - top,
                left,
                SIZE - scaled.shape[1] - left,
                cv2.BORDER_CONSTANT,
                value=(114, 114, 114),
            )
            network.setInput(cv2.dnn.blobFromImage(canvas, 1 / 255, swapRB=True))
            rows = network.forward()[0]
            rows = rows[rows[:, 4] > CONFIDENCE]
            class_id = rows[:, 5:].argmax(axis=1) if len(rows) else np.zeros(0, int)
            score = rows[:, 4] * rows[np.arange(len(rows)), 5 + class_id]
            corners = (rows[:, :2] - rows[:, 2:4] / 2 - (left, top)) / ratio
            boxes = np.concatenate([corners, rows[:, 2:4] / ratio], axis=1)
            kept = cv2.dnn.NMSBoxesBatched(boxes.tolist(), score.tolist(), class_id.tolist(), CONFIDENCE, IOU)
            yield len(kept)

    return run


def ultralytics_peer(options: argparse.Namespace) -> Peer:
    """The package ultralytics with a model that it reads."""
    import torch
    from ultralytics import YOLO

    torch.set_num_threads(options.threads)
    model = YOLO(options.ultralytics)

    def run(paths: Sequence[str]) -> Iterator[int]:
        for path in paths:
            (result,) = model.predict(
                path, conf=CONFIDENCE, iou=IOU, max_det=MAX_DETECTIONS, imgsz=SIZE, verbose=False, device="cpu"
            )
            yield len(result.boxes)

    return run


PEERS: dict[str, Callable[[argparse.Namespace], Peer]] = {
    "yolotrt": yolotrt_peer,
    "official": official_peer,
    "opencv": opencv_peer,
    "ultralytics": ultralytics_peer,
}


def serve(options: argparse.Namespace) -> None:
    """A peer's process: a line of paths comes in, a line of milliseconds and box counts goes out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    peer = PEERS[options.serve](options)
    print(json.dumps({"ready": options.serve}), file=answers, flush=True)
    for line in sys.stdin:
        times, counts = [], []
        began = time.perf_counter()
        for count in peer(json.loads(line)):
            now = time.perf_counter()
            times.append((now - began) * 1e3)
            counts.append(count)
            began = now
        print(json.dumps({"times": times, "boxes": sum(counts)}), file=answers, flush=True)


# --- who asks them ---


class Child:
    """A peer in a process of its own."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.rounds: list[list[float]] = []
        self.boxes = 0
        own = name in {"yolotrt", "opencv"}
        python = sys.executable if own or options.peer_python is None else str(options.peer_python)
        environment = {**os.environ, "YOLOv5_AUTOINSTALL": "false", "YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}
        environment["PYTHONPATH"] = str(ROOT) if own else ""
        threads = str(options.threads)
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self._process = subprocess.Popen(
            [python, __file__, *sys.argv[1:], "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def wait_until_ready(self) -> bool:
        """Whether its model is loaded; False if it could not be."""
        assert self._process.stdout is not None
        return "ready" in self._process.stdout.readline()

    def ask(self, paths: Sequence[str]) -> dict[str, Any]:
        """Let it go through the pictures."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(paths), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} failed: run it again with --verbose")
        result: dict[str, Any] = json.loads(answer)
        return result

    @property
    def times(self) -> list[float]:
        """Milliseconds of every picture and round."""
        return [time for times in self.rounds for time in times]

    @property
    def rate(self) -> float:
        """Pictures a second over everything."""
        return len(self.times) / sum(self.times) * 1e3

    @property
    def undisturbed_rate(self) -> float:
        """Pictures a second if each took what it took in its fastest round: other work on the machine left out."""
        fastest = [min(times) for times in zip(*self.rounds, strict=True)]
        return len(fastest) / sum(fastest) * 1e3

    def close(self) -> None:
        """End its process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def main() -> None:
    """Measure all peers that were named and print one table."""
    options = parse()
    if options.serve:
        serve(options)
        return
    sys.path.insert(0, str(ROOT))
    from yolotrt.benchmark import pictures_of
    from yolotrt.markdown import write_section

    paths = [str(path.resolve()) for path in pictures_of(options.sources)]
    children = []
    for name in wanted(options):
        child = Child(name, options)
        if child.wait_until_ready():
            children.append(child)
        else:
            print(f"{name} is left out, it cannot be loaded: run again with --verbose to see why", file=sys.stderr)
    if not any(child.name == "yolotrt" for child in children):
        raise SystemExit("the engine cannot be loaded: check its path")
    try:
        for turn in range(-1, options.rounds):
            for child in children:
                result = child.ask(paths)
                if turn >= 0:
                    child.rounds.append(result["times"])
                    child.boxes = result["boxes"]
    finally:
        for child in children:
            child.close()
    text = report(children, options, len(paths))
    print(text)
    if options.markdown is not None:
        write_section(options.markdown, "peers", text)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, help="engine of the model")
    parser.add_argument("sources", nargs="+", help="pictures")
    parser.add_argument("--onnx", type=Path, help="the same model as the official export.py writes it")
    parser.add_argument("--yolov5", type=Path, help="checkout of the official repository")
    parser.add_argument("--peer-python", type=Path, help="interpreter with the official repository's requirements")
    parser.add_argument("--ultralytics", metavar="MODEL", help="model for the package ultralytics")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each peer")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds through all pictures, after one more")
    parser.add_argument("--markdown", type=Path, help="write the table into a section of this file, too")
    parser.add_argument("--verbose", action="store_true", help="show what the peers print")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def wanted(options: argparse.Namespace) -> list[str]:
    """The peers whose files were named."""
    named = {
        "yolotrt": True,
        "official": options.yolov5 is not None and options.onnx is not None,
        "opencv": options.onnx is not None,
        "ultralytics": options.ultralytics is not None,
    }
    return [name for name, is_named in named.items() if is_named]


def report(children: Sequence[Child], options: argparse.Namespace, pictures: int) -> str:
    """Header and table as Markdown."""
    from yolotrt.machine import describe_machine
    from yolotrt.markdown import table

    own = next(child for child in children if child.name == "yolotrt")
    rows = [
        [
            child.name,
            f"{statistics.median(child.times):.2f}",
            *(f"{statistics.quantiles(child.times, n=100)[percent - 1]:.2f}" for percent in (90, 99)),
            str(child.boxes),
            f"{child.rate:.1f}",
            f"{own.rate / child.rate:.2f}x",
            f"{child.undisturbed_rate:.1f}",
            f"{own.undisturbed_rate / child.undisturbed_rate:.2f}x",
        ]
        for child in children
    ]
    method = (
        f"{pictures} pictures, {options.rounds} rounds in turn after one to warm up, batch 1, {options.threads} threads"
        f" each, {SIZE} x {SIZE}, confidence {CONFIDENCE:g}, IoU {IOU:g}; from file to boxes, nothing drawn or saved"
    )
    facts = {**describe_machine(), "method": method}
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    head = [
        "peer",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "boxes",
        "pictures/s",
        "yolotrt to it",
        "undisturbed",
        "yolotrt to it",
    ]
    note = "Undisturbed: pictures a second if each took what it took in its fastest round."
    return "\n".join([*lines, "", table(head, rows), "", note])


if __name__ == "__main__":
    main()
