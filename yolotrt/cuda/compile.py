"""From kernels/*.cu to device code: NVRTC at first use, then a cache on disk.

Sources are compiled where they run, so that no binary has to match a GPU or a driver. A compiled kernel is kept under
the user's cache folder, named by everything that it depends on.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from yolotrt.errors import BackendUnavailableError, BuildError, YolotrtError
from yolotrt.files import atomic_write

Defines = Mapping[str, int | str]
"""Macros that a kernel is compiled with, by name."""

PORTABLE_ARCHITECTURE = "compute_80"
"""Intermediate code for this runs on every GPU from Ampere on."""

# no contraction to FMA: the CPU reference rounds after every operation
_OPTIONS = ("--std=c++17", "--fmad=false")
_FOLDERS = (Path(__file__).parents[1] / "kernels", Path(__file__).parents[2] / "kernels")
"""Where the sources lie: in an installed package, and in a checkout."""

_DIGEST_BYTES = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


class UnsupportedArchitectureError(BuildError):
    """The installed NVRTC does not know the GPU's architecture."""


class Compiler(Protocol):
    """NVRTC, whichever package brings it."""

    @property
    def version(self) -> str:
        """Major and minor version, such as ``13.0``."""
        ...

    def compile(self, source: str, name: str, options: Sequence[str], *, cubin: bool) -> bytes:
        """Compile CUDA C to a CUBIN or to PTX.

        Raises:
            CompilationError: with NVRTC's log.
        """
        ...


class CompilationError(Exception):
    """NVRTC's log of a failed compilation; `compile_kernel` turns it into one line.

    Attributes:
        log: All that NVRTC wrote.
        invalid_option: Whether an option was refused, not the source.
    """

    def __init__(self, log: str, *, invalid_option: bool) -> None:
        super().__init__(log)
        self.log = log
        self.invalid_option = invalid_option


def kernel_source(name: str, defines: Defines) -> str:
    """The text of a kernel with its macros in front.

    Args:
        name: File name without folder and suffix, such as ``letterbox``.
        defines: Macros. They stand in the text, not among the options: values with commas survive every compiler.

    Raises:
        BackendUnavailableError: if the file is missing from the installation.
    """
    path = next((folder / f"{name}.cu" for folder in _FOLDERS if (folder / f"{name}.cu").is_file()), None)
    if path is None:
        raise BackendUnavailableError(f"the kernel source {name}.cu is not installed: install yolotrt again")
    macros = "".join(f"#define {key} {value}\n" for key, value in sorted(defines.items()))
    return f'{macros}#line 1 "{name}.cu"\n{path.read_text(encoding="utf-8")}'


def compile_kernel(name: str, defines: Defines, architecture: str, compiler: Compiler | None = None) -> bytes:
    """Compile a kernel, or take it from the cache.

    Args:
        name: As for `kernel_source`.
        defines: Macros.
        architecture: ``sm_90`` gives a CUBIN for that GPU, ``compute_80`` gives PTX for it and all later ones.
        compiler: NVRTC; by default the one that is installed.

    Raises:
        BackendUnavailableError: if NVRTC or the source is missing.
        UnsupportedArchitectureError: if NVRTC does not know `architecture`.
        BuildError: if the source does not compile; the message has the compiler's first error.
    """
    compiler = compiler or find_compiler()
    source = kernel_source(name, defines)
    key = "\0".join((compiler.version, architecture, *_OPTIONS, source))
    cubin = architecture.startswith("sm_")
    digest = hashlib.sha256(key.encode()).hexdigest()
    path = cache_folder() / f"{name}-{architecture}-{digest[:24]}.{'cubin' if cubin else 'ptx'}"
    code = _read_cached(path)
    if code is None:
        code = _compile(compiler, source, name, architecture, cubin=cubin)
        _write_cached(path, code)
    return code


def compile_for_device(name: str, defines: Defines, capability: tuple[int, int]) -> bytes:
    """Compile a kernel for the GPU at hand.

    Args:
        name: As for `kernel_source`.
        defines: Macros.
        capability: The GPU's compute capability, such as ``(9, 0)``.

    Returns:
        A CUBIN, or PTX where the installed NVRTC is older than the GPU: the driver then compiles the rest.
    """
    try:
        return compile_kernel(name, defines, f"sm_{capability[0]}{capability[1]}")
    except UnsupportedArchitectureError:
        if capability < (8, 0):
            raise
        return compile_kernel(name, defines, PORTABLE_ARCHITECTURE)


def cache_folder() -> Path:
    """Where compiled kernels are kept: $YOLOTRT_CACHE_DIR, or the user's cache folder."""
    chosen = os.environ.get("YOLOTRT_CACHE_DIR")
    if chosen:
        return Path(chosen) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return Path(base or Path.home() / ".cache") / "yolotrt" / "kernels"
    except RuntimeError:  # a user without a home folder
        return Path("/tmp") / f"yolotrt-{os.getuid()}" / "kernels"


def find_compiler() -> Compiler:
    """NVRTC as CuPy or cuda-bindings bring it.

    Raises:
        BackendUnavailableError: if neither is installed, or neither finds the library.
    """
    problems = []
    for candidate in (_BindingsCompiler, _CupyCompiler):
        try:
            return candidate()
        except Exception as problem:  # noqa: BLE001 - a broken installation raises anything, from OSError to RuntimeError
            problems.append(f"{candidate.package}: {_first_line(str(problem))}")
    raise BackendUnavailableError(
        f"NVRTC, which compiles the GPU kernels, was not found ({'; '.join(problems)}): "
        "install yolotrtx[gpu], or cuda-bindings and nvidia-cuda-nvrtc"
    )


class _BindingsCompiler:
    """NVRTC through NVIDIA's cuda-bindings."""

    package = "cuda-bindings"

    def __init__(self) -> None:
        nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
        self._nvrtc = nvrtc
        status, major, minor = nvrtc.nvrtcVersion()
        self._check(status)
        self.version = f"{major}.{minor}"

    def compile(self, source: str, name: str, options: Sequence[str], *, cubin: bool) -> bytes:
        nvrtc = self._nvrtc
        status, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
        self._check(status)
        try:
            (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
            if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                log = self._read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
                refused = status == nvrtc.nvrtcResult.NVRTC_ERROR_INVALID_OPTION
                raise CompilationError(log.decode(errors="replace"), invalid_option=refused)
            if cubin:
                return self._read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
            return self._read(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0")
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    def _read(self, program: Any, get_size: Any, get: Any) -> bytes:
        status, size = get_size(program)
        self._check(status)
        text = bytes(size)
        (status,) = get(program, text)
        self._check(status)
        return text

    def _check(self, status: Any) -> None:
        if status != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC failed: {status.name}")


class _CupyCompiler:
    """NVRTC through CuPy."""

    package = "CuPy"

    def __init__(self) -> None:
        _preload_nvrtc()
        from cupy.cuda import nvrtc

        self._nvrtc: Any = nvrtc
        self.version = ".".join(map(str, nvrtc.getVersion()))

    def compile(self, source: str, name: str, options: Sequence[str], *, cubin: bool) -> bytes:
        nvrtc = self._nvrtc
        program = nvrtc.createProgram(source, f"{name}.cu", (), ())
        try:
            try:
                nvrtc.compileProgram(program, tuple(options))
            except nvrtc.NVRTCError as problem:
                log = nvrtc.getProgramLog(program) or str(problem)
                raise CompilationError(log, invalid_option="INVALID_OPTION" in str(problem)) from None
            if cubin:
                return bytes(nvrtc.getCUBIN(program))
            return bytes(nvrtc.getPTX(program)).rstrip(b"\0")
        finally:
            nvrtc.destroyProgram(program)


def _preload_nvrtc() -> None:
    """Load NVRTC from NVIDIA's wheel, if it is there: older CuPy looks for it only among the system's libraries."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for name in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):
            for library in Path(folder).glob(f"*/lib/{name}"):
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _compile(compiler: Compiler, source: str, name: str, architecture: str, *, cubin: bool) -> bytes:
    options = (f"--gpu-architecture={architecture}", *_OPTIONS)
    try:
        return compiler.compile(source, name, options, cubin=cubin)
    except CompilationError as problem:
        if problem.invalid_option:
            raise UnsupportedArchitectureError(
                f"NVRTC {compiler.version} does not know {architecture}: install an NVRTC as new as the GPU"
            ) from problem
        raise BuildError(
            f"the kernel {name}.cu does not compile with NVRTC {compiler.version} for {architecture}: "
            f"{_first_error(problem.log)}: install yolotrt again, or report it"
        ) from problem


def _first_error(log: str) -> str:
    """The compiler's first error, in one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror\b", line)), lines[0] if lines else "no log was written")


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "no reason given"


def _read_cached(path: Path) -> bytes | None:
    """The cached code, or None if there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code = content[_DIGEST_BYTES:]
    if code and hashlib.sha256(code).digest() == content[:_DIGEST_BYTES]:
        return code
    _log.warning("the cached kernel %s is damaged and is compiled again", path)
    return None


def _write_cached(path: Path, code: bytes) -> None:
    """Keep the code; a cache that cannot be written only costs time."""
    try:
        with atomic_write(path) as file:
            file.write(hashlib.sha256(code).digest() + code)
    except YolotrtError as problem:
        _log.info("the compiled kernel is not kept: %s", problem)
