from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import yolotrt

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(yolotrt.__file__).parent

HEAVY = ("cv2", "torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cupy", "pycuda", "supervision")
OPTIONAL = tuple(name for name in HEAVY if name != "cv2")


def python(code: str) -> str:
    """The output of a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of the modules `statement` imports."""
    return json.loads(
        python(f"import json, sys\n{statement}\nprint(json.dumps([m for m in {names} if m in sys.modules]))")
    )


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import yolotrt", HEAVY),
        ("import yolotrt.weights", HEAVY),
        ("from yolotrt import load_weights, Detections, YolotrtError", HEAVY),
        ("import yolotrt.cli", HEAVY),
        ("from yolotrt import Detector, build_engine, BuildOptions", OPTIONAL),
    ],
)
def test_importing_loads_nothing_heavy_before_its_time(statement, absent):
    assert loaded_by(statement, absent) == []


def test_the_check_above_sees_what_is_loaded():
    assert loaded_by("import yolotrt.media.images", HEAVY) == ["cv2"]


def test_every_module_can_be_imported_without_the_optional_packages():
    code = f"""
import importlib, pkgutil, sys
for name in {OPTIONAL}:
    sys.modules[name] = None
import yolotrt
for module in pkgutil.walk_packages(yolotrt.__path__, "yolotrt."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""
    imported = python(code).split()
    assert {"yolotrt.cli", "yolotrt.engines.onnx", "yolotrt.engines.tensorrt_rtx", "yolotrt.weights.wts"} <= {*imported}
    assert len(imported) > 20


@pytest.mark.parametrize("name", yolotrt.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(yolotrt, name)
    assert getattr(value, "__doc__", None)
    if name in yolotrt._HOMES:
        assert getattr(importlib.import_module(yolotrt._HOMES[name]), name) is value


def test_the_public_names_are_those_of_the_documentation():
    results = {"Detections", "Classification"}
    expected = {*results, "Detector", "build_engine", "load_weights", "BuildOptions", "YolotrtError", "__version__"}
    assert set(yolotrt.__all__) == expected
    assert set(yolotrt._HOMES) == expected - {"__version__"}
    star: dict[str, object] = {}
    exec("from yolotrt import *", star)
    assert expected <= set(star)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'yolotrt' has no attribute 'detector_'"):
        _ = yolotrt.detector_


def test_the_version_is_that_of_the_project_file():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared
    assert yolotrt.__version__ == declared[1]


def test_the_commands_of_the_project_file_exist():
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("[project.scripts]") :].split("\n[", maxsplit=1)[0]
    commands = dict(re.findall(r'^(\S+) = "(.+)"$', section, re.MULTILINE))
    assert set(commands) == {"yolotrt", "yolotrt-gen-wts"}
    for target in commands.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def source_files() -> list[Path]:
    folders = (PACKAGE, ROOT / "kernels")
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".cu", ".cuh", ".h"}]
    return [*found, ROOT / "gen_wts.py"]


def test_no_source_file_names_a_package_registry():
    # put together here, so that this file does not name one either
    hosts = ["py" + "pi.", "python" + "hosted.", "ana" + "conda.", "npm" + "js.", "crates" + ".io", "ngc." + "nvidia."]
    assert len(source_files()) > 20
    for path in source_files():
        text = path.read_text().lower()
        assert not [host for host in hosts if host in text], path


def test_no_source_file_imports_torch():
    for path in source_files():
        assert not re.search(r"^\s*(import|from) torch\b", path.read_text(), re.MULTILINE), path


def test_every_module_says_what_it_is_for():
    for path in PACKAGE.rglob("*.py"):
        assert path.read_text().startswith('"""'), path
