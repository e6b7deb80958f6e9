"""The GPU at hand, as far as a build must know it."""

from __future__ import annotations

from typing import Protocol

from yolotrt.engines.trt_log import NO_GPU_REMEDY
from yolotrt.errors import BackendUnavailableError, BuildError

MIN_FREE_MIB = 512
"""Below this not even TensorRT's own code and its first buffers fit; that more is needed it says by itself."""

MIB = 1 << 20

FIRST_WITH_TF32 = (8, 0)
"""CUDA C++ Programming Guide, compute capabilities: TF32 came with Ampere."""

FIRST_HARDWARE_COMPATIBLE = (8, 0)
"""TensorRT documentation, hardware compatibility: the level Ampere and later."""

FIRST_FOR_TENSORRT_10 = (7, 5)
"""TensorRT 10 and 11, support matrix: Turing; releases before 10.5 also had 7.0."""


class Gpu(Protocol):
    """A GPU.

    Attributes:
        name: As the driver calls it, such as ``NVIDIA H200``.
        capability: Compute capability, such as ``(9, 0)``.
    """

    name: str
    capability: tuple[int, int]

    def memory_info(self) -> tuple[int, int]:
        """Free and total memory in bytes."""
        ...


def find_gpu() -> Gpu:
    """The GPU that engines are built for and run on.

    Raises:
        BackendUnavailableError: if there is none that can be used; says why.
    """
    from yolotrt.cuda.device import find_device

    try:
        return find_device()
    except BackendUnavailableError as problem:
        raise BackendUnavailableError(f"no NVIDIA GPU is usable here ({problem}): {NO_GPU_REMEDY}") from problem


def dotted(capability: tuple[int, int]) -> str:
    """Such as ``9.0``."""
    return f"{capability[0]}.{capability[1]}"


def label(gpu: Gpu) -> str:
    """Name and compute capability, for messages."""
    return f"{gpu.name}, compute capability {dotted(gpu.capability)}"


def check_memory(gpu: Gpu) -> None:
    """Raise BuildError if a build cannot even begin."""
    free, total = (size // MIB for size in gpu.memory_info())
    if free < MIN_FREE_MIB:
        raise BuildError(
            f"{gpu.name} has {free} of {total} MiB free, a build needs at least {MIN_FREE_MIB}: "
            "end other programs on the GPU"
        )
