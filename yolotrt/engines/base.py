"""What every backend offers: building a plan, and running it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.engines.file import EngineFile, EngineHeader, TensorInfo
from yolotrt.errors import InputError
from yolotrt.weights import Weights

PRECISIONS = ("fp32", "fp16")
MAX_BATCH = 1024


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine.

    Attributes:
        precision: ``fp32`` or ``fp16``; None takes the backend's default.
        imgsz: Network input height and width in pixels; None takes the model's own.
        min_batch: Smallest batch.
        opt_batch: The batch that the engine is made fastest for.
        max_batch: Largest batch. The batch is static where it equals `min_batch`.
        workspace_mib: Limit on TensorRT's scratch memory in MiB; None leaves it to TensorRT.
    """

    precision: str | None = None
    imgsz: tuple[int, int] | None = None
    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 1
    workspace_mib: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: if one is out of range.
        """
        if self.precision is not None and self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is not known: choose one of {', '.join(PRECISIONS)}")
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch <= MAX_BATCH:
            raise InputError(
                f"batch sizes {self.min_batch}, {self.opt_batch}, {self.max_batch} are not in order: "
                f"choose 1 <= min <= opt <= max <= {MAX_BATCH}"
            )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InputError(f"workspace of {self.workspace_mib} MiB: choose at least 1")

    @property
    def is_dynamic(self) -> bool:
        """Whether the batch may vary from call to call."""
        return self.min_batch != self.max_batch


@dataclass(frozen=True)
class Plan:
    """What a backend built.

    Attributes:
        data: The serialized plan.
        inputs: The network's inputs.
        outputs: The network's outputs, finest level first.
        device_name: GPU that it was built on or for; empty for a CPU.
        compute_capability: Of that GPU; empty for a CPU.
    """

    data: bytes
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    device_name: str = ""
    compute_capability: str = ""


class Session(abc.ABC):
    """An engine ready to run. Use it from one thread at a time; open one session a thread.

    Attributes:
        header: The engine's description.
    """

    header: EngineHeader

    @abc.abstractmethod
    def run(self, images: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Compute the raw heads of a batch.

        Args:
            images: float32 (batch, 3, height, width), RGB in 0..1, letterboxed to the engine's size.

        Returns:
            Per level, finest first: float32 (batch, anchors x (5 + classes), height / stride, width / stride), raw
            values before the sigmoid. The arrays belong to the session and hold until its next call.

        Raises:
            InputError: if the batch or the picture size is not one that the engine takes.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Free what the session holds; calling it twice is harmless."""

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_input(self, images: npt.NDArray[np.float32]) -> None:
        """Raise InputError unless `images` is a batch that the engine takes."""
        height, width = self.header.imgsz
        low, _, high = self.header.batch_range
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != (3, height, width):
            raise InputError(
                f"the engine takes float32 (batch, 3, {height}, {width}), not {images.dtype} {images.shape}: "
                "letterbox the pictures to the engine's size"
            )
        if not low <= images.shape[0] <= high:
            raise InputError(f"the engine takes {low} to {high} pictures a batch, not {images.shape[0]}")


class Backend(abc.ABC):
    """A library that builds and runs engines.

    Attributes:
        name: Its name on the command line.
        default_precision: The precision where none is asked for.
    """

    name: str
    default_precision: str

    @abc.abstractmethod
    def version(self) -> str:
        """Version of the library.

        Raises:
            BackendUnavailableError: if it is not installed.
        """

    @abc.abstractmethod
    def build(self, weights: Weights, options: BuildOptions) -> Plan:
        """Build a plan. `options` has a precision and an image size.

        Raises:
            BackendUnavailableError: if the library is not installed or its device is missing.
            BuildError: if the library fails.
        """

    @abc.abstractmethod
    def open(self, engine: EngineFile, **settings: Any) -> Session:
        """Open a session on an engine of this backend.

        Raises:
            BackendUnavailableError: if the library is not installed or its device is missing.
            EngineFileError: if the engine was made for another device or version.
        """


BackendFactory = Callable[[], Backend]
BackendTable = Mapping[str, BackendFactory]
