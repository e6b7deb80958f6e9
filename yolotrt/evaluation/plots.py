"""The evaluation's pictures: precision-recall, F1 against confidence, confusion matrix. Each is a matplotlib figure."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from yolotrt.errors import BackendUnavailableError
from yolotrt.evaluation.matching import CONFIDENCES, OperatingCurves, mean_of_classes
from yolotrt.evaluation.metrics import RECALLS, Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Float = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

P = ParamSpec("P")
R = TypeVar("R")

INK = "#1b2733"
FAINT = "#c9d3dd"
ACCENT = "#0b6bcb"
COLOURS = ("#0b6bcb", "#d1495b", "#2a9d62", "#e09f1f", "#7a4fc2", "#1596a3", "#c05299", "#6b7a2b", "#8a5a36", "#51606e")
"""Distinct for up to ten classes; with more, classes are drawn faint behind their mean."""

STYLE: Mapping[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#edf1f5",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",  # a reader need not have the font
    "svg.hashsalt": "yolotrt",  # the same figures give the same file
}


def require_matplotlib() -> Any:
    """The module matplotlib.

    Raises:
        BackendUnavailableError: if it is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as problem:
        raise BackendUnavailableError(
            f'matplotlib is not installed ({problem}): run pip install "yolotrtx[eval]"'
        ) from problem
    return mpl


def styled(plot: Callable[P, R]) -> Callable[P, R]:
    """Let a function draw, or write what was drawn, in the house style."""

    @functools.wraps(plot)
    def in_style(*values: P.args, **options: P.kwargs) -> R:
        with require_matplotlib().rc_context(dict(STYLE)):
            return plot(*values, **options)

    return in_style


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, in inches, and its one pair of axes. It belongs to no window and needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


@styled
def precision_recall(measurement: Measurement) -> Figure:
    """Precision against recall of every class at an overlap of 0.50, and their mean."""
    figure, axes = new_axes(6, 4.2)
    metrics = measurement.metrics
    _class_curves(
        axes,
        RECALLS,
        measurement.precision50,
        [_labelled(item.name, item.map50) for item in metrics.classes],
        _labelled("mean of the classes", metrics.map50),
    )
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="Precision and recall, IoU 0.50")
    return figure


@styled
def f1_confidence(curves: OperatingCurves, class_names: Sequence[str]) -> Figure:
    """F1 of every class against the least confidence, their mean, and where that is best."""
    figure, axes = new_axes(6, 4.2)
    mean = mean_of_classes(curves.f1)
    best = curves.best
    note = f"mean, best {mean[best]:.3f} at {CONFIDENCES[best]:.3f}"
    _class_curves(axes, CONFIDENCES, curves.f1, list(class_names), note)
    axes.plot([CONFIDENCES[best]], [mean[best]], "o", color=ACCENT, markersize=6, markeredgecolor="white")
    axes.axvline(CONFIDENCES[best], color=ACCENT, linewidth=0.8, linestyle=(0, (4, 4)))
    axes.set(xlabel="least confidence", ylabel="F1", xlim=(0, 1), ylim=(0, 1.02), title="F1 and confidence, IoU 0.50")
    return figure


def _class_curves(axes: Axes, x: Float, curves: Float, names: Sequence[str], mean_name: str) -> None:
    """One line a class with labels, and the mean of them."""
    shown = [index for index in range(len(curves)) if not np.isnan(curves[index, 0])]
    is_many = len(shown) > len(COLOURS)
    for place, index in enumerate(shown):
        look: dict[str, Any] = (
            {"color": FAINT, "linewidth": 0.6} if is_many else {"color": COLOURS[place], "linewidth": 1.3}
        )
        axes.plot(x, curves[index], label=None if is_many else names[index], **look)
    axes.plot(x, mean_of_classes(curves), color=ACCENT if is_many else INK, linewidth=2.4, label=mean_name)
    axes.legend(loc="upper right")


def _labelled(name: str, value: float | None) -> str:
    """Such as ``person 0.612``."""
    return name if value is None else f"{name} {value:.3f}"


@styled
def confusion(matrix: Index, class_names: Sequence[str]) -> Figure:
    """The confusion matrix, each column as shares of what is there; classes that occur nowhere are left out."""
    last = len(class_names)
    occurs = [*np.flatnonzero(matrix[:last].sum(axis=1) + matrix[:, :last].sum(axis=0)), last]
    names = [*class_names, "background"]
    part = matrix[np.ix_(occurs, occurs)]
    shares = part / np.maximum(part.sum(axis=0, keepdims=True), 1)
    side = min(max(4.6, 0.2 * len(occurs) + 1.6), 18)
    figure, axes = new_axes(side + 0.6, side)
    axes.grid(visible=False)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 10 if len(occurs) <= 15 else 7
    axes.set_xticks(range(len(occurs)), [names[index] for index in occurs], rotation=90, fontsize=size)
    axes.set_yticks(range(len(occurs)), [names[index] for index in occurs], fontsize=size)
    axes.set(xlabel="label", ylabel="found", title="Confusion: share of each column")
    for row, column in _written(shares, len(occurs)):
        axes.text(
            column,
            row,
            f"{shares[row, column]:.2f}",
            ha="center",
            va="center",
            fontsize=size - 1,
            color="white" if shares[row, column] > 0.5 else INK,
        )
    figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02).outline.set_visible(False)
    return figure


def _written(shares: Float, classes: int) -> Iterator[tuple[int, int]]:
    """The places of a confusion matrix whose value fits into its field."""
    if classes <= 15:
        yield from ((int(row), int(column)) for row, column in np.argwhere(shares >= 0.005))


@styled
def latency(points: Sequence[tuple[str, int, float, float | None]]) -> Figure:
    """Latency against the batch size, and accuracy against latency if any was measured.

    Args:
        points: Engine, batch size, milliseconds a batch from file to boxes, mAP50-95 or None.
    """
    from matplotlib.figure import Figure

    has_accuracy = any(accuracy is not None for *_, accuracy in points)
    figure = Figure(figsize=(10, 4.2) if has_accuracy else (6, 4.2), layout="constrained")
    by_batch = figure.add_subplot(1, 2 if has_accuracy else 1, 1)
    engines = list(dict.fromkeys(engine for engine, *_ in points))
    for place, engine in enumerate(engines):
        own = sorted((batch, time) for name, batch, time, _ in points if name == engine)
        by_batch.plot(*zip(*own, strict=True), "o-", color=COLOURS[place % len(COLOURS)], label=engine, markersize=5)
    by_batch.set(xlabel="batch", ylabel="ms a batch, median", title="File to boxes")
    by_batch.set_xticks(sorted({batch for _, batch, *_ in points}))
    by_batch.set_ylim(bottom=0)
    by_batch.legend(loc="upper left")
    if has_accuracy:
        _accuracy_latency(figure.add_subplot(1, 2, 2), engines, points)
    return figure


def _accuracy_latency(
    axes: Axes, engines: Sequence[str], points: Sequence[tuple[str, int, float, float | None]]
) -> None:
    """One point an engine: its smallest batch's time a picture, and its accuracy."""
    for place, engine in enumerate(engines):
        batch, time, accuracy = min((batch, time, value) for name, batch, time, value in points if name == engine)
        if accuracy is not None:
            axes.plot([time / batch], [accuracy], "o", color=COLOURS[place % len(COLOURS)], label=engine, markersize=8)
    axes.set(xlabel="ms a picture, median", ylabel="mAP50-95", title="Accuracy and latency, smallest batch")
    axes.set_xlim(left=0)
    axes.margins(y=0.3)
    axes.legend(loc="best")


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file."""
    return _rendered(figure, "png", dpi=dpi, metadata={"Software": None})


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element for a page."""
    text = _rendered(figure, "svg", metadata={"Date": None, "Creator": None}).decode()
    return text[text.index("<svg") :]


@styled
def _rendered(figure: Figure, form: str, **options: Any) -> bytes:
    """The figure in a file format of matplotlib's."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, **options)
    return buffer.getvalue()
