"""TensorRT 8.6, 10 and 11: builds engines on the GPU that they are for, and verifies what was built."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from yolotrt.cuda.compile import PORTABLE_ARCHITECTURE
from yolotrt.engines import inspector
from yolotrt.engines.base import (
    KERNEL,
    PLUGIN,
    PRECISIONS,
    ROWS_NAME,
    Backend,
    CompleteOptions,
    Plan,
    Session,
)
from yolotrt.engines.definition import build_plan
from yolotrt.engines.file import EngineFile
from yolotrt.engines.gpu import Gpu, check_memory, dotted, find_gpu, label
from yolotrt.engines.timing_cache import TimingCache
from yolotrt.engines.trt_adapter import TrtHooks, check_platform, library_label, scratch_bytes
from yolotrt.engines.trt_log import OutOfMemoryError
from yolotrt.errors import BackendUnavailableError, BuildError, YolotrtError
from yolotrt.network.builder import INPUT_NAME, NetworkBuilder
from yolotrt.network.ops import Tensor
from yolotrt.weights import Weights

_log = logging.getLogger(__name__)

_DIGITS = PORTABLE_ARCHITECTURE.removeprefix("compute_")
FIRST_FOR_PLUGIN = (int(_DIGITS[:-1]), int(_DIGITS[-1]))
"""Compute capability that the plugin's device code is for; it runs on later ones, too."""

ALLOWED = {"fp32": ("fp32",), "tf32": ("tf32", "fp32"), "fp16": ("fp16",), "int8": ("int8",)}
"""By the precision that is asked for: what a convolution may have. TF32 is leave, not a duty."""

NAMED_CONVOLUTIONS = 5
"""How many convolutions of another precision a warning names."""


class TensorRtBackend(Backend):
    """Builds and runs TensorRT plans for the GPU at hand."""

    name = "tensorrt"
    default_precision = "fp16"
    precisions = PRECISIONS
    gpu_options = frozenset(
        {
            "workspace_mib",
            "optimization_level",
            "timing_cache",
            "hardware_compatible",
            "version_compatible",
            "yololayer",
        }
    )

    def version(self) -> str:
        """Version of TensorRT."""
        return str(tensorrt_module().__version__)

    def build(self, weights: Weights, options: CompleteOptions) -> Plan:
        """Build a plan, with YoloLayer in it where that is possible."""
        trt = tensorrt_module()
        gpu = find_gpu()
        check_memory(gpu)
        yololayer = _choose_yololayer(trt, gpu, options.yololayer, weights.metadata.task)
        try:
            return _Build(trt, gpu, weights, options, yololayer).run()
        except OutOfMemoryError:
            raise
        except BuildError as problem:
            if yololayer != PLUGIN or options.yololayer == PLUGIN:
                raise
            _log.warning("YoloLayer will follow the engine rather than be a part of it: %s", problem)
            return _Build(trt, gpu, weights, options, KERNEL).run()

    def open(self, engine: EngineFile, *, threads: int | None = None) -> Session:  # noqa: ARG002
        """Open a session."""
        trt = tensorrt_module()
        from yolotrt.engines.gpu_session import open_gpu_session

        return open_gpu_session(trt, engine)


def tensorrt_module() -> Any:
    """The module tensorrt.

    Raises:
        BackendUnavailableError: if it, or the library that it needs, is not installed.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as problem:
        raise BackendUnavailableError(
            f'TensorRT is not installed ({problem}): run pip install "yolotrtx[gpu]"'
        ) from problem
    return tensorrt


def _choose_yololayer(trt: Any, gpu: Gpu, wanted: str, task: str) -> str:
    """``plugin`` or ``kernel``.

    Raises:
        BackendUnavailableError: if the plugin is asked for and cannot be.
    """
    from yolotrt.plugin.yololayer import plugin_unavailable_reason

    if wanted == KERNEL:
        return KERNEL
    reason = plugin_unavailable_reason(trt) if task == "detect" else f"models for the task {task} have no plugin"
    if not reason and gpu.capability < FIRST_FOR_PLUGIN:
        reason = f"the plugin's code is for compute capability {dotted(FIRST_FOR_PLUGIN)} and later ({label(gpu)})"
    if not reason:
        return PLUGIN
    if wanted == PLUGIN:
        raise BackendUnavailableError(f"{reason}: build with --yololayer kernel")
    _log.info("YoloLayer follows the engine: %s", reason)
    return KERNEL


class _Build:
    """One engine, with a given place for YoloLayer."""

    def __init__(self, trt: Any, gpu: Gpu, weights: Weights, options: CompleteOptions, yololayer: str) -> None:
        self._trt = trt
        self._gpu = gpu
        self._weights = weights
        self._options = replace(options, yololayer=yololayer)
        self._cache: TimingCache | None = None
        if options.use_timing_cache:
            self._cache = TimingCache.of(weights, self._options, gpu, str(trt.__version__))

    def run(self) -> Plan:
        """Build with the timing cache; without what is in it where that breaks the build.

        Raises:
            BuildError: if TensorRT cannot build the engine, or built it in another precision.
        """
        known = b"" if self._cache is None else self._cache.load()
        try:
            return self._build(known)
        except OutOfMemoryError:
            raise
        except BuildError as problem:
            if self._cache is None or not known:
                raise
            self._cache.warn(f"may have broken the build ({problem})")
            return self._build(b"")

    def _build(self, known: bytes) -> Plan:
        hooks = _TensorRtHooks(self._trt, self._gpu, self._weights, self._options, self._cache, known)
        plan = build_plan(self._trt, self._weights, self._options, hooks)
        hooks.warn_of_survived_errors()
        if self._cache is not None and hooks.measured:
            self._cache.save(hooks.measured)
        engine = _load(self._trt, hooks, plan, self._options)
        precisions = verify_precision(self._trt, hooks, engine, self._options)
        return replace(
            plan,
            yololayer=self._options.yololayer,
            device_name=self._gpu.name,
            compute_capability=dotted(self._gpu.capability),
            findings={**precisions, "scratch_bytes": scratch_bytes(self._trt, engine)},
        )


class _TensorRtHooks(TrtHooks):
    """Adds to `TrtHooks` what TensorRT-RTX lacks: YoloLayer as a plugin, the timing cache, the look at the GPU."""

    def __init__(
        self,
        trt: Any,
        gpu: Gpu,
        weights: Weights,
        options: CompleteOptions,
        cache: TimingCache | None,
        known: bytes,
    ) -> None:
        super().__init__(trt, options)
        self.measured = b""
        self._gpu = gpu
        self._model = weights.metadata
        self._cache = cache
        self._known = known

    def create_network(self, trt: Any, builder: Any) -> Any:
        check_platform(trt, builder, self._gpu, self._options)
        return super().create_network(trt, builder)

    def finish_network(self, definition: NetworkBuilder, network: Any, heads: Mapping[str, Tensor]) -> list[Tensor]:
        if self._options.yololayer != PLUGIN:
            return super().finish_network(definition, network, heads)
        from yolotrt.plugin.yololayer import add_yololayer

        self.note_convolutions(definition)
        model = self._model
        try:
            rows = add_yololayer(
                network, self._trt, list(heads.values()), model.anchors, model.strides, model.class_count, "best"
            )
        except YolotrtError as problem:
            raise BuildError(str(problem)) from problem
        rows.name = ROWS_NAME
        network.mark_output(rows)
        return [rows]

    def configure(self, config: Any) -> None:
        super().configure(config)
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED  # else the inspector tells names alone
        if self._cache is None:
            return
        cache = config.create_timing_cache(self._known)
        if cache is None or not config.set_timing_cache(cache, False):
            if self._known:
                self._cache.warn("was refused by TensorRT")
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def serialize(self, definition: NetworkBuilder, builder: Any, config: Any) -> bytes | None:
        data = super().serialize(definition, builder, config)
        cache = config.get_timing_cache() if self._cache is not None and data is not None else None
        if cache is not None:
            self.measured = bytes(cache.serialize())
        return data


def verify_precision(trt: Any, hooks: TrtHooks, engine: Any, options: CompleteOptions) -> dict[str, Any]:
    """Look into the engine that was built: a precision that was asked for is not always one that was got.

    Returns:
        ``convolutions``: number of convolutions by precision.

    Raises:
        BuildError: if no convolution has the precision.
    """
    found = inspector.convolution_precisions(_engine_information(trt, engine, options), hooks.convolutions)
    counts = inspector.count_precisions(found)
    if options.precision == "int8":  # the first, the head and the layers to keep are not
        found = {name: found[name] for name in hooks.int8_convolutions_wanted}
    library, precision, total = library_label(trt), options.precision, len(found)
    right = sum(kind in ALLOWED[precision] for kind in found.values())
    untold = sum(kind == inspector.UNKNOWN for kind in found.values())
    _log.info("%d of %d convolutions %s", right, total, precision)
    if total == 0:
        _log.warning("all convolutions are kept in high precision: --precision fp16 would give the same engine")
    elif untold == total:
        _log.warning("%s does not tell in which precision its convolutions are", library)
    elif right == 0:
        raise BuildError(
            f"{library} built no convolution in {precision} ({json.dumps(counts)}): choose another --precision"
        )
    elif right < total:
        others = [f"{name} ({kind})" for name, kind in found.items() if kind not in ALLOWED[precision]]
        more = f" and {len(others) - NAMED_CONVOLUTIONS} more" if len(others) > NAMED_CONVOLUTIONS else ""
        _log.warning(
            "%d of %d convolutions are not %s: %s%s",
            total - right,
            total,
            precision,
            ", ".join(others[:NAMED_CONVOLUTIONS]),
            more,
        )
    return {"convolutions": counts}


def _load(trt: Any, hooks: TrtHooks, plan: Plan, options: CompleteOptions) -> Any:
    """The engine of a plan that was just built.

    Raises:
        BuildError: if TensorRT refuses it.
    """
    runtime = trt.Runtime(hooks.logger)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True  # such an engine brings a runtime of its own
    engine = runtime.deserialize_cuda_engine(plan.data)
    if engine is None:
        raise hooks.failure()
    return engine


def _engine_information(trt: Any, engine: Any, options: CompleteOptions) -> str:
    """The engine inspector's JSON, at the usual batch."""
    context = engine.create_execution_context() if options.is_dynamic else None
    if context is not None:
        context.set_input_shape(INPUT_NAME, (options.batch_range[1], 3, *options.imgsz))
    return inspector.engine_information(trt, engine, context)
