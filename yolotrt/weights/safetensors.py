"""Weights in the safetensors format: small, and loaded without parsing text.

The header's ``__metadata__`` has our JSON under the key `METADATA_KEY`. Files of other writers are read as well, if
they hold a YOLOv5 model under YOLOv5's names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import WeightsError
from yolotrt.files import atomic_write, require_file
from yolotrt.weights.infer import infer_metadata, network_tensors
from yolotrt.weights.model import FloatArray, Metadata, Weights
from yolotrt.weights.wts import require_finite

METADATA_KEY = "yolotrt"

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_FLOATS = ("BF16", "F16", "F32", "F64")
_COUNTER = "num_batches_tracked"  # an integer of BatchNorm2d that only training uses


def write_safetensors(weights: Weights, path: str | Path, half: bool = False) -> None:
    """Write `weights` as a .safetensors file.

    Args:
        weights: What to write.
        path: The file; it appears complete or not at all.
        half: Store float16 instead of float32.

    Raises:
        WeightsError: if there is no tensor, or a value is NaN, infinite or, with `half`, beyond float16's +-65504.
        OutputError: if the file cannot be written.
    """
    from safetensors.numpy import save

    path = Path(path)
    if not weights.tensors:
        raise WeightsError(f"cannot write {path}: the weights hold no tensor: check the checkpoint")
    for name, array in weights.tensors.items():
        require_finite(array, f"cannot write {path}: tensor {name}")
        if half:
            _require_float16_range(name, array, path)
    dtype = np.float16 if half else np.float32
    # The library writes the memory as it lies.
    arrays = {name: np.asarray(array, dtype=dtype, order="C") for name, array in weights.tensors.items()}
    data = save(arrays, metadata={METADATA_KEY: weights.metadata.to_json()})
    with atomic_write(path) as file:
        file.write(data)


def read_safetensors(path: str | Path) -> Weights:
    """Read a .safetensors file.

    Args:
        path: The file. float16, bfloat16 and float64 become float32.

    Returns:
        float32 arrays; inferred metadata if the file has none of ours.

    Raises:
        WeightsError: if the file is missing or malformed, holds NaN, infinity or a type that is not floating point, or,
            without our metadata, is no known YOLOv5 model.
    """
    path = require_file(Path(path), "weights", WeightsError)
    tensors, metadata = _read(path)
    for name, array in tensors.items():
        require_finite(array, f"{path}: tensor {name!r:.120}")
    try:
        if metadata is None:
            return Weights(network_tensors(tensors), infer_metadata(tensors))
        return Weights(tensors, Metadata.from_json(metadata))
    except WeightsError as problem:
        raise WeightsError(f"{path}: {problem}") from problem


def _require_float16_range(name: str, array: FloatArray, path: Path) -> None:
    """Refuse values that float16 would turn into infinity."""
    beyond = np.abs(array.ravel()) > _FLOAT16_MAX
    if beyond.any():
        index = int(np.argmax(beyond))
        raise WeightsError(
            f"cannot write {path} in half precision: tensor {name} holds {array.ravel()[index]:g} at index {index}, "
            f"beyond +-{_FLOAT16_MAX:g}: write float32"
        )


def _read(path: Path) -> tuple[dict[str, FloatArray], str | None]:
    """All tensors as float32, and our JSON if there is one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            dtypes = _dtypes(file, path)
            tensors = {name: _widened(file.get_tensor(name)) for name, dtype in dtypes.items() if dtype != "BF16"}
        if "BF16" in dtypes.values():
            tensors |= _bfloat16_tensors(path)
    except (SafetensorError, OSError, ValueError, TypeError) as problem:
        reason = str(problem).partition("\n")[0][:200]
        raise WeightsError(
            f"{path} is no intact .safetensors file ({reason}): download it or make it with gen_wts.py again"
        ) from problem
    return {name: tensors[name] for name in dtypes}, metadata


def _dtypes(file: Any, path: Path) -> dict[str, str]:
    """The type of every tensor but BatchNorm's counters; all are floating-point types that can be read."""
    names = [name for name in file.keys() if not name.endswith(_COUNTER)]  # noqa: SIM118, a mapping in name only
    dtypes = {name: file.get_slice(name).get_dtype() for name in names}
    for name, dtype in dtypes.items():
        if dtype not in _FLOATS:
            raise WeightsError(f"{path}: tensor {name!r:.120} is of type {dtype}: convert it to F32, F16 or BF16")
    return dtypes


def _widened(array: npt.NDArray[Any]) -> FloatArray:
    """The array as float32; what that cannot hold becomes infinite, which is refused later."""
    with np.errstate(over="ignore"):
        return np.asarray(array, dtype=np.float32)


def _bfloat16_tensors(path: Path) -> dict[str, FloatArray]:
    """The tensors of a type that NumPy does not have: its 16 bits are the upper half of a float32."""
    import safetensors

    items: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call, unused-ignore]
    tensors: dict[str, FloatArray] = {}
    for name, item in items:
        if item["dtype"] == "BF16":
            bits = np.frombuffer(item["data"], "<u2").astype(np.uint32) << 16
            tensors[name] = bits.view(np.float32).reshape(item["shape"])
    return tensors
