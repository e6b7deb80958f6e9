"""The values of every tensor in the float network, picture by picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from yolotrt.network import recorder
from yolotrt.network.builder import INPUT_NAME, NetworkBuilder
from yolotrt.network.onnx_writer import write_onnx
from yolotrt.network.quantize import computed_tensors, scale_groups
from yolotrt.network.ranges import floor
from yolotrt.weights import Weights

Float = npt.NDArray[np.float32]

MAX_BYTES_AT_ONCE = 512 << 20
"""Values asked for in one run of the network: larger networks run several times a picture."""


class ActivationSource(Protocol):
    """Computes a float network and shows its tensors; a device may do it in its own way.

    Attributes:
        groups: Tensors in groups that share a scale; see `yolotrt.network.quantize.scale_groups`.
        floors: Values of a tensor below its floor need no precision; see `yolotrt.network.ranges.FLOORS`.
    """

    groups: tuple[tuple[str, ...], ...]
    floors: Mapping[str, float]

    def observe(self, images: Float) -> Iterator[tuple[str, Float]]:
        """Compute one batch.

        Args:
            images: float32 (1, 3, height, width), RGB in 0..1, letterboxed.

        Yields:
            A tensor's name and its values; of each group all tensors that do not copy others.
        """


class OnnxActivations:
    """`ActivationSource` by ONNX Runtime on the CPU: the recorded network with all tensors as outputs."""

    def __init__(self, weights: Weights, imgsz: tuple[int, int], threads: int | None = None) -> None:
        """Record the network and open a session on it.

        Args:
            weights: The model.
            imgsz: Network input height and width in pixels.
            threads: CPU threads; None leaves it to ONNX Runtime.
        """
        from yolotrt.engines.onnx import inference_session

        network = record(weights, imgsz)
        self.groups = scale_groups(network)
        self.floors: Mapping[str, float] = _floors(network)
        observed = computed_tensors(network) & {name for group in self.groups for name in group}
        tensors = [layer.output for layer in network.layers if layer.output.name in observed]
        for tensor in tensors:
            network.mark_output(tensor)
        self._chunks = list(_chunks(tensors))
        self._session: Any = inference_session(write_onnx(network), threads)

    def observe(self, images: Float) -> Iterator[tuple[str, Float]]:
        """See `ActivationSource.observe`."""
        yield INPUT_NAME, images
        for names in self._chunks:
            yield from zip(names, self._session.run(names, {INPUT_NAME: images}), strict=True)


def record(weights: Weights, imgsz: tuple[int, int]) -> recorder.Network:
    """The model's float network for one picture, recorded."""
    network = recorder.Network()
    NetworkBuilder(network, recorder, weights, compute_dtype=recorder.float32).build(1, *imgsz)
    return network


def _floors(network: recorder.Network) -> dict[str, float]:
    """The floor of every convolution's output that only an activation reads."""
    outputs = [layer.output for layer in network.layers if isinstance(layer, recorder.ConvolutionLayer)]
    return {tensor.name: low for tensor in outputs if (low := floor(tensor)) is not None}


def _chunks(tensors: Sequence[recorder.Tensor]) -> Iterator[list[str]]:
    """Names of tensors that are at most `MAX_BYTES_AT_ONCE` large together."""
    names: list[str] = []
    size = 0
    for tensor in tensors:
        own = math.prod(tensor.shape) * tensor.dtype.itemsize
        if names and size + own > MAX_BYTES_AT_ONCE:
            yield names
            names, size = [], 0
        names.append(tensor.name)
        size += own
    if names:
        yield names
