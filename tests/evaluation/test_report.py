from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from evaluation_cases import boxes, labels, measured

from yolotrt.engines.base import Timing
from yolotrt.engines.file import EngineFile
from yolotrt.evaluation.bootstrap import compare
from yolotrt.evaluation.dataset import Dataset, Problem
from yolotrt.evaluation.matching import confusion_matrix, match, operating_curves
from yolotrt.evaluation.metrics import measure
from yolotrt.evaluation.predict import Predictions
from yolotrt.evaluation.report import ground_truth, page, prediction_records, write_report
from yolotrt.evaluation.run import Evaluation

NAMES = ("<b>cat</b>", "dog & co", "bird")


@pytest.fixture
def evaluation(tiny_engine) -> Evaluation:
    there = labels([(0, 10, 10, 50, 50), (1, 60, 60, 90, 90)])
    pictures = (measured(there, boxes([(0, 0.9, 10, 10, 50, 51), (2, 0.4, 0, 0, 9, 9)]), "<script>"),)
    header = dataclasses.replace(tiny_engine.header, model=dataclasses.replace(tiny_engine.header.model, names=NAMES))
    dataset = Dataset("data.json", (pictures[0].picture,), NAMES, (7, 3, None))
    dataset.problems.add(Problem.BAD_CLASS, "<img src=x>")
    matches = match(pictures, len(NAMES))
    return Evaluation(
        engine=EngineFile(header, b"", None),
        dataset=dataset,
        predictions=Predictions(pictures, Timing(1.0, 2.0, 3.0, 1)),
        measurement=measure(pictures, NAMES),
        matches=matches,
        curves=operating_curves(matches),
        confusion=confusion_matrix(pictures, len(NAMES)),
    )


class _Tags(HTMLParser):
    """All elements with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_whole_and_loads_nothing(evaluation, tmp_path):
    comparison = compare(evaluation.matches, evaluation.matches, 1, draws=10)
    write_report(tmp_path / "new", evaluation, (evaluation, comparison))
    text = (tmp_path / "new" / "report.html").read_text()
    parser = _Tags()
    parser.feed(text)
    kinds = {tag for tag, _ in parser.tags}
    assert {"svg", "img", "table", "details"} <= kinds
    assert not kinds & {"script", "link", "iframe", "object", "b>cat"}
    sources = [value for _, attributes in parser.tags for name, value in attributes.items() if name in {"src", "href"}]
    assert [source for source in sources if source and not source.startswith("data:image/png")] == []
    assert not re.search(r"@import|url\((?!#)", text)  # within an SVG, #... is its own part
    assert "Comparison" in text


def test_names_are_shown_and_not_obeyed(evaluation):
    text = page(evaluation, {"processor": "<i>"}, {"precision_recall": "", "f1_confidence": ""}, b"")
    assert "&lt;b&gt;cat&lt;/b&gt;" in text
    assert "dog &amp; co" in text
    assert not re.search("<b>cat|<img src=x>|<i>", text)


def test_predictions_have_the_datas_own_class_numbers(evaluation):
    # the bird is no class of the data
    assert prediction_records(evaluation) == [
        {"image_id": "<script>", "category_id": 7, "bbox": [10.0, 10.0, 40.0, 41.0], "score": pytest.approx(0.9)}
    ]
    assert [row["category_id"] for row in ground_truth(evaluation)["annotations"]] == [7, 3]
    assert [row["id"] for row in ground_truth(evaluation)["categories"]] == [7, 3]
