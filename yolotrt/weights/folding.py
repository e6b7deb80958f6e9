"""Folding BatchNorm into the convolution before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import WeightsError
from yolotrt.weights.model import FloatArray, Weights

_REMEDY = "the weights are broken: use another checkpoint"


def fold_batch_norm(
    weight: FloatArray,
    gamma: FloatArray,
    beta: FloatArray,
    mean: FloatArray,
    variance: FloatArray,
    epsilon: float,
    bias: FloatArray | None = None,
    *,
    channel_axis: int = 0,
    name: str = "convolution",
) -> tuple[FloatArray, FloatArray]:
    """Fold a BatchNorm2d in inference mode into the convolution before it.

    BatchNorm computes ``gamma * (x - mean) / sqrt(variance + epsilon) + beta`` per output channel (Ioffe and Szegedy
    2015, and torch.nn.BatchNorm2d). With ``scale = gamma / sqrt(variance + epsilon)`` and ``x = weight * input + bias``
    that is the convolution with the kernel ``scale * weight`` and the bias ``beta + scale * (bias - mean)``.

    Args:
        weight: The kernel, (out, in / groups, height, width), or for a transposed convolution
            (in, out, height, width) with `channel_axis` 1.
        gamma: Scale, (out,).
        beta: Shift, (out,).
        mean: Running mean, (out,).
        variance: Running variance, (out,).
        epsilon: What BatchNorm adds to the variance.
        bias: The convolution's own bias, (out,), if it has one.
        channel_axis: The axis of `weight` that counts output channels.
        name: The block's name, for messages.

    Returns:
        float32 kernel, in the shape of `weight`, and bias, (out,). The arithmetic is in float64, so that folding rounds
        once.

    Raises:
        WeightsError: if ``variance + epsilon`` is not positive, or a result is not finite in float32.
    """
    deviation_squared = variance.astype(np.float64) + epsilon
    # Written so that NaN counts as wrong too.
    wrong = np.flatnonzero(~(deviation_squared > 0))
    if wrong.size:
        value = float(variance[wrong[0]])
        raise WeightsError(
            f"tensor {name}.bn.running_var holds {value:g} at index {wrong[0]}, which is no variance: {_REMEDY}"
        )
    scale = gamma.astype(np.float64) / np.sqrt(deviation_squared)
    own_bias = np.float64(0) if bias is None else bias.astype(np.float64)
    shape = [1] * weight.ndim
    shape[channel_axis] = -1
    with np.errstate(over="ignore", invalid="ignore"):  # refused in _finite_float32
        folded_weight = weight.astype(np.float64) * scale.reshape(shape)
        folded_bias = beta.astype(np.float64) + scale * (own_bias - mean.astype(np.float64))
        return _finite_float32(folded_weight, f"{name}.conv.weight"), _finite_float32(folded_bias, f"{name}.conv.bias")


def folded_part(
    weights: Weights, name: str, kernel_shape: tuple[int, ...], norm: str, channels: int, first: int
) -> tuple[FloatArray, FloatArray]:
    """Kernel and bias of a convolution whose output is a part of what one BatchNorm takes.

    A BatchNorm after a concatenation scales and shifts each channel by itself, so its parts fold into the convolutions
    that are joined (YOLOv5 models/common.py, BottleneckCSP).

    Args:
        weights: Where ``NAME.weight`` and ``NORM.weight, .bias, .running_mean, .running_var`` are.
        name: The convolution, which has no bias, such as ``model.2.cv2``.
        kernel_shape: The shape that the kernel must have, (out, in, height, width).
        norm: The BatchNorm, such as ``model.2.bn``.
        channels: Channels of the BatchNorm.
        first: The one that the convolution's first output is.

    Returns:
        float32 kernel of `kernel_shape`, and bias, (out,).

    Raises:
        WeightsError: if an array is missing, of another shape, or BatchNorm's numbers are broken.
    """
    kernel = weights.take(f"{name}.weight", kernel_shape)
    own = slice(first, first + kernel_shape[0])
    gamma, beta, mean, variance = (values[own] for values in batch_norm(weights, norm, channels))
    epsilon = weights.metadata.epsilon_of(norm)
    return fold_batch_norm(kernel, gamma, beta, mean, variance, epsilon, name=norm.removesuffix(".bn"))


def folded_convolution(
    weights: Weights, name: str, kernel_shape: tuple[int, ...], *, channel_axis: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Kernel and bias of a YOLOv5 Conv block, its BatchNorm folded in.

    Args:
        weights: Where ``NAME.conv.weight`` and either ``NAME.bn.weight, .bias, .running_mean, .running_var`` are, or,
            in a checkpoint that was fused before, ``NAME.conv.bias``.
        name: The block, such as ``model.0``.
        kernel_shape: The shape that the kernel must have, such as (out, in, height, width).
        channel_axis: The axis of the kernel that counts output channels; 1 for a transposed convolution.

    Returns:
        float32 kernel of `kernel_shape`, and bias, (out,).

    Raises:
        WeightsError: if an array is missing, of another shape, or BatchNorm's numbers are broken.
    """
    kernel, bias, statistics = convolution_parts(weights, name, kernel_shape, channel_axis=channel_axis)
    if statistics is None:
        return kernel, np.zeros(kernel_shape[channel_axis], np.float32) if bias is None else bias
    gamma, beta, mean, variance = statistics
    epsilon = weights.metadata.epsilon_of(f"{name}.bn")
    return fold_batch_norm(kernel, gamma, beta, mean, variance, epsilon, bias, channel_axis=channel_axis, name=name)


def convolution_parts(
    weights: Weights, name: str, kernel_shape: tuple[int, ...], *, channel_axis: int = 0
) -> tuple[FloatArray, FloatArray | None, list[FloatArray] | None]:
    """Kernel, bias and BatchNorm of a YOLOv5 Conv block as the weights have them; see `folded_convolution`."""
    channels = kernel_shape[channel_axis]
    kernel = weights.take(f"{name}.conv.weight", kernel_shape)
    has_bias = f"{name}.conv.bias" in weights.tensors
    bias = weights.take(f"{name}.conv.bias", (channels,)) if has_bias else None
    was_fused = has_bias and f"{name}.bn.weight" not in weights.tensors
    return kernel, bias, None if was_fused else batch_norm(weights, f"{name}.bn", channels)


def batch_norm(weights: Weights, name: str, channels: int) -> list[FloatArray]:
    """Scale, shift, running mean and running variance of a BatchNorm."""
    return [weights.take(f"{name}.{part}", (channels,)) for part in ("weight", "bias", "running_mean", "running_var")]


def _finite_float32(values: npt.NDArray[Any], name: str) -> FloatArray:
    """The values rounded to float32, all of which must be finite."""
    rounded: FloatArray = values.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise WeightsError(f"tensor {name} is not finite with its BatchNorm folded in: {_REMEDY}")
    return rounded
