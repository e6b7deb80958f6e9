"""NVRTC at first use, the cache afterwards, one clear line otherwise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from yolotrt.cuda import compile as compiling
from yolotrt.cuda.compile import CompilationError, compile_for_device, compile_kernel, find_compiler, kernel_source
from yolotrt.cuda.kernels import yololayer_defines
from yolotrt.errors import BackendUnavailableError, BuildError

ANCHORS = (((10.0, 13.0), (16.0, 30.0)),)


class FakeCompiler:
    """Counts its calls; refuses architectures newer than sm_90."""

    def __init__(self, version: str = "13.0", log: str = "") -> None:
        self.version = version
        self.log = log
        self.calls: list[tuple[str, ...]] = []

    def compile(self, source, name, options, *, cubin):
        self.calls.append(tuple(options))
        if self.log:
            raise CompilationError(self.log, invalid_option=False)
        if "--gpu-architecture=sm_120" in options:
            raise CompilationError("nvrtc: error: invalid value for --gpu-architecture", invalid_option=True)
        return b"cubin" if cubin else b"ptx"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("YOLOTRT_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def compiler(monkeypatch) -> FakeCompiler:
    compiler = FakeCompiler()
    monkeypatch.setattr(compiling, "find_compiler", lambda: compiler)
    return compiler


@pytest.fixture
def nvrtc():
    try:
        return find_compiler()
    except BackendUnavailableError as problem:
        pytest.skip(str(problem))


def test_a_kernel_is_compiled_once(compiler, cache):
    for _ in range(3):
        assert compile_kernel("letterbox", {"HALF_OUTPUT": 0}, "sm_90") == b"cubin"
    assert len(compiler.calls) == 1
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


@pytest.mark.parametrize(
    "change", [{"defines": {"HALF_OUTPUT": 1}}, {"architecture": "sm_89"}, {"compiler": FakeCompiler("13.1")}]
)
def test_macros_architecture_and_compiler_version_are_part_of_the_key(compiler, change):
    arguments = {"defines": {"HALF_OUTPUT": 0}, "architecture": "sm_90", "compiler": compiler}
    compile_kernel("letterbox", **arguments)
    compile_kernel("letterbox", **{**arguments, **change})
    used = change.get("compiler", compiler)
    assert len(used.calls) == (1 if used is not compiler else 2)


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 100])
def test_a_damaged_cache_file_is_compiled_again(compiler, cache, damage):
    compile_kernel("letterbox", {}, "sm_90")
    (file,) = cache.iterdir()
    file.write_bytes(damage)
    assert compile_kernel("letterbox", {}, "sm_90") == b"cubin"
    assert len(compiler.calls) == 2
    assert file.read_bytes().endswith(b"cubin")


def test_a_cache_that_cannot_be_written_is_no_error(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("YOLOTRT_CACHE_DIR", str(tmp_path / "file"))
    assert compile_kernel("letterbox", {}, "sm_90") == b"cubin"


def test_a_gpu_that_nvrtc_does_not_know_gets_portable_code(compiler):
    assert compile_for_device("letterbox", {}, (12, 0)) == b"ptx"
    assert "--gpu-architecture=compute_80" in compiler.calls[-1]


def test_the_first_error_of_a_log_is_the_message(cache):
    log = 'letterbox.cu(3): warning #1: odd\n\nletterbox.cu(7): error: expected a ";"\nmore\n'
    with pytest.raises(BuildError, match=re.escape('for sm_90: letterbox.cu(7): error: expected a ";"')) as caught:
        compile_kernel("letterbox", {}, "sm_90", FakeCompiler(log=log))
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_a_missing_source_is_named():
    with pytest.raises(BackendUnavailableError, match=r"absent\.cu is not installed"):
        kernel_source("absent", {})


def test_no_nvrtc_is_one_clear_line(monkeypatch):
    class Missing:
        package = "nothing"

        def __init__(self) -> None:
            raise ImportError("No module named 'nothing'\nsecond line")

    monkeypatch.setattr(compiling, "_BindingsCompiler", Missing)
    monkeypatch.setattr(compiling, "_CupyCompiler", Missing)
    with pytest.raises(BackendUnavailableError, match=r"nothing: No module named 'nothing'; .*: install") as caught:
        find_compiler()
    assert "\n" not in str(caught.value)


def test_macros_with_commas_survive():
    source = kernel_source("yololayer", yololayer_defines(ANCHORS, (8,), 80, "best", half=True))
    assert "#define ANCHOR_SIZES 10.0f, 13.0f, 16.0f, 30.0f\n" in source


@pytest.mark.parametrize(
    ("name", "defines"),
    [
        ("letterbox", {"HALF_OUTPUT": 0}),
        ("letterbox", {"HALF_OUTPUT": 1}),
        ("nms", {}),
        ("nms", {"KEPT_ROWS": 1}),
        ("masks", {"ANCHORS": 3, "NC": 80, "MASKS": 32, "HALF_HEADS": 0}),
        ("masks", {"ANCHORS": 3, "NC": 80, "MASKS": 32, "HALF_HEADS": 1}),
        ("yololayer", yololayer_defines(ANCHORS, (8,), 80, "best", half=True, mask_count=32)),
        *(
            ("yololayer", yololayer_defines(ANCHORS * levels, (8,) * levels, 80, variant, half=half))
            for levels in (1, 2, 3, 4)
            for variant in ("best", "full")
            for half in (False, True)
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["compute_80", "sm_90"])
def test_nvrtc_compiles_every_kernel(nvrtc, name, defines, architecture):
    code = compile_kernel(name, defines, architecture, nvrtc)
    assert code.startswith(b"\x7fELF") if architecture == "sm_90" else b".target sm_80" in code


@pytest.mark.parametrize("levels", [1, 3, 4])
def test_the_plugin_kernel_takes_inputs_then_integers_then_outputs(nvrtc, levels):
    defines = yololayer_defines(ANCHORS * levels, (8,) * levels, 80, "best", half=False)
    ptx = compile_kernel("yololayer", defines, "compute_80", nvrtc).decode()
    parameters = re.search(r"\.entry\s+yololayer\s*\(([^)]*)\)", ptx)[1]
    # an ahead-of-time TensorRT plugin passes input pointers, then 32-bit integers, then output pointers
    types = re.findall(r"\.param\s+\.([a-z]\d+)(?:\s+\.ptr[^,]*?)?\s", parameters)
    assert types == ["u64"] * levels + ["u32"] * (2 + 2 * levels) + ["u64"]


def test_nvrtc_refuses_an_unknown_architecture_in_one_line(nvrtc):
    with pytest.raises(compiling.UnsupportedArchitectureError, match="does not know sm_999"):
        compile_kernel("nms", {}, "sm_999", nvrtc)


def test_nvrtc_reports_a_broken_source_in_one_line(nvrtc):
    with pytest.raises(BuildError, match=r"yololayer\.cu\(\d+\): error: identifier \"ANCHORS\""):
        compile_kernel("yololayer", {"LEVELS": 9}, "compute_80", nvrtc)
