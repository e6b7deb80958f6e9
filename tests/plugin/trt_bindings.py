"""TensorRT's Python bindings of several versions, each importable in a process of its own, without TensorRT itself.

The wheels `tensorrt-cu12-bindings` hold only the bindings; they link against TensorRT's libraries, of which this module
builds stand-ins that have the needed symbols and do nothing. So everything works that the bindings do by themselves
(classes, enumerations, `tensorrt.plugin`), and nothing that needs a builder, a runtime or a GPU.

Each version gets a folder in the user's cache folder, made once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SET_UP_SECONDS = 60
TOOLS = ("gcc", "nm", "readelf")

WHEELS = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.13.0.35": "tensorrt-cu12-bindings==10.13.0.35",
    "11.4.0.106": "tensorrt-cu12-bindings==11.4.0.106",
}
NUMPY_1 = "numpy<2"
NEEDS_NUMPY_1 = ("8.6.1", "10.13.0.35")
"""TensorRT up to 10.15 misreads arrays of NumPy 2."""


@dataclass(frozen=True)
class Bindings:
    """A version of the bindings.

    Attributes:
        version: As in its `__version__`.
        folder: Where it lies: packages in `site` and `numpy`, libraries in `lib`.
    """

    version: str
    folder: Path

    def run(
        self,
        script: Path,
        request: Any = None,
        *,
        with_numpy_1: bool = True,
        variables: Mapping[str, str] | None = None,
    ) -> Any:
        """Run a script with these bindings; JSON goes to its standard input and is the last line of its output.

        Args:
            script: What to run.
            request: Its input.
            with_numpy_1: Whether versions that need NumPy 1 get it, rather than this interpreter's NumPy.
            variables: Further environment variables.
        """
        packages = [self.folder / "site", ROOT]
        if with_numpy_1 and self.version in NEEDS_NUMPY_1:
            packages.insert(0, self.folder / "numpy")
        environment = {
            **os.environ,
            **(variables or {}),
            "PYTHONPATH": os.pathsep.join(map(str, packages)),
            "LD_LIBRARY_PATH": os.pathsep.join(
                filter(None, (str(self.folder / "lib"), os.environ.get("LD_LIBRARY_PATH")))
            ),
        }
        done = subprocess.run(
            [sys.executable, script],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])  # `tensorrt.plugin` prints a line when it is imported


def find_bindings(version: str) -> Bindings:
    """The bindings of a version, set up at first use; skips the test where that is impossible."""
    try:
        return _set_up(version)
    except _SetUpError as problem:
        _failures[version] = problem
        pytest.skip(str(problem))


class _SetUpError(Exception):
    """Why there are no bindings."""


_failures: dict[str, _SetUpError] = {}
"""Versions that are not tried again in this process: without a network each try takes long."""


@functools.cache
def _set_up(version: str) -> Bindings:
    if version in _failures:
        raise _failures[version]
    folder = _cache() / f"tensorrt-{version}-{sys.implementation.cache_tag}-{_recipe()}"
    if not folder.is_dir():
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise _SetUpError(f"TensorRT's bindings need {', '.join(missing)} to be set up")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "made"
            _install(WHEELS[version], made / "site")
            if version in NEEDS_NUMPY_1:
                _install(NUMPY_1, made / "numpy")
            _build_libraries(made / "site" / "tensorrt_bindings" / "tensorrt.so", made / "lib")
            _write_front_end(made / "site")
            _publish(made, folder)
    return Bindings(version, folder)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "yolotrt-tests"


def _recipe() -> str:
    """Changes whenever this file does, so that an older folder is not used."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def _install(requirement: str, folder: Path) -> None:
    """Put a wheel into a folder, without what it depends on."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--retries",
        "1",
        "--timeout",
        "10",
        "--no-compile",
        "--only-binary",
        ":all:",
        "--target",
        str(folder),
        requirement,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SET_UP_SECONDS)
    except subprocess.TimeoutExpired:
        raise _SetUpError(f"pip did not get {requirement} within {SET_UP_SECONDS} s") from None
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise _SetUpError(f"pip cannot get {requirement}: {reasons[-1]}")


def _build_libraries(extension: Path, folder: Path) -> None:
    """Libraries with the names and symbols that the extension module is linked to; each function returns null."""
    folder.mkdir(parents=True)
    source = folder / "functions.c"
    source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in _missing_symbols(extension)))
    needed = re.findall(r"\(NEEDED\).*\[(libnv[\w.]+)\]", _output("readelf", "--dynamic", "--wide", extension))
    for library in needed:
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source], check=True
        )


def _missing_symbols(extension: Path) -> list[str]:
    """What TensorRT's libraries would provide: neither Python's symbols nor versioned ones of the C libraries."""
    lines = _output("nm", "--dynamic", "--undefined-only", extension).splitlines()
    names = [line.split()[-1] for line in lines if line.split()[-2] == "U"]
    return [name for name in names if "@" not in name and not re.match(r"_?Py|dl|pthread", name)]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _write_front_end(site: Path) -> None:
    """The package `tensorrt`, which users import."""
    package = site / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text("from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n")
    if (site / "tensorrt_bindings" / "plugin").is_dir():
        (package / "plugin").mkdir()
        (package / "plugin" / "__init__.py").write_text("from tensorrt_bindings.plugin import *\n")


def _publish(made: Path, folder: Path) -> None:
    """Move into place; another process may have been faster."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
