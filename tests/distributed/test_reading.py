"""Reading without a cluster: what a task of Ray's does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed")

import pyarrow as pa

from yolotrt.distributed import reading
from yolotrt.distributed import run as run_module
from yolotrt.distributed.items import Block, Item, list_items
from yolotrt.distributed.reading import read_block
from yolotrt.distributed.run import DistributedRun, Settings
from yolotrt.distributed.storage import Storage
from yolotrt.errors import InputError
from yolotrt.media.frames import Span
from yolotrt.media.images import read_image


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(reading, "_FIRST_PAUSE_S", 0.0)


def rows(items: list[Item]) -> list[dict]:
    return pa.concat_tables(read_block(Block(tuple(items)))).to_pylist()


def test_files_of_a_store_are_read_as_those_of_a_disk(pictures):
    """`file://` is a store of fsspec like any other."""
    found = list_items([f"file://{pictures}"], Span())
    assert [item.source for item in found] == [f"file://{path}" for path in sorted(pictures.iterdir())]
    *read, last = rows(found)
    assert (last["total"], last["position"]) == (11, 11)
    for item, row in zip(found, read, strict=True):
        if row["error"] is None:
            pixels = np.frombuffer(row["bgr"], np.uint8).reshape(row["height"], row["width"], 3)
            np.testing.assert_array_equal(pixels, read_image(Path(item.source.removeprefix("file://"))))
    assert [row["error"] is None for row in read] == [True] * 10 + [False]


class Denied:
    """A store that gives some files, and others at the third time or not at all."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: dict[str, int] = {}

    def cat_file(self, path: str) -> bytes:
        self.asked[path] = self.asked.get(path, 0) + 1
        if "gone" in path:
            raise FileNotFoundError(path)
        if "secret" in path or ("slow" in path and self.asked[path] < 3):
            raise PermissionError("Access Denied")
        return self.data


@pytest.fixture
def store(pictures, monkeypatch) -> Denied:
    denied = Denied((pictures / "0.png").read_bytes())
    monkeypatch.setattr(reading, "open_filesystem", lambda url: (denied, url.split("://")[1]))
    return denied


def test_a_file_that_a_store_denies_is_tried_again_by_another_run(store):
    names = ("good.png", "slow.png", "secret.png", "gone.png")
    found = rows([Item(f"s3://bucket/{name}") for name in names])
    assert [(row["error"] is None, bool(row["again"])) for row in found] == [
        (True, False),
        (True, False),
        (False, True),
        (False, False),
        (True, False),
    ]
    assert "s3://bucket/secret.png cannot be read (PermissionError: Access Denied): check its name" in found[2]["error"]
    assert "does not exist any more" in found[3]["error"]


def test_a_store_that_gives_nothing_ends_the_run_with_one_line(store, engine_path, tmp_path, monkeypatch):
    """What was found before stays, and nothing of the block is taken for done."""
    run = DistributedRun(engine_path, ["unused"], Settings("local", str(tmp_path / "out")))
    block = Block(tuple(Item(f"s3://bucket/secret{n}.png") for n in range(3)))
    table = pa.concat_tables(read_block(block)).slice(0, 3)
    with pytest.raises(InputError, match=r"nothing of s3://bucket/secret0.png ... .*secret2.png could be read"):
        run._record(block, table)
    assert not (tmp_path / "out").exists()


def test_a_bucket_that_cannot_be_listed_is_one_line(monkeypatch):
    class Closed:
        def find(self, path):
            raise PermissionError("Access Denied")

    monkeypatch.setattr("yolotrt.distributed.items.open_filesystem", lambda _url: (Closed(), "bucket/x"))
    with pytest.raises(InputError, match=r"^s3://bucket/x cannot be read \(PermissionError: Access Denied\): check"):
        list_items(["s3://bucket/x"], Span())


def test_results_go_to_a_store_as_to_a_disk(tmp_path):
    for root in (str(tmp_path / "disk"), f"file://{tmp_path}/store"):
        storage = Storage(root)
        assert storage.read("a/b.json") is None
        assert storage.names("a") == []
        storage.write("a/b.json", b"1")
        storage.write("a/b.json", b"2")
        assert list(storage.contents("a")) == [b"2"]
        storage.remove("a/b.json")
        assert storage.names("a") == []


def test_a_record_that_is_none_is_named(engine_path, tmp_path):
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "x.json").write_text("{}")
    run = DistributedRun(engine_path, ["unused"], Settings("local", str(tmp_path)))
    with pytest.raises(InputError, match=f"{run_module.MANIFEST} holds a file that is no record"):
        run._finished_items()
