"""Without CuPy, PyCUDA or a GPU there is one clear line, importing loads neither, and the first that works is taken."""

from __future__ import annotations

import builtins
import contextlib
import os
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from yolotrt.cuda import device as device_module
from yolotrt.cuda.device import LIBRARY_VARIABLE, CupyDevice, Lines, PycudaDevice, find_device
from yolotrt.errors import BackendUnavailableError, InputError


def test_importing_loads_no_gpu_library():
    code = "import sys, yolotrt.cuda.device, yolotrt.cuda.kernels; print({'cupy', 'cuda', 'pycuda'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_missing_cupy_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendUnavailableError, match=r"CuPy is not installed .*: install yolotrtx\[gpu\]") as caught:
        CupyDevice()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (ImportError("libnvrtc.so: cannot open shared object file"), "libnvrtc.so: cannot open shared object file"),
        (ImportError("=====\nFailed to import CuPy.\n\nOriginal error: ..."), "libcublas.so.12: cannot open"),
    ],
)
def test_cupy_that_cannot_be_imported_is_one_clear_line(monkeypatch, problem, reason):
    if "\n" in str(problem):  # as CuPy raises it
        problem.__cause__ = ImportError("libcublas.so.12: cannot open")
    monkeypatch.setattr(builtins, "__import__", importing({"cupy": problem}))
    with pytest.raises(BackendUnavailableError) as caught:
        CupyDevice()
    assert str(caught.value) == f"CuPy is not installed ({reason}): install yolotrtx[gpu]"


def importing(failures: dict[str, Exception]):
    """An `__import__` that fails for some modules."""
    original = builtins.__import__

    def fake(name, *arguments, **options):
        if name in failures:
            raise failures[name]
        return original(name, *arguments, **options)

    return fake


@pytest.mark.parametrize("problem", [ImportError("No module named 'pycuda'"), OSError("libcuda.so.1: no such file")])
def test_missing_pycuda_is_one_clear_line(monkeypatch, problem):
    monkeypatch.setattr(builtins, "__import__", importing({"pycuda": problem, "pycuda.tools": problem}))
    with pytest.raises(BackendUnavailableError) as caught:
        PycudaDevice()
    assert str(caught.value) == f"PyCUDA is not installed ({problem}): install yolotrtx[pycuda]"


# --- CuPy and PyCUDA that are none -----------------------------------------------------------------------------------


class CudaError(Exception):
    """What both libraries raise."""


class FakeCupy(types.ModuleType):
    """As far as opening a GPU and handing out memory use it; writes down what is called."""

    def __init__(self, problem: Exception | None = None) -> None:
        super().__init__("cupy")
        self.problem = problem
        self.calls: list[object] = []
        runtime = types.SimpleNamespace(
            CUDARuntimeError=CudaError,
            getDeviceProperties=lambda index: {"name": b"H%d" % (100 + index)},
            memGetInfo=lambda: (3, 8),
            memsetAsync=lambda *arguments: self.calls.append(("memset", *arguments)),
            streamCaptureModeThreadLocal=1,
        )
        self.cuda = types.SimpleNamespace(
            runtime=runtime,
            driver=types.SimpleNamespace(CUDADriverError=type("CUDADriverError", (Exception,), {})),
            memory=types.SimpleNamespace(OutOfMemoryError=type("OutOfMemoryError", (Exception,), {})),
            Device=self._device,
            Stream=lambda **_: Stream(self.calls),
            alloc=self._alloc,
            alloc_pinned_memory=lambda size: memoryview(bytearray(size)),
        )

    def _device(self, index: int):
        if self.problem is not None:
            raise self.problem
        device = contextlib.nullcontext()
        device.compute_capability = "90" if index == 0 else "120"
        return device

    def _alloc(self, size: int):
        self.calls.append(("alloc", size))
        return types.SimpleNamespace(ptr=1024)


class FakePycuda:
    """The modules `pycuda`, `pycuda.driver` and `pycuda.tools`, as far as opening a GPU uses them."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.depth = 0
        self.calls: list[object] = []
        self.package, self.driver, self.tools = (
            types.ModuleType(f"pycuda{name}") for name in ("", ".driver", ".tools")
        )
        self.package.driver, self.package.tools = self.driver, self.tools
        self.driver.Error = CudaError

        def init() -> None:
            if problem is not None:
                raise problem

        self.driver.init = init
        self.driver.Device = lambda _: types.SimpleNamespace(
            name=lambda: "H100", compute_capability=lambda: (9, 0), retain_primary_context=lambda: self
        )
        self.driver.mem_get_info = lambda: (3, 8)
        self.driver.mem_alloc = self._alloc
        self.driver.Stream = lambda _: Stream(self.calls)
        self.driver.memset_d8_async = lambda address, value, size, stream: self.calls.append(
            ("memset", address, value, size, stream.ptr)
        )
        self.tools.PageLockedMemoryPool = lambda: types.SimpleNamespace(allocate=np.empty)

    def _alloc(self, size: int) -> int:
        self.calls.append(("alloc", size))
        return 4096

    def push(self) -> None:
        self.depth += 1

    def pop(self) -> None:
        self.depth -= 1


@pytest.fixture
def libraries(monkeypatch):
    """Makes the libraries present, absent (None) or broken (an exception)."""
    monkeypatch.setattr(device_module, "_open", {})
    monkeypatch.setattr(device_module, "_DriverCalls", lambda: None)
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)

    def choose(cupy: FakeCupy | None, pycuda: FakePycuda | None) -> None:
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        for name in ("", ".driver", ".tools"):
            module = None if pycuda is None else getattr(pycuda, name.strip(".") or "package")
            monkeypatch.setitem(sys.modules, f"pycuda{name}", module)

    return choose


@pytest.mark.parametrize(
    ("present", "variable", "library", "found"),
    [
        ("both", "", None, "cupy"),  # the default
        ("pycuda", "", None, "pycuda"),  # where CuPy is not there
        ("both", "pycuda", None, "pycuda"),
        ("both", "pycuda", "cupy", "cupy"),  # the argument comes before the variable
        ("cupy", "", "cupy", "cupy"),
    ],
)
def test_the_first_library_that_works_is_taken(libraries, monkeypatch, present, variable, library, found):
    libraries(FakeCupy() if present in ("both", "cupy") else None, FakePycuda() if present != "cupy" else None)
    monkeypatch.setenv(LIBRARY_VARIABLE, variable)
    device = find_device(library=library)
    assert device.library == found
    assert (device.index, device.name, device.capability) == (0, "H100", (9, 0))
    assert device.memory_info() == (3, 8)
    assert find_device(library=library) is device


@pytest.mark.parametrize(
    ("cupy", "pycuda", "library", "message"),
    [
        (None, None, None, r"^CuPy is not installed \(.*\): install yolotrtx\[gpu\]$"),
        (FakeCupy(), None, "pycuda", r"^PyCUDA is not installed \(.*\): install yolotrtx\[pycuda\]$"),
        (
            FakeCupy(CudaError("cudaErrorNoDevice: no CUDA-capable device is detected")),
            None,
            None,
            r"^GPU 0 cannot be used \(cudaErrorNoDevice: no .* detected\): check the driver with nvidia-smi$",
        ),
        (
            None,
            FakePycuda(CudaError("cuInit failed: no device")),
            "pycuda",
            r"^GPU 0 cannot be used \(cuInit failed: no device\): check the driver with nvidia-smi$",
        ),
        (  # CuPy is there and its trouble is the GPU's: PyCUDA's absence is no news
            FakeCupy(CudaError("cudaErrorInsufficientDriver")),
            None,
            None,
            "^GPU 0 cannot be used .cudaErrorInsufficientDriver.: check the driver",
        ),
        (  # CuPy is not there, and the library that is cannot use the GPU
            None,
            FakePycuda(CudaError("cuInit failed: no device")),
            None,
            "^GPU 0 cannot be used .cuInit failed: no device.: check the driver",
        ),
    ],
)
def test_where_none_works_there_is_one_clear_line(libraries, cupy, pycuda, library, message):
    libraries(cupy, pycuda)
    with pytest.raises(BackendUnavailableError, match=message):
        find_device(library=library)


def test_threads_that_look_for_a_gpu_at_once_get_the_same(libraries, monkeypatch):
    libraries(FakeCupy(), None)

    def open_slowly(index: int) -> CupyDevice:
        time.sleep(0.05)
        return CupyDevice(index)

    monkeypatch.setitem(device_module.DEVICES, "cupy", open_slowly)
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(lambda _: find_device(), range(4)))) == 1


@pytest.mark.parametrize(("before", "after"), [(None, "32"), ("1", "1")])
def test_streams_get_queues_of_their_own_unless_the_user_says_otherwise(libraries, monkeypatch, before, after):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", before)
    libraries(FakeCupy(), None)
    find_device()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == after


@pytest.mark.parametrize("by_variable", [False, True])
def test_an_unknown_library_is_refused(libraries, monkeypatch, by_variable):
    libraries(FakeCupy(), None)
    if by_variable:
        monkeypatch.setenv(LIBRARY_VARIABLE, "jax")
    with pytest.raises(InputError, match="device library 'jax' is not known: choose one of cupy, pycuda"):
        find_device(library=None if by_variable else "jax")


def test_a_gpu_of_two_digits_has_its_capability(libraries):
    libraries(FakeCupy(), None)
    device = find_device(1)
    assert (device.index, device.name, device.capability) == (1, "H101", (12, 0))
    assert find_device(0) is not device


def test_cupys_memory_is_zeroed_before_other_streams_use_it(libraries):
    cupy = FakeCupy()
    libraries(cupy, None)
    device = find_device()
    memory = device.allocate(100)
    assert (memory.address, memory.size) == (1024, 100)
    zeroing = Stream.ptr
    # the pool is asked on a stream of our own: what other streams freed, and may still use, is not given to us
    assert cupy.calls == ["enter", ("alloc", 100), ("memset", 1024, 0, 100, zeroing), "exit", "synchronize"]
    assert device.allocate(0).size == 0
    assert cupy.calls[6] == ("alloc", 1)


def test_a_thread_that_has_used_the_gpu_needs_not_make_it_current(libraries):
    cupy = FakeCupy()
    cupy.cuda.runtime.getDevice = lambda: chosen
    libraries(cupy, None)
    device, chosen, seen = find_device(), 0, []
    assert not device.is_current()  # though the number is 0, as everywhere at first
    with device.current():
        pass
    assert device.is_current()
    thread = threading.Thread(target=lambda: seen.append(device.is_current()))
    thread.start()
    thread.join()
    assert seen == [False]
    chosen = 1
    assert not device.is_current()

    def failing() -> int:
        raise CudaError("illegal memory access")

    cupy.cuda.runtime.getDevice = failing
    assert not device.is_current()  # whatever is called next says so


def test_pycudas_context_is_always_made_current(libraries):
    libraries(None, FakePycuda())
    with find_device().current():
        assert not find_device().is_current()


def test_pycudas_memory_is_zeroed_without_waiting_for_other_streams(libraries):
    pycuda = FakePycuda()
    libraries(None, pycuda)
    with find_device().current():
        memory = find_device().allocate(100)
    assert (memory.address, memory.size) == (4096, 100)
    assert pycuda.calls == [("alloc", 100), ("memset", 4096, 0, 100, Stream.ptr), "synchronize"]


@pytest.mark.parametrize("library", ["cupy", "pycuda"])
@pytest.mark.parametrize("size", [0, 1, 100])
def test_page_locked_memory_has_the_asked_size(libraries, library, size):
    libraries(FakeCupy(), FakePycuda())
    memory = find_device(library=library).page_locked(size)
    assert (memory.shape, memory.dtype) == ((size,), np.uint8)
    memory[:] = 1


def test_pycudas_context_is_left_as_it_was(libraries):
    pycuda = FakePycuda()
    libraries(None, pycuda)
    device = find_device()
    assert pycuda.depth == 0
    with contextlib.suppress(KeyError), device.current():
        assert pycuda.depth == 1
        raise KeyError
    assert pycuda.depth == 0


class Stream:
    """A stream that writes down what is done with it."""

    ptr = 7

    def __init__(self, calls: list[object] | None = None) -> None:
        self.calls: list[object] = [] if calls is None else calls

    def __enter__(self):
        self.calls.append("enter")
        return self

    def __exit__(self, *_):
        self.calls.append("exit")

    def synchronize(self):
        self.calls.append("synchronize")

    def begin_capture(self, mode):
        self.calls.append(f"begin {mode}")

    def end_capture(self):
        self.calls.append("end")
        return types.SimpleNamespace(launch=lambda _: self.calls.append("launch"))


def test_a_capture_ends_whatever_happens(libraries):
    libraries(FakeCupy(), None)
    device, stream = find_device(), Stream()
    device.capture(stream, lambda: stream.calls.append("work")).launch(stream)
    assert stream.calls == ["enter", "begin 1", "work", "end", "exit", "launch"]
    stream.calls.clear()

    def fail() -> None:
        raise CudaError("cannot be captured")

    with pytest.raises(CudaError, match="cannot be captured"):
        device.capture(stream, fail)
    assert stream.calls == ["enter", "begin 1", "end", "exit"]


class FakeDriver:
    """The CUDA driver as far as a capture calls it; writes down what is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        def call(*arguments: object) -> int:
            self.calls.append(name)
            if name in ("cuStreamEndCapture", "cuGraphInstantiateWithFlags"):
                arguments[name != "cuGraphInstantiateWithFlags"]._obj.value = 99
            return 0

        return call


def test_pycudas_capture_ends_and_leaves_no_graph_whatever_happens():
    calls = object.__new__(device_module._DriverCalls)
    driver = calls._driver = FakeDriver()
    graph = calls.capture(7, lambda: driver.calls.append("work"))
    begun = ["cuStreamBeginCapture_v2", "work", "cuStreamEndCapture"]
    assert driver.calls == [*begun, "cuGraphInstantiateWithFlags", "cuGraphDestroy"]
    del graph
    assert driver.calls[-1] == "cuGraphExecDestroy"
    driver.calls.clear()

    def fail() -> None:
        driver.calls.append("work")
        raise CudaError("cannot be captured")

    with pytest.raises(CudaError, match="cannot be captured"):
        calls.capture(7, fail)
    assert driver.calls == [*begun, "cuGraphDestroy"]


LINES = Lines(5760, 17280, 360)


def test_cupy_copies_lines_side_by_side(libraries):
    cupy = FakeCupy()
    cupy.cuda.runtime.memcpyHostToDevice = 1
    cupy.cuda.runtime.memcpy2DAsync = lambda *arguments: cupy.calls.append(arguments)
    libraries(cupy, None)
    find_device().upload_lines(4096, 512, LINES, Stream())
    assert cupy.calls == [(4096, 5760, 512, 17280, 5760, 360, 1, Stream.ptr)]


def test_pycuda_copies_lines_side_by_side():
    calls = object.__new__(device_module._DriverCalls)
    copies = []

    class Driver:
        @staticmethod
        def cuMemcpy2DAsync_v2(copy, stream):  # noqa: N802 - the driver's own name
            wanted = copy._obj
            copies.append({name: getattr(wanted, name) for name, _ in wanted._fields_ if getattr(wanted, name)})
            copies.append(stream.value)
            return 0

    calls._driver = Driver
    calls.upload_lines(4096, 512, LINES, 7)
    source = {"srcMemoryType": 1, "srcHost": 512, "srcPitch": 17280}
    target = {"dstMemoryType": 2, "dstDevice": 4096, "dstPitch": 5760}
    assert copies == [{**source, **target, "WidthInBytes": 5760, "Height": 360}, 7]
    offsets = [getattr(device_module._Copy2D, name).offset for name, _ in device_module._Copy2D._fields_]
    # CUDA_MEMCPY2D in cuda.h, on 64 bits: the memory types are ints with four bytes of padding
    assert offsets == [8 * index for index in range(16)]


@pytest.mark.parametrize("happened", [True, False])
def test_both_libraries_tell_whether_an_event_has_happened(libraries, happened):
    libraries(FakeCupy(), FakePycuda())
    assert find_device(library="cupy").has_happened(types.SimpleNamespace(done=happened)) is happened
    assert find_device(library="pycuda").has_happened(types.SimpleNamespace(query=lambda: happened)) is happened
