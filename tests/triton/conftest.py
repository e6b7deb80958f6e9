"""A real Triton server, where the package nvidia-pytriton, which carries one, can be found.

Its Python backend wants NumPy 1, which the environment of the tests does not have: the server gets one of its own,
named by YOLOTRT_TRITON_PYTHON, with nvidia-pytriton and what yolotrt needs. See docs/scale.md.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START_S = 60
PROBE = """
import cv2, numpy, onnxruntime, pathlib, pytriton, sys, sysconfig
assert int(numpy.__version__.split(".")[0]) < 2, "its NumPy is not 1"
version = f"{sys.version_info[0]}.{sys.version_info[1]}"
print(pathlib.Path(pytriton.__file__).parent, version, sysconfig.get_config_var("LIBDIR"))
"""


@dataclass
class Server:
    """Where a server listens."""

    http: str
    grpc: str
    metrics: str

    def metric(self, name: str, model: str) -> float:
        """A counter of a model."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model="{model}"'))


@pytest.fixture(scope="session")
def start_server(tmp_path_factory) -> Iterator[Callable[[Path], Server]]:
    """Starts a server on a model repository; it ends with the tests."""
    python = os.environ.get("YOLOTRT_TRITON_PYTHON", sys.executable)
    probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
    if probe.returncode:
        reason = probe.stderr.strip().splitlines()[-1]
        pytest.skip(f"no Triton server for {python} ({reason}): name one with YOLOTRT_TRITON_PYTHON")
    package, version, libraries = probe.stdout.split()
    home = tmp_path_factory.mktemp("triton")
    shutil.copytree(Path(package) / "tritonserver" / "backends", home / "backends")
    stub = Path(package) / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, home / "backends" / "python")
    bundled = Path(package).parent / "nvidia_pytriton.libs"
    environment = {
        **os.environ,
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "LD_LIBRARY_PATH": f"{libraries}:{bundled}",
    }
    running = []

    def start(repository: Path) -> Server:
        ports = free_ports(3)
        server = Server(*(f"127.0.0.1:{port}" for port in ports))
        log = home / f"{ports[0]}.log"
        options = [f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
        options += [f"--model-repository={repository}", f"--backend-directory={home / 'backends'}"]
        with log.open("w") as file:
            process = subprocess.Popen(
                [Path(package) / "tritonserver" / "bin" / "tritonserver", *options],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        running.append(process)
        deadline = time.monotonic() + START_S
        while not is_ready(server):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(log.read_text()[-3000:])
            time.sleep(0.1)
        return server

    yield start
    for process in running:
        process.terminate()
    for process in running:
        process.wait(30)


def is_ready(server: Server) -> bool:
    """Whether all models are loaded."""
    try:
        with urllib.request.urlopen(f"http://{server.http}/v2/health/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()
