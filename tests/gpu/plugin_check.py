"""The plugin's own PTX, launched as TensorRT would launch it, gives the reference's rows.

    python tests/gpu/plugin_check.py --write launches.json     # anywhere: what TensorRT's bindings get from the plugin
    python tests/gpu/plugin_check.py --launch launches.json    # on a GPU: CuPy launches just that

Exit status 1 if rows differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

from comparisons import decode_error, random_heads  # noqa: E402

from yolotrt.postprocess import YoloLayer  # noqa: E402

VERSIONS = ("10.13.0.35", "11.4.0.106")
BATCHES = (1, 4, 16)
LAST_PLACES = 8
"""Two expf may differ by some units in the last place, and three roundings follow."""


def write(path: Path) -> None:
    """Ask the plugin, in the bindings of every version, for its launches at several batch sizes."""
    from tests.plugin.test_yololayer import CASES, DRIVER
    from tests.plugin.trt_bindings import find_bindings

    cases = {name: case.request(batches=BATCHES) for name, case in CASES.items() if isinstance(case.batch, str)}
    answers = {version: find_bindings(version).run(DRIVER, {"cases": list(cases.values())}) for version in VERSIONS}
    content = [
        {"version": version, "name": name, "case": case, "launches": answer["launches"]}
        for version, report in answers.items()
        for (name, case), answer in zip(cases.items(), report["cases"], strict=True)
    ]
    path.write_text(json.dumps(content), encoding="utf-8")
    print(f"{path}: {len(content)} plugins")


def launch(path: Path) -> int:
    """Launch everything in the file; returns the exit status."""
    import cupy

    print(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    failed = False
    for entry in json.loads(path.read_text(encoding="utf-8")):
        worst, launches = 0.0, 0
        for wanted in entry["launches"]:
            for position, batch in enumerate(BATCHES):
                worst = max(worst, rows_error(cupy, entry["case"], wanted, position, batch))
                launches += 1
        wrong = not worst <= LAST_PLACES
        failed |= wrong
        label = f"TensorRT {entry['version']}, {entry['name']}: {launches} launches"
        print(f"{'FAIL' if wrong else 'ok  '} {label}, largest error {worst:.1f} units in the last place")
    return int(failed)


def rows_error(cupy: Any, case: dict[str, Any], wanted: dict[str, Any], position: int, batch: int) -> float:
    """Launch one kernel and compare its rows with the reference."""
    half = wanted["source"]["defines"]["HALF_HEADS"] == 1
    sizes = [tuple(sizes[2:]) for sizes, _ in case["heads"]]
    anchors = tuple(tuple(tuple(anchor) for anchor in level) for level in case["anchors"])
    layer = YoloLayer(anchors, case["strides"], case["class_count"])
    heads = random_heads(np.random.default_rng(batch), sizes, len(anchors[0]), case["class_count"], batch, half=half)
    expected = getattr(layer, case["variant"])([head.astype(np.float32) for head in heads])

    module = cupy.cuda.function.Module()
    module.load(wanted["ptx"].encode())
    buffers = [cupy.asarray(head) for head in heads]
    output = cupy.full(expected.shape, np.nan, np.float32)
    # the order that TensorRT documents: inputs, integers, outputs
    arguments = (*buffers, *map(np.int32, wanted["integers"][position]), output)
    kernel = module.get_function(wanted["kernel"])
    kernel(tuple(wanted["grid"][position]), tuple(wanted["block"]), arguments, wanted["shared_mem"])
    return decode_error(cupy.asnumpy(output), expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--write", type=Path, metavar="FILE")
    command.add_argument("--launch", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.write is not None:
        write(options.write)
        return 0
    return launch(options.launch)


if __name__ == "__main__":
    sys.exit(main())
