"""What every backend offers: building a plan, and running it."""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.calibration.options import Int8Options
from yolotrt.engines.file import EngineFile, EngineHeader, TensorInfo
from yolotrt.errors import InputError
from yolotrt.network.quantize import Quantization
from yolotrt.postprocess import Boxes, NmsOptions, softmax
from yolotrt.preprocess import PAD_VALUE
from yolotrt.weights import Weights
from yolotrt.weights.model import MAX_IMAGE_SIZE

PRECISIONS = ("fp32", "tf32", "fp16", "int8")
MAX_BATCH = 1024
MAX_OPTIMIZATION_LEVEL = 5

Frame = Any
"""A picture, uint8 BGR (height, width, 3): a NumPy array, or an array in device memory."""

HOST = "host"
"""`Plan.yololayer` of plans that give raw heads, which NumPy decodes."""

KERNEL = "kernel"
"""`Plan.yololayer` of plans that give raw heads, which a kernel decodes right after the engine."""

PLUGIN = "plugin"
"""`Plan.yololayer` of plans that give decoded rows."""

AUTO_YOLOLAYER = "auto"
YOLOLAYERS = (AUTO_YOLOLAYER, PLUGIN, KERNEL)
"""What can be asked for; ``auto`` is the plugin where the library hosts it."""

ROWS_NAME = "rows"
"""The network's output where YoloLayer is a plugin: float32 (batch, rows, 6)."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine.

    Attributes:
        precision: ``fp32``, ``tf32`` (fp32 whose products a GPU may round to 10 bits), ``fp16`` or ``int8``; None
            takes the backend's default.
        imgsz: Network input height and width in pixels, or one number for both; None takes the model's own.
        min_batch: Smallest batch.
        max_batch: Largest batch. The batch is static where it equals `min_batch`.
        opt_batch: The batch that the engine is made fastest for; None takes the largest.
        workspace_mib: Limit on TensorRT's scratch memory in MiB; None leaves it to TensorRT.
        optimization_level: How long TensorRT searches for fast kernels, 0 to 5; None leaves it to TensorRT (3).
        timing_cache: File in which TensorRT keeps what it measured; None takes one in the user's cache folder.
        use_timing_cache: Whether there is such a file at all.
        hardware_compatible: Whether the engine runs on every GPU of compute capability 8.0 and later.
        version_compatible: Whether the engine runs with later versions of TensorRT.
        yololayer: Where raw heads become boxes on a GPU: ``plugin`` (inside the engine), ``kernel`` (right after it),
            or ``auto`` for the plugin where TensorRT hosts it.
        int8: How the scales of an INT8 engine are found.
    """

    precision: str | None = None
    imgsz: int | tuple[int, int] | None = None
    min_batch: int = 1
    max_batch: int = 1
    opt_batch: int | None = None
    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: str | Path | None = None
    use_timing_cache: bool = True
    hardware_compatible: bool = False
    version_compatible: bool = False
    yololayer: str = AUTO_YOLOLAYER
    int8: Int8Options = field(default_factory=Int8Options)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: if one is out of range.
        """
        if self.precision is not None and self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is not known: choose one of {', '.join(PRECISIONS)}")
        low, usual, high = self.batch_range
        if not all(isinstance(size, int) for size in self.batch_range) or not 1 <= low <= usual <= high <= MAX_BATCH:
            if low == usual == high:
                raise InputError(f"batch size {low} is out of range: choose 1 to {MAX_BATCH}")
            raise InputError(
                f"batch sizes {low}, {usual}, {high} are not in order: choose 1 <= min <= opt <= max <= {MAX_BATCH}"
            )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InputError(f"workspace of {self.workspace_mib} MiB: choose at least 1")
        level = self.optimization_level
        if level is not None and (type(level) is not int or not 0 <= level <= MAX_OPTIMIZATION_LEVEL):
            raise InputError(f"optimization level {level!r}: choose 0 (fast build) to {MAX_OPTIMIZATION_LEVEL}")
        if self.timing_cache is not None and not self.use_timing_cache:
            raise InputError(f"timing cache {self.timing_cache} is named and turned off: leave out one of the two")
        if self.yololayer not in YOLOLAYERS:
            raise InputError(f"YoloLayer {self.yololayer!r} is not known: choose one of {', '.join(YOLOLAYERS)}")
        if self.imgsz is not None:
            _check_image_size(self.imgsz)

    @property
    def batch_range(self) -> tuple[int, int, int]:
        """Smallest, usual and largest batch."""
        return self.min_batch, self.max_batch if self.opt_batch is None else self.opt_batch, self.max_batch

    @property
    def is_dynamic(self) -> bool:
        """Whether the batch may vary from call to call."""
        return self.min_batch != self.max_batch

    def completed(self, precision: str, imgsz: tuple[int, int]) -> CompleteOptions:
        """The same with nothing left open.

        Args:
            precision: What None stands for.
            imgsz: What None stands for, height and width in pixels.
        """
        size = imgsz if self.imgsz is None else self.imgsz
        return CompleteOptions(
            precision=self.precision or precision,
            imgsz=(size, size) if isinstance(size, int) else (size[0], size[1]),
            batch_range=self.batch_range,
            workspace_mib=self.workspace_mib,
            optimization_level=self.optimization_level,
            timing_cache=None if self.timing_cache is None else Path(self.timing_cache),
            use_timing_cache=self.use_timing_cache,
            hardware_compatible=self.hardware_compatible,
            version_compatible=self.version_compatible,
            yololayer=self.yololayer,
        )


@dataclass(frozen=True)
class CompleteOptions:
    """`BuildOptions` with the defaults of the model and the backend filled in.

    Attributes:
        precision: ``fp32``, ``tf32``, ``fp16`` or ``int8``.
        imgsz: Network input height and width in pixels.
        batch_range: Smallest, usual and largest batch.
        workspace_mib: As in `BuildOptions`, like all that follows.
        optimization_level: 0 to 5, or None.
        timing_cache: The file, or None for the usual one.
        use_timing_cache: Whether there is one.
        hardware_compatible: For all GPUs from compute capability 8.0 on.
        version_compatible: For later versions of TensorRT.
        yololayer: ``auto``, ``plugin`` or ``kernel``.
        quantization: Scales and kept layers of an INT8 engine; None for other precisions.
    """

    precision: str
    imgsz: tuple[int, int]
    batch_range: tuple[int, int, int]
    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    use_timing_cache: bool = True
    hardware_compatible: bool = False
    version_compatible: bool = False
    yololayer: str = AUTO_YOLOLAYER
    quantization: Quantization | None = None

    @property
    def is_dynamic(self) -> bool:
        """Whether the batch may vary from call to call."""
        return self.batch_range[0] != self.batch_range[2]


@dataclass(frozen=True)
class Plan:
    """What a backend built.

    Attributes:
        data: The serialized plan.
        inputs: The network's inputs.
        outputs: The network's outputs, finest level first.
        yololayer: Where raw heads become boxes: ``host`` (NumPy), ``kernel`` (a kernel after the engine) or ``plugin``
            (in the engine, whose only output is ``rows``).
        device_name: GPU that it was built on or for; empty for a CPU.
        compute_capability: Of that GPU; empty for a CPU.
        findings: What the backend found out about the plan, for the header's `build_options`; values of JSON types.
    """

    data: bytes
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    yololayer: str = HOST
    device_name: str = ""
    compute_capability: str = ""
    findings: Mapping[str, Any] = field(default_factory=dict)


_ADDING = threading.Lock()


@dataclass
class Timing:
    """Where a session's time went, in milliseconds, summed over `pictures`.

    Attributes:
        preprocess_ms: Letterbox and conversion. On a GPU: handing the frames over.
        inference_ms: The engine; time in which a CPU computes several batches side by side counts once. On a GPU:
            waiting for all from the upload to the boxes.
        postprocess_ms: YoloLayer, NMS and scaling back to the pictures. On a GPU: scaling back alone.
        pictures: Number of pictures.
    """

    preprocess_ms: float = 0.0
    inference_ms: float = 0.0
    postprocess_ms: float = 0.0
    pictures: int = 0

    def add(
        self, *, preprocess_ms: float = 0.0, inference_ms: float = 0.0, postprocess_ms: float = 0.0, pictures: int = 0
    ) -> None:
        """Add to the sums; several threads may do so."""
        with _ADDING:
            self.preprocess_ms += preprocess_ms
            self.inference_ms += inference_ms
            self.postprocess_ms += postprocess_ms
            self.pictures += pictures


class Pending(abc.ABC):
    """A batch that is being computed."""

    @abc.abstractmethod
    def result(self) -> list[Boxes]:
        """Wait for the batch.

        Returns:
            Per frame its boxes in network-input pixels, best first; of segmentation models with `Boxes.masks`. A second
            call gives the same.

        Raises:
            InferenceError: if the device failed.
        """


class Finished(Pending):
    """A batch that is computed already."""

    def __init__(self, boxes: list[Boxes]) -> None:
        self._boxes = boxes

    def result(self) -> list[Boxes]:
        """See `Pending.result`."""
        return self._boxes


class Session(abc.ABC):
    """An engine ready to run. Use it from one thread at a time; open one session a thread.

    Attributes:
        header: The engine's description.
        timing: Time spent so far.
        batches_in_flight: How many batches to submit before taking a result, for most pictures a second. It may turn
            out that there is room for fewer.
        leaves_cores_free: Whether it computes on some of the CPU's cores and leaves others free.
    """

    header: EngineHeader
    timing: Timing
    batches_in_flight: int = 1
    leaves_cores_free: bool = False

    @abc.abstractmethod
    def submit(self, frames: Sequence[Frame], options: NmsOptions) -> Pending:
        """Start to detect in a batch; several may be under way.

        Args:
            frames: One to `header.max_batch` pictures, uint8 BGR (height, width, 3), which may differ in size, in host
                memory; a GPU session also takes them in device memory. They must not change before the result is there.
            options: Thresholds.

        Raises:
            InputError: if there are none or too many frames, or the session is closed.
            InferenceError: if the device fails.
        """

    def detect(self, frames: Sequence[Frame], options: NmsOptions) -> list[Boxes]:
        """Detect in a batch and wait for the result; see `submit` and `Pending.result`."""
        return self.submit(frames, options).result()

    @abc.abstractmethod
    def run(self, images: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Compute the network's raw outputs for a batch, for classification, tests, calibration and evaluation.

        Args:
            images: float32 (batch, 3, height, width), RGB in 0..1, letterboxed to the engine's size.

        Returns:
            float32, in the header's order. Per level (batch, anchors x (5 + classes + mask coefficients), height /
            stride, width / stride), raw values before the sigmoid, and for segmentation the prototypes (batch,
            coefficients, height / 4, width / 4); for classification (batch, classes), before the softmax. The arrays
            belong to the session and hold until its next call.

        Raises:
            InputError: if the batch or the picture size is not one that the engine takes.
        """

    def classify(self, frames: Sequence[Frame]) -> npt.NDArray[np.float32]:
        """Compute the class probabilities of a batch with a classifier.

        Args:
            frames: One to `header.max_batch` pictures, uint8 BGR (height, width, 3), in host memory.

        Returns:
            float32 (frames, classes), each row of sum 1.

        Raises:
            InputError: if there are none or too many frames, one is in device memory, or the session is closed.
            InferenceError: if the device fails.
        """
        from yolotrt.preprocess import CentreCrop  # OpenCV, which building an engine does without

        self.check_frame_count(len(frames))
        self.check_in_host_memory(frames)
        began = time.perf_counter()
        images = np.zeros((max(len(frames), self.header.batch_range[0]), 3, *self.header.imgsz), np.float32)
        for frame, out in zip(frames, images, strict=False):
            CentreCrop(self.header.imgsz).to_input(frame, out)
        prepared = time.perf_counter()
        (logits,) = self.run(images)
        self.timing.preprocess_ms += (prepared - began) * 1e3
        self.timing.inference_ms += (time.perf_counter() - prepared) * 1e3
        self.timing.pictures += len(frames)
        return softmax(logits[: len(frames)])

    def warm_up(self, options: NmsOptions, *, batches: int = 1) -> None:
        """Compute a grey picture, so that later ones do not wait for what is made at first use.

        On a GPU that is kernels, graphs and memory, also for a full batch. `timing` stays as it is.

        Args:
            options: Thresholds, which should be those of later use.
            batches: How many batches will be under way at once.

        Raises:
            InferenceError: if the device fails.
        """
        grey = np.full((*self.header.imgsz, 3), PAD_VALUE, np.uint8)
        timing, self.timing = self.timing, Timing()
        try:
            self._compute_at_first(grey, options, min(batches, self.batches_in_flight))
        finally:
            self.timing = timing

    def _compute_at_first(self, picture: Frame, options: NmsOptions, batches: int) -> None:  # noqa: ARG002
        """What `warm_up` computes; several batches under way may need more than one alone does."""
        if self.header.model.task == "classify":
            self.classify([picture])
        else:
            self.detect([picture], options)

    def check_in_host_memory(self, frames: Sequence[Frame]) -> None:
        """Raise InputError unless all frames are NumPy arrays."""
        if not all(isinstance(frame, np.ndarray) for frame in frames):
            raise InputError("a picture lies in device memory, where this engine cannot read it: pass NumPy arrays")

    def frame_buffer(self, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Memory for one frame, uint8 (height, width, 3), that this session reads fastest.

        Decode into it and submit it: a GPU session gives page-locked memory and pays no copy on the host. It is the
        caller's as long as it is referred to, and used again afterwards.
        """
        return np.empty((height, width, 3), np.uint8)

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

    def check_frame_count(self, count: int) -> None:
        """Raise InputError unless a batch may have `count` frames."""
        if not 1 <= count <= self.header.max_batch:
            raise InputError(f"the engine takes 1 to {self.header.max_batch} pictures a batch, not {count}")


class Backend(abc.ABC):
    """A library that builds and runs engines.

    Attributes:
        name: Its name on the command line.
        default_precision: The precision where none is asked for.
        precisions: What it can build.
        gpu_options: Options for GPUs that it knows, by their names in `CompleteOptions`.
    """

    name: str
    default_precision: str
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    gpu_options: frozenset[str] = frozenset()

    def check_options(self, options: CompleteOptions) -> None:
        """Refuse what this library cannot do: an option without effect is a mistake.

        Raises:
            InputError: if it does not know the precision or an option.
        """
        if options.precision not in self.precisions:
            raise InputError(
                f"{self.name} does not build {options.precision}: choose one of {', '.join(self.precisions)}"
            )
        for field_name, option in _GPU_OPTIONS.items():
            is_asked_for = getattr(options, field_name) != getattr(CompleteOptions, field_name)
            if is_asked_for and field_name not in self.gpu_options:
                raise InputError(f"{self.name} has no {option}: leave it out, or choose another --backend")

    @abc.abstractmethod
    def version(self) -> str:
        """Version of the library.

        Raises:
            BackendUnavailableError: if it is not installed.
        """

    @abc.abstractmethod
    def build(self, weights: Weights, options: CompleteOptions) -> Plan:
        """Build a plan.

        Raises:
            BackendUnavailableError: if the library is not installed or its device is missing.
            BuildError: if the library fails.
        """

    @abc.abstractmethod
    def open(self, engine: EngineFile, *, threads: int | None = None) -> Session:
        """Open a session on an engine of this backend.

        Args:
            engine: An engine of this backend.
            threads: Number of CPU threads that compute; None leaves it to the library. GPU backends have no use for it.

        Raises:
            BackendUnavailableError: if the library is not installed or its device is missing.
            EngineFileError: if the engine was made for another device or version.
        """


def _check_image_size(size: Any) -> None:
    """Raise InputError unless it is one whole number, or a pair, in the range of picture sizes."""
    sides = size if isinstance(size, tuple | list) and len(size) == 2 else (size,)
    if not all(type(side) is int and 1 <= side <= MAX_IMAGE_SIZE for side in sides):
        raise InputError(
            f"image size {size!r:.60}: choose a number of pixels, or height and width, from 1 to {MAX_IMAGE_SIZE}"
        )


_GPU_OPTIONS = {
    "workspace_mib": "--workspace",
    "optimization_level": "--optimization-level",
    "timing_cache": "--timing-cache",
    "hardware_compatible": "--hardware-compatible",
    "version_compatible": "--version-compatible",
    "yololayer": "--yololayer",
}
"""Options that not every backend knows: fields of `CompleteOptions` and their names on the command line."""

BackendFactory = Callable[[], Backend]
BackendTable = Mapping[str, BackendFactory]
