"""Device libraries behind the interface that `yolotrt.cuda.kernels` needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from yolotrt.cuda.compile import Defines, compile_for_device
from yolotrt.errors import BackendUnavailableError


class CupyDevice:
    """CuPy's view of one GPU; a `yolotrt.cuda.kernels.Device`.

    Attributes:
        capability: Compute capability, such as ``(9, 0)``.
    """

    def __init__(self, index: int = 0) -> None:
        """Open a GPU.

        Raises:
            BackendUnavailableError: if CuPy or the GPU is missing.
        """
        try:
            import cupy
        except ImportError as problem:
            raise BackendUnavailableError(f"CuPy is not installed ({problem}): install yolotrtx[gpu]") from None
        try:
            device = cupy.cuda.Device(index)
            digits: str = device.compute_capability
        except cupy.cuda.runtime.CUDARuntimeError as problem:
            raise BackendUnavailableError(
                f"GPU {index} cannot be used ({problem}): check the driver with nvidia-smi"
            ) from None
        self.capability = int(digits[:-1]), int(digits[-1])
        self._cupy: Any = cupy
        self._modules: dict[bytes, Any] = {}

    def function(self, source: str, entry: str, defines: Defines) -> Any:
        """Compile (or take from the cache) kernels/`source`.cu and return its kernel `entry`."""
        code = compile_for_device(source, defines, self.capability)
        module = self._modules.get(code)
        if module is None:
            module = self._modules[code] = self._cupy.cuda.function.Module()
            module.load(code)
        return module.get_function(entry)

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic],
        stream: Any = None,
        shared_bytes: int = 0,
    ) -> None:
        """Enqueue a kernel on a `cupy.cuda.Stream`; None is CuPy's current one."""
        function(grid, block, tuple(arguments), shared_bytes, stream=stream)
