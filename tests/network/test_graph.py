"""The layer list: what the yaml's rows become, and which yamls are refused."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference import TINY_YAML, made_up_weights, official_metadata, tiny_metadata
from yolotrt.errors import GraphError, YolotrtError
from yolotrt.network import recorder
from yolotrt.network.blocks import BLOCKS
from yolotrt.network.builder import NetworkBuilder, summarise
from yolotrt.network.graph import INPUT, ModelGraph
from yolotrt.weights.model import Metadata, Weights


def graph_of(**changes: Any) -> ModelGraph:
    """The tiny model's graph with changes to its yaml."""
    yaml = {**copy.deepcopy(dict(TINY_YAML)), **changes}
    return ModelGraph.from_metadata(tiny_metadata(yaml={key: v for key, v in yaml.items() if v is not ...}))


def with_row(row: Any) -> ModelGraph:
    """The tiny model's graph with another layer 2."""
    backbone = list(copy.deepcopy(TINY_YAML["backbone"]))
    backbone[2] = row
    return graph_of(backbone=backbone)


def test_rows_become_layers_with_absolute_sources():
    graph = graph_of()
    assert [(layer.index, layer.block, layer.sources) for layer in graph.layers] == [
        (0, "Conv", (INPUT,)),
        (1, "Conv", (0,)),
        (2, "C3", (1,)),
        (3, "Conv", (2,)),
        (4, "SPPF", (3,)),
        (5, "nn.Upsample", (4,)),
        (6, "Concat", (5, 2)),
        (7, "Detect", (6, 4)),
    ]
    assert graph.head is graph.layers[7]
    assert graph.layers[2].name == "model.2"
    assert str(graph.layers[2]) == "layer 2 (C3)"


def test_names_in_arguments_become_their_values():
    graph = graph_of()
    assert with_row([-1, 1, "nn.Conv2d", ["na * (nc + 5)", 1]]).layers[2].args == (14, 1)
    assert graph.layers[5].args == (None, 2, "nearest")
    assert graph.head.args == (2, graph.anchors)
    assert with_row([-1, 1, "C3", [32, "False"]]).layers[2].args == (32, False)


# The number of bottlenecks of each C3 in the official models (the yaml's 3, 6, 9, 3 and the head's four times 3).
@pytest.mark.parametrize(
    ("size", "repeats"),
    [
        ("n", (1, 2, 3, 1, 1, 1, 1, 1)),
        ("s", (1, 2, 3, 1, 1, 1, 1, 1)),
        ("m", (2, 4, 6, 2, 2, 2, 2, 2)),
        ("l", (3, 6, 9, 3, 3, 3, 3, 3)),
        ("x", (4, 8, 12, 4, 4, 4, 4, 4)),
    ],
)
def test_depth_multiple_scales_repeats(size, repeats):
    graph = ModelGraph.from_metadata(official_metadata(size))
    assert tuple(layer.repeats for layer in graph.layers if layer.block == "C3") == repeats


# The channels of the official models' backbones.
@pytest.mark.parametrize(
    ("size", "widths"),
    [
        ("n", (16, 32, 64, 128, 256)),
        ("s", (32, 64, 128, 256, 512)),
        ("m", (48, 96, 192, 384, 768)),
        ("l", (64, 128, 256, 512, 1024)),
        ("x", (80, 160, 320, 640, 1280)),
    ],
)
def test_width_multiple_scales_channels(size, widths):
    graph = ModelGraph.from_metadata(official_metadata(size))
    assert tuple(graph.scaled_width(channels) for channels in (64, 128, 256, 512, 1024)) == widths


@pytest.mark.parametrize(
    ("width_multiple", "channel_multiple", "channels", "scaled"),
    [
        (0.25, 8, 100, 32),  # 25 rounded up
        (0.25, 8, 1, 8),
        (1.0, 8, 96, 96),
        (1.0, 1, 37, 37),
        (0.25, 16, 100, 32),
        (0.25, 8, 14, 14),  # as many as the head's own, 2 anchors x (5 + 2 classes), which is not scaled
    ],
)
def test_channels_are_rounded_up_to_the_channel_multiple(width_multiple, channel_multiple, channels, scaled):
    graph = graph_of(width_multiple=width_multiple, channel_multiple=channel_multiple)
    assert graph.scaled_width(channels) == scaled


def test_a_yaml_without_multiples_is_not_scaled():
    graph = graph_of(depth_multiple=..., width_multiple=...)
    assert (graph.layers[2].repeats, graph.scaled_width(40)) == (4, 40)


def test_a_block_that_stands_once_is_not_repeated():
    graph = graph_of(depth_multiple=3.0)
    assert [layer.repeats for layer in graph.layers] == [1, 1, 12, 1, 1, 1, 1, 1]


def test_what_the_head_gives():
    graph = ModelGraph.from_metadata(official_metadata("n", class_count=5))
    assert (graph.anchors_per_level, graph.head_channels, graph.size_multiple) == (3, 30, 32)


def test_a_model_without_levels_has_no_anchors():
    graph = ModelGraph.from_metadata(tiny_metadata(task="classify", strides=(), anchors=()))
    assert (graph.anchors_per_level, graph.head_channels, graph.size_multiple) == (0, 0, 32)


@pytest.mark.parametrize(
    ("args", "mask_count", "prototype_channels"),
    [(["nc", "anchors"], 32, 128), (["nc", "anchors", 5], 5, 128), (["nc", "anchors", 5, 40], 5, 24)],
)
def test_what_segment_gives(args, mask_count, prototype_channels):
    graph = graph_of(head=[[[1, 3], 1, "Segment", args]])
    assert (graph.mask_count, graph.prototype_channels) == (mask_count, prototype_channels)
    assert graph.output_channels == graph.head_channels + 2 * mask_count


@pytest.mark.parametrize("args", [["nc", "anchors", "many"], ["nc", "anchors", 0], ["nc", "anchors", True]])
def test_an_impossible_number_of_masks_is_refused(args):
    graph = graph_of(head=[[[1, 3], 1, "Segment", args]])
    with pytest.raises(GraphError, match=r"layer 5 \(Segment\) has the argument .*: expected a number from 1 to"):
        _ = graph.mask_count


# Each row: what stands in the yaml in place of layer 2, and what the message says.
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([-1, 4, "C3"], "layer 2 of the model's yaml is not [from, number, module, args]: [-1, 4, 'C3']"),
        ([-1, 4, "C3", [32], 1], "layer 2 of the model's yaml is not [from, number, module, args]"),
        ("C3", "layer 2 of the model's yaml is not [from, number, module, args]: 'C3'"),
        (None, "layer 2 of the model's yaml is not [from, number, module, args]: None"),
        ([-1, 4, 7, [32]], "layer 2 of the model's yaml names no module: 7"),
        ([-1, 4, ["C3"], [32]], "layer 2 of the model's yaml names no module: ['C3']"),
        ([-1, 0, "C3", [32]], "layer 2 of the model's yaml (C3) is repeated 0 times: expected 1 to 1000"),
        ([-1, 1.5, "C3", [32]], "layer 2 of the model's yaml (C3) is repeated 1.5 times"),
        ([-1, True, "C3", [32]], "layer 2 of the model's yaml (C3) is repeated True times"),
        ([-1, 10**9, "C3", [32]], "layer 2 of the model's yaml (C3) is repeated 1000000000 times"),
        ([2, 4, "C3", [32]], "layer 2 of the model's yaml (C3) reads from layer 2: only earlier layers"),
        ([3, 4, "C3", [32]], "layer 2 of the model's yaml (C3) reads from layer 3: only earlier layers"),
        ([99, 4, "C3", [32]], "layer 2 of the model's yaml (C3) reads from layer 99: only earlier layers"),
        ([-4, 4, "C3", [32]], "layer 2 of the model's yaml (C3) reads from layer -2: only earlier layers"),
        ([[-1, 5], 1, "Concat", [1]], "layer 2 of the model's yaml (Concat) reads from layer 5: only earlier"),
        (["1", 4, "C3", [32]], "layer 2 of the model's yaml (C3) reads from '1': expected a layer number"),
        ([1.0, 4, "C3", [32]], "layer 2 of the model's yaml (C3) reads from 1.0: expected a layer number"),
        ([None, 4, "C3", [32]], "layer 2 of the model's yaml (C3) reads from None: expected a layer number"),
        ([True, 4, "C3", [32]], "layer 2 of the model's yaml (C3) reads from True: expected a layer number"),
        ([-1, 4, "C3", 32], "layer 2 of the model's yaml (C3) has arguments that are no list: 32"),
        ([-1, 4, "C3", {"c2": 32}], "layer 2 of the model's yaml (C3) has arguments that are no list"),
        ([-1, 4, "C3", [10**6]], "layer 2 of the model's yaml (C3) has the argument 1000000: expected at most 65536"),
        ([-1, 4, "C3", [float("nan")]], "layer 2 of the model's yaml (C3) has the argument nan"),
        ([-1, 4, "C3", [float("inf")]], "layer 2 of the model's yaml (C3) has the argument inf"),
        ([-1, 4, "C3", [{"c2": 32}]], "layer 2 of the model's yaml (C3) has an argument that no block takes"),
        ([-1, 4, "C3", [[1] * 1001]], "layer 2 of the model's yaml (C3) has an argument that no block takes"),
    ],
)
def test_a_wrong_row_is_named(row, message):
    with pytest.raises(GraphError) as problem:
        with_row(row)
    assert message in str(problem.value)
    assert len(str(problem.value)) < 250
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": [], "head": []}, "the model's yaml has 0 layers: expected 1 to 1000"),
        ({"backbone": ..., "head": ...}, "the model's yaml has 0 layers"),
        ({"head": [[-1, 1, "Conv", [8]]] * 1000}, "the model's yaml has 1005 layers: expected 1 to 1000"),
        ({"backbone": "Conv"}, "the model's yaml has a backbone that is no list"),
        ({"head": None}, "the model's yaml has a head that is no list"),
        ({"depth_multiple": "0.33"}, "the model's yaml has depth_multiple = '0.33': expected a number from 0 to 100"),
        ({"depth_multiple": -1}, "the model's yaml has depth_multiple = -1: expected a number from 0 to 100"),
        ({"width_multiple": None}, "the model's yaml has width_multiple = None: expected a number"),
        ({"width_multiple": float("nan")}, "the model's yaml has width_multiple = nan: expected a number"),
        ({"width_multiple": 1e9}, "the model's yaml has width_multiple = 1000000000.0: expected a number from 0 to"),
        ({"width_multiple": True}, "the model's yaml has width_multiple = True: expected a number"),
        ({"channel_multiple": 0}, "the model's yaml has channel_multiple = 0: expected a number from 1 to 1024"),
        ({"ch": 0}, "the model's yaml has ch = 0: expected a number from 1 to 1024"),
    ],
)
def test_a_wrong_yaml_is_refused(changes, message):
    with pytest.raises(GraphError) as problem:
        graph_of(**changes)
    assert message in str(problem.value)


# --- fuzzing: whatever the metadata hold, the answer is a network or one clear line, and it comes soon ---

SECONDS = 5
"""A build of the tiny model takes some 20 ms."""

FILE_SIZE = 1_000_000
"""Values that a tensor of a small file can have at most: what a yaml asks for beyond is missing there."""

ODDITIES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-70, 70),
    st.sampled_from([2**31, 2**63, -(2**63), 10**400]),
    st.floats(),
    st.sampled_from(["nc", "anchors", "None", "na * (nc + 5)", "__class__", "", *BLOCKS]),
    st.lists(st.integers(-3, 9), max_size=4),
    st.dictionaries(st.sampled_from(["a", "nc"]), st.integers(), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value inside nested lists and dictionaries."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with `new` at the path."""
    if not path:
        return new
    result = copy.copy(value)
    result[path[0]] = replaced(value[path[0]], path[1:], new)
    return result


PLACES = [path for path in places(dict(TINY_YAML)) if path]


def attempt(metadata: dict[str, Any]) -> None:
    """Build a network from made-up metadata; anything but success or a YolotrtError is a failure."""
    start = time.perf_counter()
    try:
        weights = made_up_weights(Metadata(**metadata), FILE_SIZE)
        NetworkBuilder(recorder.Network(), recorder, weights, compute_dtype=recorder.float32).build(1, 64, 64)
        summarise(Weights({}, weights.metadata), 64, 64)
    except YolotrtError as problem:
        assert "\n" not in str(problem)
        assert len(str(problem)) < 1000
    assert time.perf_counter() - start < SECONDS


TINY_FIELDS = {name: getattr(tiny_metadata(), name) for name in ("yaml", "names", "strides", "anchors", "imgsz")}


ARGUMENTS = st.lists(
    st.one_of(
        *(st.integers(-2, 40), st.booleans(), st.none(), st.floats(-2, 3)),
        st.sampled_from(["nc", "anchors", "nearest", "x"]),
        st.lists(st.integers(-1, 9), max_size=3),
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 7), st.integers(1, 3), st.sampled_from(sorted(BLOCKS)), ARGUMENTS)
def test_any_block_with_any_arguments_gives_a_network_or_one_clear_line(place, number, block, args):
    rows = copy.deepcopy([*TINY_YAML["backbone"], *TINY_YAML["head"]])
    rows[place] = [rows[place][0], number, block, args]
    attempt({**TINY_FIELDS, "yaml": {**TINY_YAML, "backbone": rows, "head": []}})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PLACES), ODDITIES), min_size=1, max_size=2))
def test_any_yaml_gives_a_network_or_one_clear_line(changes):
    yaml = copy.deepcopy(dict(TINY_YAML))
    for path, new in changes:
        try:
            yaml = replaced(yaml, path, new)
        except (TypeError, LookupError):  # an earlier change took the place away
            continue
    attempt({**TINY_FIELDS, "yaml": yaml})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(
        [
            *("names", "strides", "anchors", "imgsz", "activation", "activations"),
            *("batch_norm_epsilon", "batch_norm_epsilons", "task", "version"),
        ]
    ),
    st.one_of(
        ODDITIES,
        st.tuples(st.integers(-9, 99)),
        st.tuples(st.integers(1, 64), st.integers(1, 64)),
        st.tuples(st.text(max_size=3), st.text(max_size=3)),
        st.lists(st.tuples(st.tuples(st.floats(), st.floats())), min_size=2, max_size=2).map(tuple),
        st.sampled_from(["SiLU", "LeakyReLU(0.1)", "LeakyReLU(", "LeakyReLU(x)", "ReLU6", "Conv2d", "SiLU()"]),
        st.dictionaries(st.sampled_from(["model.0.act", "model.9"]), st.text(max_size=5), max_size=1),
    ),
)
def test_any_metadata_give_a_network_or_one_clear_line(name, value):
    attempt({**TINY_FIELDS, name: value})


def test_the_fuzzed_model_is_right_before_it_is_changed():
    weights = made_up_weights(Metadata(**TINY_FIELDS))
    NetworkBuilder(recorder.Network(), recorder, weights, compute_dtype=recorder.float32).build(1, 64, 64)
    assert len(PLACES) > 50
