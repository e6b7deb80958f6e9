from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from yolotrt.errors import InputError
from yolotrt.evaluation.dataset import Dataset, Problem, Problems, label_file, read_dataset

NAMES = ("cat", "dog", "bird")
SIZE = (100, 200)  # height, width


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def yolo(labels: dict[str, str | None], **changes: object) -> Path:
    """A data.yaml with one (empty) picture file for each entry; None has no label file."""
    for name, text in labels.items():
        picture = Path("images/val") / f"{name}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.touch()
        if text is not None:
            label_file(picture).parent.mkdir(parents=True, exist_ok=True)
            label_file(picture).write_text(text)
    values = {"val": "images/val", "names": list(NAMES), **changes}
    Path("data.yaml").write_text(json.dumps(values))  # JSON is YAML
    return Path("data.yaml")


def coco(annotations: list[dict], **changes: object) -> Path:
    """A COCO json with two pictures and categories that are not numbered as the model's classes."""
    values = {
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": 100, "width": 200} for number in (1, 2)],
        "categories": [{"id": 90, "name": "cat"}, {"id": 7, "name": "Dog"}, {"id": 1, "name": "bird"}],
        "annotations": annotations,
        **changes,
    }
    Path("data.json").write_text(json.dumps(values))
    return Path("data.json")


def counts(dataset: Dataset) -> dict[str, int]:
    """Reads every picture's labels; the number of problems by kind."""
    for picture in dataset.pictures:
        picture.labels_in(SIZE, dataset.problems)
    return {kind.name: count for kind, count in dataset.problems.counts().items()}


GOOD = "1 0.5 0.5 0.2 0.4\n"

YOLO_CASES = [
    # label files, problems, labels left
    ({"a": GOOD}, {}, 1),
    ({"a": GOOD, "b": None}, {"NO_LABELS": 1}, 1),
    ({"a": GOOD, "b": "", "c": "\n \n"}, {"EMPTY_LABELS": 2}, 1),
    ({"a": GOOD + "3 .5 .5 .1 .1\n-1 .5 .5 .1 .1\n1.5 .5 .5 .1 .1\n"}, {"BAD_CLASS": 3}, 1),
    ({"a": GOOD + "1 .5 .5\ncat .5 .5 .1 .1\n1 .5 nan .1 .1\n1 .1 .1 .2 .2 .3\n"}, {"BAD_LABEL": 4}, 1),
    ({"a": GOOD + "1 0.99 0.5 0.2 0.4\n"}, {"STICKS_OUT": 1}, 2),
    ({"a": GOOD + "1 1.5 0.5 0.2 0.4\n1 .5 .5 0 .1\n1 .5 .5 -.1 .1\n"}, {"OUTSIDE": 3}, 1),
    ({"a": GOOD + GOOD}, {"TWICE_LABEL": 1}, 1),
    ({"a": "1 0.4 0.3 0.6 0.3 0.6 0.7\n"}, {}, 1),  # an outline
    ({"a": "1 0.501 0.5 1.0 1.0\n"}, {}, 1),  # less than a pixel out: rounding
    ({"a": GOOD, "b": "\xff\x00binary"}, {"BAD_LABEL": 1}, 1),
]


@pytest.mark.parametrize(("files", "problems", "left"), YOLO_CASES)
def test_yolo_labels_with_faults_are_counted_and_the_rest_is_used(files, problems, left):
    dataset = read_dataset(yolo(files), NAMES)
    assert counts(dataset) == problems
    assert sum(len(picture.labels_in(SIZE, Problems())) for picture in dataset.pictures) == left


def test_a_yolo_box_is_in_pixels_and_of_its_class():
    (picture,) = read_dataset(yolo({"a": GOOD}), NAMES).pictures
    labels = picture.labels_in(SIZE, Problems())
    assert labels.xyxy.tolist() == [pytest.approx([80, 30, 120, 70])]
    assert (labels.class_id.tolist(), labels.area.tolist()) == ([1], [pytest.approx(1600)])


def test_a_box_that_sticks_out_is_clipped():
    (picture,) = read_dataset(yolo({"a": "1 0.99 0.5 0.2 0.4\n"}), NAMES).pictures
    problems = Problems()
    assert picture.labels_in(SIZE, problems).xyxy.tolist() == [pytest.approx([178, 30, 200, 70])]
    assert problems.lines()[0].startswith("1 boxes that stick out of their picture, clipped: a.jpg [178")


def test_pictures_listed_twice_are_taken_once():
    yolo({"a": GOOD, "b": GOOD})
    Path("val.txt").write_text("images/val/a.jpg\n# a comment\n\nimages/val/b.jpg\n./images/val/a.jpg\n")
    dataset = read_dataset(yolo({}, val=["val.txt", "images/val"]), NAMES)
    assert [picture.path.name for picture in dataset.pictures] == ["a.jpg", "b.jpg"]
    assert dataset.problems.names(Problem.TWICE_LISTED) == ["a.jpg", "a.jpg", "b.jpg"]


@pytest.mark.parametrize(("names", "ids"), [(("7", "000012"), [12, 7]), (("a", "7"), ["7.jpg", "a.jpg"])])
def test_pictures_are_known_by_their_number_or_else_their_name(names, ids):
    dataset = read_dataset(yolo(dict.fromkeys(names, GOOD)), NAMES)
    assert sorted(map(str, (picture.image_id for picture in dataset.pictures))) == sorted(map(str, ids))


@pytest.mark.parametrize("path", ["sub", "./sub", "~nobody-of-this-name/x"])
def test_path_of_a_yaml_is_beside_it(path, folder):
    data = yolo({"a": GOOD}, path=path)
    if path.endswith("sub"):
        Path("sub").mkdir()
        Path("images").rename("sub/images")
        Path("labels").rename("sub/labels")
        assert len(read_dataset(folder / data, NAMES).pictures) == 1


ANNOTATION = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 20, 30, 40], "area": 600, "iscrowd": 0}

COCO_CASES = [
    # annotations, problems (the second picture never has labels), labels left
    ([ANNOTATION], {}, 1),
    ([ANNOTATION, {**ANNOTATION, "id": 2, "image_id": 9}], {"NO_PICTURE": 1}, 1),
    ([ANNOTATION, {**ANNOTATION, "category_id": 3}], {"BAD_CLASS": 1}, 1),
    ([ANNOTATION, {**ANNOTATION, "bbox": [1, 2, 3]}, {"id": 3}, 5], {"BAD_LABEL": 3}, 1),
    ([ANNOTATION, {**ANNOTATION, "bbox": [150, 20, 80, 40]}], {"STICKS_OUT": 1}, 2),
    ([ANNOTATION, {**ANNOTATION, "bbox": [250, 20, 80, 40]}], {"OUTSIDE": 1}, 1),
    ([ANNOTATION, {**ANNOTATION, "bbox": [10, 20, 0, 40]}], {"OUTSIDE": 1}, 1),
    ([ANNOTATION, ANNOTATION], {"TWICE_LABEL": 1}, 1),
]


@pytest.mark.parametrize(("annotations", "problems", "left"), COCO_CASES)
def test_coco_annotations_with_faults_are_counted_and_the_rest_is_used(annotations, problems, left):
    dataset = read_dataset(coco(annotations), NAMES)
    assert counts(dataset) == {"EMPTY_LABELS": 1, **problems}
    assert sum(len(picture.labels_in(SIZE, Problems())) for picture in dataset.pictures) == left


def test_coco_categories_are_found_by_their_names():
    dataset = read_dataset(coco([{**ANNOTATION, "category_id": number} for number in (90, 7, 1)]), NAMES)
    assert dataset.pictures[0].labels.class_id.tolist() == [0, 1, 2]
    assert dataset.category_ids == (90, 7, 1)
    assert dataset.pictures[0].labels.area.tolist() == [600] * 3  # of the outline, not of the box


CLASS_CASES = [
    # the data's names by number, the model's, the class index of each number
    ({1: "kitten", 2: "doggy", 9: "bird"}, NAMES, {1: 0, 2: 1, 9: 2}),  # as many: by their order
    ({5: "bird", 6: "tree"}, NAMES, {5: 2}),  # one class is foreign
    ({5: "bird"}, NAMES, {5: 2}),
    ({0: "traffic_light"}, ("car", "Traffic  Light"), {0: 1}),
]


@pytest.mark.parametrize(("categories", "names", "expected"), CLASS_CASES)
def test_classes_of_data_and_model_are_brought_together(categories, names, expected):
    numbers = sorted(categories)
    annotations = [{**ANNOTATION, "category_id": number} for number in numbers]
    data = coco(annotations, categories=[{"id": number, "name": categories[number]} for number in numbers])
    dataset = read_dataset(data, names)
    assert dataset.pictures[0].labels.class_id.tolist() == [
        expected[number] for number in numbers if number in expected
    ]
    assert len(dataset.problems.names(Problem.FOREIGN_CLASS)) == len(categories) - len(expected)


def test_pictures_of_a_json_are_found_with_and_without_their_folders(folder):
    data = coco([ANNOTATION], images=[{"id": 1, "file_name": "val2017/1.jpg"}, {"id": 2, "file_name": "2.jpg"}])
    Path("images").mkdir()
    for name in ("images/1.jpg", "2.jpg"):
        Path(name).touch()
    assert all(picture.path.is_file() for picture in read_dataset(folder / data, NAMES).pictures)


BAD_DATA = [
    # file name, content, message
    ("missing.yaml", None, "dataset missing.yaml does not exist"),
    ("data.csv", "a,b", "neither a YOLO data.yaml nor a COCO .json"),
    ("data.yaml", "names: [cat", "is no YAML"),
    ("data.yaml", "- a\n- b", "is no YOLO data.yaml"),
    ("data.yaml", "val: images", "has no class names"),
    ("data.yaml", "names: [cat, dog, bird]", "has no 'val' pictures"),
    ("data.yaml", "names: [cat, dog, bird]\nval: nowhere", "nowhere, which does not exist"),
    ("data.yaml", "names: [tree, house]\nval: nowhere", r"2 classes \(tree, house\), the model has 3"),
    ("data.json", "{", "is no JSON"),
    ("data.json", '{"images": [], "annotations": []}', "is no COCO json"),
    ("data.json", '{"images": [], "annotations": [], "categories": [{"id": 1}]}', "without id and name"),
    ("data.json", '{"images": [{}], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}', "image without id"),
    ("data.json", '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}', "has no picture"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_DATA)
def test_data_that_cannot_be_used_are_refused_in_one_line(name, content, message):
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_dataset(Path(name), NAMES)


def test_data_without_any_label_are_refused():
    with pytest.raises(InputError, match=r"no label for any of its 2 pictures: YOLO labels lie in labels/"):
        read_dataset(yolo({"a": None, "b": ""}), NAMES)


def test_a_folder_of_pictures_belongs_to_a_json():
    with pytest.raises(InputError, match="--images belongs to a COCO json"):
        read_dataset(yolo({"a": GOOD}), NAMES, images=Path("images"))


@pytest.mark.parametrize("place", ["images/val", "images/val/*.jpg"])
def test_links_that_lead_nowhere_are_left_for_the_reader_to_name(place):
    data = yolo({"a": GOOD, "b": GOOD}, val=place)
    picture = Path("images/val/b.jpg")
    picture.unlink()
    picture.symlink_to("gone.jpg")
    assert [path.path.name for path in read_dataset(data, NAMES).pictures] == ["a.jpg", "b.jpg"]


def test_a_limit_takes_the_first_pictures():
    dataset = read_dataset(yolo(dict.fromkeys("abc", GOOD)), NAMES, limit=2)
    assert [picture.path.stem for picture in dataset.pictures] == ["a", "b"]


@pytest.mark.parametrize(
    ("picture", "labels"),
    [
        ("/d/images/val/a.jpg", "/d/labels/val/a.txt"),
        ("/images/images/a.b.png", "/images/labels/a.b.txt"),  # the last one
        ("/d/pictures/a.jpg", "/d/pictures/a.txt"),
    ],
)
def test_label_files_lie_where_yolov5_looks_for_them(picture, labels):
    assert label_file(Path(picture)) == Path(labels)


def test_lines_name_the_first_cases_and_count_the_others():
    problems = Problems()
    for number in range(7):
        problems.add(Problem.NO_LABELS, f"{number}.jpg")
    (line,) = problems.lines()
    assert line.startswith("7 pictures without a label file")
    assert line.endswith("0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more")
    assert np.array_equal(problems.names(Problem.NO_LABELS)[:2], ["0.jpg", "1.jpg"])
