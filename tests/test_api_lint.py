"""Every name of TensorRT that the code uses exists in the versions that the code serves."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api_lint import Names, Use, unknown, uses
from tests.plugin.trt_bindings import ROOT, find_bindings

PACKAGE = ROOT / "yolotrt"
NAMES_SCRIPT = Path(__file__).with_name("trt_names.py")

RTX = "tensorrt_rtx"
LIBRARIES = ("8.6.1", "10.13.0.35", "11.4.0.106", RTX)

SERVES = {
    "engines/tensorrt.py": ("8.6.1", "10.13.0.35", "11.4.0.106"),
    "engines/tensorrt_rtx.py": (RTX,),
    "plugin/yololayer.py": ("10.13.0.35", "11.4.0.106"),
}
"""Modules that do not serve all libraries."""

EXCEPTIONS: dict[tuple[str, str, str], str] = {}
"""Names that a library lacks although the module serves it, and why that does no harm."""


@functools.cache
def library_names(library: str) -> Names:
    if library != RTX:
        return find_bindings(library).run(NAMES_SCRIPT, "tensorrt")
    if importlib.util.find_spec(RTX) is None:
        pytest.skip("tensorrt_rtx is not installed")
    command = [sys.executable, NAMES_SCRIPT]
    done = subprocess.run(command, input=json.dumps(RTX), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def modules() -> list[str]:
    """The modules that speak of a TensorRT library."""
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    return sorted(name for name, text in files.items() if re.search(r"\b_?trt\b", text))


def module_source(module: str) -> str:
    return (PACKAGE / module).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("module", "library"), [(module, library) for module in modules() for library in SERVES.get(module, LIBRARIES)]
)
def test_every_name_exists(module, library):
    expected = {name for of, version, name in EXCEPTIONS if (of, version) == (module, library)}
    missing = unknown(module_source(module), library_names(library))
    lines = [f"yolotrt/{module}:{use.line}: {use}" for use in missing if str(use) not in expected]
    assert not lines, f"not in {library}: guard with hasattr or getattr, or correct: {lines}"
    outdated = expected - {str(use) for use in missing}
    assert not outdated, f"take out of EXCEPTIONS, for {library} is served now: {outdated}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_uses_of_the_package_are_found(library):
    names = library_names(library)
    found = {str(use) for module in modules() for use in uses(module_source(module), names)}
    assert found >= {
        "trt.float16",
        "trt.Builder",
        "Builder.create_network",
        "INetworkDefinition.add_convolution_nd",
        "INetworkDefinition.mark_output",
        "IConvolutionLayer.stride_nd",
        "IResizeLayer.nearest_rounding",
        "IPoolingLayer.padding_nd",
        "ActivationType.HARD_SIGMOID",
        "IBuilderConfig.set_memory_pool_limit",
        "IOptimizationProfile.set_shape",
        "BuilderFlag.TF32",
        "ILogger.Severity.INTERNAL_ERROR",
    }


WRONG = [
    ("def f(trt: Any): return trt.Bilder", "trt.Bilder"),
    ("def f(trt: Any): return trt.BuilderFlag.TF23", "BuilderFlag.TF23"),
    ("class A:\n def f(self): return self._trt.DataType.FLOATS", "DataType.FLOATS"),
    ("def f(network: Any): return network.add_convolution", "INetworkDefinition.add_convolution"),
    ("class A:\n def f(self): self._network.add_padd", "INetworkDefinition.add_padd"),
    ("def f(network: Any):\n layer = network.add_resize(1)\n layer.scale = 2", "IResizeLayer.scale"),
    ("def f(network: Any): network.add_resize(1).get_output(0).dtypes", "ITensor.dtypes"),
    ("def f(trt: Any):\n b = trt.Builder(0)\n n = b.create_network(0)\n n.add_fully_connected", "INetworkDefinition."),
    ("def f(trt: Any):\n def g(config: Any): config.set_flag(trt.BuilderFlag.TF32s)", "BuilderFlag.TF32s"),
    ("def f(config: Any): config.max_workspace_size = 1", "IBuilderConfig.max_workspace_size"),
    ("def f(trt: Any): return getattr(trt.BuilderFlag, 'TF23')", "BuilderFlag.TF23"),
    ("def f(net, x): net.unary(x, 'name', 'SIGMOYD')", "ActivationType.SIGMOYD"),
    ("def f(x: Tensor): return x.sizes", "ITensor.sizes"),
    ("def f():\n trt = library()\n return trt.Bilder", "trt.Bilder"),
    ("def f(trtp: Any): return trtp.KernelLaunch", "plugin.KernelLaunch"),
    (
        "class A:\n"
        " def g(self): self._context.execute_async_v2()\n"
        " def f(self, runtime: Any):\n"
        "  self._engine = runtime.deserialize_cuda_engine(b'')\n"
        "  self._context = self._engine.create_execution_context()\n",
        "IExecutionContext.execute_async_v2",
    ),
    ("def f(trt: Any):\n if hasattr(trt, 'TF32'): pass\n return trt.BuilderFlag.TF23", "BuilderFlag.TF23"),
    ("def g(trt: Any): hasattr(trt, 'TF23')\ndef f(trt: Any): return trt.BuilderFlag.TF23", "BuilderFlag.TF23"),
]


@pytest.mark.parametrize(("source", "name"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_name_is_found(source, name):
    (use,) = unknown(source, library_names("11.4.0.106"))
    assert str(use).startswith(name)
    assert isinstance(use, Use)
    assert use.line in (1, 2, 3, 4)


RIGHT = [
    "def f(trt: Any): return trt.BuilderFlag.TF32, trt.__version__",
    "def f(trt: Any): return getattr(trt.BuilderFlag, 'TF23', None)",
    "def f(trt: Any):\n if hasattr(trt.BuilderFlag, 'TF23'): return trt.BuilderFlag.TF23",
    "def f(trt: Any):\n def g(config: Any): return hasattr(config, 'old') and config.old",
    "def f(engine: EngineFile, network: ModelGraph): return engine.header, network.layers",
    "def f(network: Any):\n layer = network.add_resize(1)\n layer = 1\n layer.real",
    "def f(trt: Any):\n config = make(trt)\n config.anything",
    "from yolotrt.network import recorder as trt_like\ntrt_like.anything",
]


@pytest.mark.parametrize("source", RIGHT)
def test_what_is_right_or_guarded_or_of_another_kind_is_accepted(source):
    assert unknown(source, library_names("11.4.0.106")) == []


def test_a_name_of_one_version_is_missing_in_another():
    source = "def f(network: Any): network.add_fully_connected"
    assert unknown(source, library_names("8.6.1")) == []
    assert [str(use) for use in unknown(source, library_names("10.13.0.35"))] == [
        "INetworkDefinition.add_fully_connected"
    ]
