"""How a library's builder is driven: the profile, the options, and what happens when it fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.reference import all_weights, complete, tiny_metadata
from yolotrt.engines.definition import BuildHooks, build_plan
from yolotrt.engines.file import TensorInfo
from yolotrt.errors import BuildError
from yolotrt.network import recorder
from yolotrt.weights import Weights

SIZE = {"imgsz": (32, 48), "precision": "fp32"}


@pytest.fixture(scope="module")
def tiny() -> Weights:
    return all_weights(tiny_metadata())


class Config(recorder.BuilderConfig):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.limits: list[Any] = []
        self.is_built = False
        self.refuses_profiles = False

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.limits.append((pool, size))

    def add_optimization_profile(self, profile: recorder.OptimizationProfile) -> int:
        return -1 if self.refuses_profiles else super().add_optimization_profile(profile)


class Library(SimpleNamespace):
    """The recorder with a builder that can fail, as a module like `tensorrt`."""

    def __init__(self, *, builds: bool = True, refuses_profiles: bool = False) -> None:
        super().__init__(**vars(recorder))
        config = self.config = Config()
        config.refuses_profiles = refuses_profiles
        loggers = self.loggers = []

        class Builder(recorder.Builder):
            def __init__(self, logger: Any) -> None:
                super().__init__(logger)
                loggers.append(logger)

            def create_builder_config(self) -> Config:
                return config

            def build_serialized_network(self, network: recorder.Network, given: Config) -> bytes | None:
                given.is_built = True
                return super().build_serialized_network(network, given) if builds else None

        self.Builder = Builder


@pytest.mark.parametrize(
    ("options", "batch", "profile"),
    [
        ({}, 1, None),
        ({"min_batch": 4, "opt_batch": 4, "max_batch": 4}, 4, None),
        ({"min_batch": 1, "opt_batch": 4, "max_batch": 8}, -1, (1, 4, 8)),
        ({"max_batch": 2}, -1, (1, 2, 2)),
    ],
)
def test_a_batch_is_static_or_has_a_profile(tiny, options, batch, profile):
    library = Library()
    plan = build_plan(library, tiny, complete(**SIZE, **options))
    assert plan.inputs == (TensorInfo("images", "float32", (batch, 3, 32, 48)),)
    assert plan.outputs == (
        TensorInfo("head0", "float32", (batch, 14, 8, 12)),
        TensorInfo("head1", "float32", (batch, 14, 4, 6)),
    )
    ranges = [given.ranges["images"] for given in library.config.profiles]
    assert [(r.min, r.opt, r.max) for r in ranges] == (
        [tuple((size, 3, 32, 48) for size in profile)] if profile else []
    )


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", recorder.float32), ("fp16", recorder.float16)])
def test_the_precision_is_that_of_all_layers_but_the_ends(tiny, monkeypatch, precision, dtype):
    networks = []
    check = recorder.check_network
    monkeypatch.setattr(
        recorder, "check_network", lambda network, config: (networks.append(network), check(network, config))
    )
    plan = build_plan(recorder, tiny, complete(imgsz=(32, 48), precision=precision))
    (network,) = networks
    assert network.name == "yolov5"
    inner = [layer for layer in network.layers if not isinstance(layer, recorder.CastLayer)]
    assert {layer.get_output(0).dtype for layer in inner} == {dtype}
    assert {tensor.dtype for tensor in (*plan.inputs, *plan.outputs)} == {"float32"}


def test_the_library_gets_its_logger_and_the_options(tiny):
    library, logger, configured = Library(), object(), []

    class Hooks(BuildHooks):
        def configure(self, config: Config) -> None:
            assert not config.is_built
            configured.append(config)

    hooks = Hooks()
    hooks.logger = logger
    build_plan(library, tiny, complete(**SIZE, workspace_mib=64), hooks)
    assert library.loggers == [logger]
    assert library.config.limits == [(recorder.MemoryPoolType.WORKSPACE, 64 * 1024 * 1024)]
    assert configured == [library.config]
    assert library.config.is_built


def test_the_workspace_is_left_to_the_library_unless_it_is_limited(tiny):
    library = Library()
    build_plan(library, tiny, complete(**SIZE))
    assert library.config.limits == []


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("out of memory", "the engine could not be built: out of memory"),
        ("", "the engine could not be built: the library gave no reason"),
    ],
)
def test_a_failed_build_comes_with_the_librarys_reason(tiny, reason, message):
    hooks = BuildHooks()
    hooks.explain = lambda: reason
    with pytest.raises(BuildError) as problem:
        build_plan(Library(builds=False), tiny, complete(**SIZE), hooks)
    assert str(problem.value) == message


def test_a_refused_profile_is_named(tiny):
    with pytest.raises(BuildError, match=r"^the library refused the range of batch sizes \(1, 2, 4\)$"):
        build_plan(Library(refuses_profiles=True), tiny, complete(**SIZE, opt_batch=2, max_batch=4))
