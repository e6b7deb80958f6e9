"""The plugin gives TensorRT's own Python code the shapes, launches and device code that make the reference's rows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.kernels.comparisons import COCO_ANCHORS, COCO_STRIDES, decode_error, random_heads
from tests.kernels.host_device import COMPILER, HostMachine
from tests.plugin.trt_bindings import ROOT
from yolotrt.cuda.compile import find_compiler
from yolotrt.cuda.kernels import YOLOLAYER_BLOCK, Variant, yololayer_defines, yololayer_grid
from yolotrt.errors import BackendUnavailableError
from yolotrt.network import recorder
from yolotrt.plugin.yololayer import add_yololayer, plugin_unavailable_reason
from yolotrt.postprocess import YoloLayer

DRIVER = Path(__file__).with_name("drive_yololayer.py")
BATCHES = (1, 2, 3, 4)
P6_ANCHORS = (*COCO_ANCHORS, ((436.0, 615.0), (739.0, 380.0), (925.0, 792.0)))
P6_STRIDES = (8, 16, 32, 64)
SIZES = ((12, 20), (6, 10), (3, 5), (2, 3))  # 900 and 918 rows: no multiple of a block's 32

# As for the kernel by itself: two expf may differ by some units in the last place, and three roundings follow.
LAST_PLACES = 8


@dataclass(frozen=True)
class Case:
    """A network's heads and what YoloLayer is to make of them."""

    anchors: Any
    strides: tuple[int, ...]
    classes: int
    variant: Variant
    dtype: str = "float32"
    sizes: tuple[tuple[int, int], ...] = SIZES
    batch: int | str = "batch"

    @property
    def rows(self) -> int:
        return len(self.anchors[0]) * sum(height * width for height, width in self.sizes[: len(self.anchors)])

    @property
    def row_values(self) -> int:
        return 6 if self.variant == "best" else 5 + self.classes

    @property
    def batches(self) -> tuple[int, ...]:
        return BATCHES if isinstance(self.batch, str) else (self.batch,)

    def request(self, **changes: Any) -> dict[str, Any]:
        channels = len(self.anchors[0]) * (5 + self.classes)
        return {
            "anchors": self.anchors,
            "strides": self.strides,
            "class_count": self.classes,
            "variant": self.variant,
            "batches": self.batches,
            "heads": [[(self.batch, channels, *size), self.dtype] for size in self.sizes[: len(self.anchors)]],
            **changes,
        }


CASES = {
    "best": Case(COCO_ANCHORS, COCO_STRIDES, 80, "best"),
    "full": Case(COCO_ANCHORS, COCO_STRIDES, 80, "full", "float16"),
    "again": Case(COCO_ANCHORS, COCO_STRIDES, 80, "best", "float16"),
    "other-anchors": Case(tuple(reversed(COCO_ANCHORS)), (4, 8, 24), 3, "best"),
    "p6-best": Case(P6_ANCHORS, P6_STRIDES, 7, "best", "float16"),
    "p6-full": Case(P6_ANCHORS, P6_STRIDES, 2, "full"),
    "static-batch": Case(COCO_ANCHORS, COCO_STRIDES, 5, "best", batch=2),
    "one-level": Case(COCO_ANCHORS[:1], (8,), 1, "best"),
    "four-anchors": Case(tuple((*level, (1.5, 7.25)) for level in COCO_ANCHORS[:2]), (8, 16), 2, "full"),
    "yolov5-640": Case(COCO_ANCHORS, COCO_STRIDES, 80, "best", "float16", sizes=((80, 80), (40, 40), (20, 20))),
}


@dataclass(frozen=True)
class Wrong:
    """A request that is refused, by which error, and what its line says."""

    request: dict[str, Any]
    error: str
    message: str


def _heads(channels: int, *dtypes: str) -> list[Any]:
    return [[("batch", channels, *size), dtype] for size, dtype in zip(SIZES, dtypes, strict=False)]


GOOD = CASES["best"]
WRONG = {
    "variant": Wrong(
        GOOD.request(variant="fast"), "InputError", "variant 'fast' is not known: choose one of best, full"
    ),
    "no-class": Wrong(GOOD.request(class_count=0), "InputError", "for 0 classes: give at least one"),
    "strides": Wrong(GOOD.request(strides=(8, 16)), "InputError", "3 detection levels and 2 strides: "),
    "uneven": Wrong(
        GOOD.request(anchors=(*COCO_ANCHORS[:2], COCO_ANCHORS[2][:1])),
        "InputError",
        "the levels have 3, 3, 1 anchors: ",
    ),
    "heads": Wrong(
        GOOD.request(heads=_heads(255, *["float32"] * 2)), "NetworkError", "2 heads and 3 levels of anchors: "
    ),
    "channels": Wrong(
        GOOD.request(heads=_heads(254, *["float32"] * 3)), "NetworkError", "needs (batch, 255, height, width)"
    ),
    "mixed": Wrong(
        GOOD.request(heads=_heads(255, "float32", "float16", "float16")), "NetworkError", "of type FLOAT, HALF: "
    ),
    "int8": Wrong(GOOD.request(heads=_heads(255, *["int8"] * 3)), "NetworkError", "of type INT8: "),
    "refused": Wrong(GOOD.request(refuse=True), "NetworkError", "rows: the plugin was refused: build with YoloLayer"),
    "no-compiler": Wrong(
        GOOD.request(class_count=79, heads=_heads(252, *["float32"] * 3), no_compiler=True),
        "BackendUnavailableError",
        "NVRTC was not found: ",
    ),
}


@pytest.fixture(scope="session")
def report(bindings, tmp_path_factory) -> dict[str, Any]:
    """What TensorRT would have got for all cases, in one process."""
    try:
        find_compiler()
    except BackendUnavailableError as problem:
        pytest.skip(str(problem))
    requests = [*(case.request() for case in CASES.values()), *(wrong.request for wrong in WRONG.values())]
    cache = {"YOLOTRT_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    report = bindings.run(DRIVER, {"cases": requests}, variables=cache)
    return {**report, "cases": dict(zip([*CASES, *WRONG], report["cases"], strict=True))}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def result(report, case) -> dict[str, Any]:
    (name,) = (name for name, known in CASES.items() if known is case)
    result = report["cases"][name]
    assert "error" not in result, result
    return result


@pytest.fixture(scope="module")
def machine():
    """Runs kernels on the CPU."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER}) to build the kernels for the CPU")
    machine = HostMachine()
    yield machine
    machine.close()


def test_these_versions_can_host_the_plugin(report):
    assert report["reason"] == ""


def test_the_plugin_is_registered_on_use_once_a_number_of_levels(report):
    assert not report["on_import"]
    # most of the cases have three levels, each with its own anchors, classes or variant
    assert sorted(report["registered"]) == [f"yolotrt::yololayer{levels}" for levels in (1, 2, 3, 4)]


def test_all_heads_enter_one_layer(result, case):
    assert result["inputs"] == len(case.anchors)
    assert result["names"] == ["rows", "rows"]


def test_the_output_has_a_row_an_anchor_and_cell_for_every_batch_size(result, case):
    assert result["output_type"] == "FLOAT"
    assert result["output_shapes"] == [[batch, case.rows, case.row_values] for batch in case.batches]


def test_heads_are_all_float32_or_all_float16_and_rows_float32(result, case):
    levels = len(case.anchors)
    assert result["combinations"] == [[[kind, "LINEAR"]] * levels + [["FLOAT", "LINEAR"]] for kind in ("FLOAT", "HALF")]


def test_the_launch_geometry_is_that_of_the_kernel(result, case):
    for launch in result["launches"]:
        assert launch["grid"] == [[-(-case.rows // 32), batch, 1] for batch in case.batches]
        assert launch["grid"] == [list(yololayer_grid(case.rows, batch)) for batch in case.batches]
        assert tuple(launch["block"]) == YOLOLAYER_BLOCK
        assert launch["shared_mem"] == 0
        assert launch["tactics"] == []  # one kernel a combination: TensorRT passes tactic 0


def test_the_kernel_gets_batch_then_heights_and_widths_level_by_level_then_no_least_objectness(result, case):
    sides = [side for size in case.sizes[: len(case.anchors)] for side in size]
    minus_infinity = int(np.float32(-np.inf).view(np.int32))
    for launch in result["launches"]:
        assert launch["integers"] == [[batch, *sides, minus_infinity] for batch in case.batches]


def test_the_device_code_takes_heads_then_integers_then_rows(result, case):
    for launch in result["launches"]:
        parameters = re.search(rf"\.entry\s+{launch['kernel']}\s*\(([^)]*)\)", launch["ptx"])[1]
        types = re.findall(r"\.param\s+\.([a-z]\d+)(?:\s+\.ptr[^,]*?)?\s", parameters)
        assert types == ["u64"] * len(case.anchors) + ["u32"] * len(launch["integers"][0]) + ["u64"]


def test_the_device_code_is_portable_and_has_the_parameters_in_it(result, case):
    for launch, half in zip(result["launches"], (False, True), strict=True):
        defines = yololayer_defines(case.anchors, case.strides, case.classes, case.variant, half=half)
        assert launch["source"] == {"name": "yololayer", "defines": defines, "architecture": "compute_80"}


def test_the_kernel_launched_as_tensorrt_would_makes_the_reference_rows(result, case, machine):
    rng = np.random.default_rng(case.classes)
    layer = YoloLayer(case.anchors, case.strides, case.classes)
    sizes = case.sizes[: len(case.anchors)]
    for launch, half in zip(result["launches"], (False, True), strict=True):
        for index, batch in list(enumerate(case.batches))[::3]:  # batch 1 and 4
            heads = random_heads(rng, sizes, len(case.anchors[0]), case.classes, batch, half=half)
            rows = np.full(result["output_shapes"][index], np.nan, np.float32)
            run(machine, launch, index, heads, rows)
            expected = getattr(layer, case.variant)([head.astype(np.float32) for head in heads])
            assert rows.shape == expected.shape
            assert decode_error(rows, expected) <= LAST_PLACES


def run(machine: HostMachine, launch: dict[str, Any], index: int, heads: list[np.ndarray], rows: np.ndarray) -> None:
    """Launch the kernel as TensorRT does: inputs, integers, outputs (documentation of `aot_impl`, extra_args)."""
    source = launch["source"]
    function = machine.device.function(source["name"], launch["kernel"], source["defines"])
    integers = map(np.int32, launch["integers"][index])
    arguments = (*(np.uint64(head.ctypes.data) for head in heads), *integers, np.uint64(rows.ctypes.data))
    machine.device.launch(
        function, launch["grid"][index], launch["block"], arguments, shared_bytes=launch["shared_mem"]
    )


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_clear_line(report, name):
    result, wrong = report["cases"][name], WRONG[name]
    assert result["error"] == wrong.error
    assert wrong.message in result["message"]
    assert re.fullmatch(r".+: .+", result["message"])


def test_a_tensorrt_that_misreads_numpys_arrays_is_noticed(bindings, tmp_path):
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("needs NumPy 2")
    report = bindings.run(
        DRIVER, {"cases": [GOOD.request()]}, with_numpy_1=False, variables={"YOLOTRT_CACHE_DIR": str(tmp_path)}
    )
    if bindings.version.startswith("10.13"):
        assert report["reason"] == f"tensorrt {bindings.version} misreads the arrays of NumPy {np.__version__}"
        assert report["cases"][0]["error"] == "BackendUnavailableError"
        assert report["registered"] == []
    else:
        assert report["reason"] == ""


class _OldNetwork:
    """INetworkDefinition of TensorRT 8."""


class _NewNetwork:
    """INetworkDefinition of TensorRT 10 and 11."""

    add_plugin = None


def _library(version: str, network: type, name: str = "tensorrt", **names: Any) -> SimpleNamespace:
    return SimpleNamespace(__name__=name, __version__=version, INetworkDefinition=network, **names)


LIBRARIES = [
    (_library("8.6.1", _OldNetwork), "tensorrt 8.6.1 takes no plugins from Python"),
    (
        _library("10.8.0.43", _NewNetwork),
        "tensorrt 10.8.0.43 has no ahead-of-time plugins, which came with TensorRT 10.9",
    ),
    (_library("10.14.1.48", _NewNetwork, QuickPluginCreationRequest=None), "plugins of tensorrt 10.14.1.48 are broken"),
    (_library("1.7.1.116", _OldNetwork, "tensorrt_rtx"), "tensorrt_rtx 1.7.1.116 takes no plugins from Python"),
    (recorder, "yolotrt.network.recorder takes no plugins from Python"),
]


@pytest.mark.parametrize(("library", "reason"), LIBRARIES, ids=["8.6", "10.8", "10.14", "rtx", "recorder"])
def test_libraries_without_such_plugins_are_told_apart(library, reason):
    assert reason in plugin_unavailable_reason(library)
    with pytest.raises(BackendUnavailableError, match=r"^[^\n]+: build with YoloLayer outside the engine$"):
        add_yololayer(None, library, [], COCO_ANCHORS, COCO_STRIDES, 80, "best")


def test_tensorrt_rtx_itself_has_no_such_plugins():
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed", exc_type=ImportError)
    assert plugin_unavailable_reason(trt) == f"tensorrt_rtx {trt.__version__} takes no plugins from Python"


def test_importing_it_loads_no_tensorrt():
    code = "import json, sys, yolotrt.plugin.yololayer; print(json.dumps('tensorrt' in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) is False
