from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from yolotrt import Detector
from yolotrt.cli import main
from yolotrt.engines.file import EngineFile, TensorInfo
from yolotrt.errors import InputError
from yolotrt.postprocess import NmsOptions, YoloLayer, non_max_suppression
from yolotrt.triton.models import boxes_of_rows
from yolotrt.triton.repository import ServingOptions, export_repository, to_pbtxt, validate

GPU_HEADER = {"yololayer": "kernel", "backend": "tensorrt", "compute_capability": "9.0", "device_name": "NVIDIA H200"}


def gpu_engine(engine: EngineFile, **changes) -> EngineFile:
    """The header of an engine for a GPU, in fp16."""
    tensors = {
        kind: tuple(replace(info, dtype="float16") for info in getattr(engine.header, kind))
        for kind in ("inputs", "outputs")
    }
    return EngineFile(replace(engine.header, **GPU_HEADER, **tensors, **changes), engine.plan, engine.path)


@pytest.mark.parametrize("kind", ["onnx", "python", "gpu"])
def test_configurations_are_those_of_the_servers_own_messages(tmp_path, tiny_dynamic_engine, kind):
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    engine = gpu_engine(tiny_dynamic_engine) if kind == "gpu" else tiny_dynamic_engine
    export_repository(engine, tmp_path, ServingOptions("tiny", python_engine=kind == "python"))
    configs = {path.parent.name: validate(path.read_text()) for path in tmp_path.glob("*/config.pbtxt")}
    assert set(configs) == {"tiny", "tiny_letterbox", "tiny_engine", "tiny_boxes"}
    assert all(config.name == name for name, config in configs.items())
    network = configs["tiny_engine"]
    assert network.backend == {"onnx": "onnxruntime", "python": "python", "gpu": "tensorrt"}[kind]
    assert (tmp_path / "tiny_engine" / "1" / network.default_model_filename).is_file()
    assert network.max_batch_size == 4
    assert network.HasField("dynamic_batching")
    assert list(network.input[0].dims) == [3, 64, 64]
    assert network.input[0].data_type == (10 if kind == "gpu" else 11)  # TYPE_FP16, TYPE_FP32
    assert [list(tensor.dims) for tensor in network.output] == [[24, 8, 8], [24, 4, 4], [24, 2, 2]]
    # what a step gives is what the next one takes
    steps = configs["tiny"].ensemble_scheduling.step
    known = {tensor.name for tensor in configs["tiny"].input}
    for step in steps:
        model = configs[step.model_name]
        assert set(step.input_map) == {tensor.name for tensor in model.input}
        assert set(step.output_map) == {tensor.name for tensor in model.output}
        assert set(step.input_map.values()) <= known
        known |= set(step.output_map.values())
    assert {tensor.name for tensor in configs["tiny"].output} <= known


def test_a_configuration_that_the_server_would_refuse_is_refused():
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    with pytest.raises(InputError, match="no configuration"):
        validate(to_pbtxt({"name": "x", "max_batches": 3}))


def test_the_engine_of_the_repository_is_the_engine(tmp_path, tiny_dynamic_engine):
    export_repository(tiny_dynamic_engine, tmp_path)
    assert (tmp_path / "yolov5_engine" / "1" / "model.onnx").read_bytes() == tiny_dynamic_engine.plan
    assert (tmp_path / "yolov5" / "labels.txt").read_text() == "cat\ndog\nbird\n"
    options = json.loads((tmp_path / "yolov5_boxes" / "1" / "yolotrt.json").read_text())
    assert options == {"confidence": 0.25, "iou": 0.45, "max_detections": 300, "classes": None, "agnostic": False}


def test_rows_of_a_plan_with_yololayer_inside_give_the_same_boxes(tiny_dynamic_engine):
    model = tiny_dynamic_engine.header.model
    layer = YoloLayer(model.anchors, model.strides, len(model.names))
    random = np.random.RandomState(1)
    heads = [random.standard_normal((1, 24, size, size)).astype(np.float32) * 2 for size in (8, 4, 2)]
    for options in (NmsOptions(), NmsOptions(classes=(1,)), NmsOptions(agnostic=True, max_detections=5)):
        expected = non_max_suppression(layer.full(heads)[0], options)
        found = boxes_of_rows(layer.best(heads)[0], options)
        assert len(found) == len(expected) > 3
        np.testing.assert_array_equal(found.xyxy, expected.xyxy)
        np.testing.assert_array_equal(found.class_id, expected.class_id)


@pytest.mark.parametrize(
    ("change", "python_engine", "message"),
    [
        ({"task": "segment"}, False, "is for the task segment: the models for Triton give boxes only"),
        ({"backend": "tensorrt-rtx"}, False, "is for tensorrt-rtx, which Triton has no backend for"),
        ({"yololayer": "kernel"}, True, "is for a GPU, where Triton runs it itself"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tmp_path, tiny_engine, change, python_engine, message):
    task = change.pop("task", tiny_engine.header.model.task)
    header = replace(tiny_engine.header, model=replace(tiny_engine.header.model, task=task), **change)
    with pytest.raises(InputError, match=message):
        export_repository(
            EngineFile(header, tiny_engine.plan), tmp_path / "out", ServingOptions(python_engine=python_engine)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--triton-name", "a b"], "is no name of a model"),
        (["--triton-instances", "0"], "0 instances of each model: choose at least 1"),
        (["--conf", "2"], "--conf 2 is out of range"),
        (["--save-txt"], "--save-txt belongs to -d and has no effect on --export-triton"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, tiny_engine, capsys, arguments, message):
    tiny_engine.save(tmp_path / "tiny.engine")
    assert main(["--export-triton", str(tmp_path / "m"), "--engine", str(tmp_path / "tiny.engine"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "m").exists()


def test_the_command_writes_a_repository_and_says_where(tmp_path, tiny_engine, capsys):
    tiny_engine.save(tmp_path / "tiny.engine")
    arguments = ["--export-triton", str(tmp_path / "m"), "--engine", str(tmp_path / "tiny.engine"), "--classes", "dog"]
    assert main(arguments) == 0
    assert "m: model yolov5; how to serve it is in" in capsys.readouterr().out
    readme = (tmp_path / "m" / "README.md").read_text()
    assert tiny_engine.header.plan_sha256 in readme
    assert not re.search(r"\{\w+\}", readme)
    assert json.loads((tmp_path / "m" / "yolov5_boxes" / "1" / "yolotrt.json").read_text())["classes"] == [1]
    with Detector(EngineFile.load(tmp_path / "m" / "yolov5_letterbox" / "1" / "yolotrt.engine")) as detector:
        assert detector.class_names == ("cat", "dog", "bird")


def test_writing_a_repository_needs_no_tritonclient_and_no_ray(tmp_path, tiny_engine):
    tiny_engine.save(tmp_path / "tiny.engine")
    program = (
        "import sys; sys.modules.update({'tritonclient': None, 'ray': None, 'pyarrow': None});"
        "from yolotrt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--export-triton", str(tmp_path / "m"), "--engine", str(tmp_path / "tiny.engine")]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)


def test_types_of_tensors_are_named(tmp_path, tiny_engine):
    info = TensorInfo("images", "float16", (1, 3, 64, 64))
    header = replace(tiny_engine.header, inputs=(info,))
    export_repository(EngineFile(header, tiny_engine.plan), tmp_path)
    assert "TYPE_FP16" in (tmp_path / "yolov5_engine" / "config.pbtxt").read_text()
