from __future__ import annotations

import hashlib
import http.server
import io
import re
import sys
import threading

import pytest

from yolotrt.errors import CheckpointError, OutputError, YolotrtError
from yolotrt.weights import official
from yolotrt.weights.official import ASSETS, BASE_URL, OFFICIAL_NAMES, Asset, fetch_official

NAME = "yolov5s.pt"
CONTENT = bytes(range(256)) * 12_000  # about three chunks


@pytest.fixture
def server():
    """A server on this machine; `served` maps paths to bodies, `requests` lists what was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            body = self.server.served.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(self.server.declared or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.served, running.requests, running.declared = {f"/v/{NAME}": CONTENT}, [], 0
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.url = f"http://127.0.0.1:{running.server_port}/v"
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def known(monkeypatch):
    """The table says that the file has `CONTENT`."""
    monkeypatch.setitem(ASSETS, NAME, Asset(len(CONTENT), hashlib.sha256(CONTENT).hexdigest()))


def test_table_has_plausible_entries():
    assert set(ASSETS) <= OFFICIAL_NAMES
    assert len({asset.sha256 for asset in ASSETS.values()}) == len(ASSETS)
    for asset in ASSETS.values():
        assert re.fullmatch("[0-9a-f]{64}", asset.sha256)
        assert 4_000_000 < asset.size < 300_000_000


def test_table_agrees_with_the_official_file(golden):
    data = (golden / "weights" / "yolov5n.pt").read_bytes()
    assert ASSETS["yolov5n.pt"] == Asset(len(data), hashlib.sha256(data).hexdigest())


def test_file_is_downloaded_once(server, known, tmp_path):
    folder = tmp_path / "new"
    assert fetch_official(NAME, folder, base_url=server.url) == folder / NAME
    assert fetch_official(NAME, folder, base_url=server.url) == folder / NAME
    assert (folder / NAME).read_bytes() == CONTENT
    assert server.requests == [f"/v/{NAME}"]
    assert [path.name for path in folder.iterdir()] == [NAME]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (CONTENT[:-1], "does not have 3072000 bytes"),
        (CONTENT + b"x", "does not have 3072000 bytes"),
        (CONTENT[:-1] + b"x", "wrong SHA-256"),
        (b"", "does not have 3072000 bytes"),
    ],
)
def test_wrong_download_leaves_no_file(server, known, tmp_path, body, message):
    server.served[f"/v/{NAME}"] = body
    with pytest.raises(CheckpointError, match=f"{message}.*: download it elsewhere and pass it with -w"):
        fetch_official(NAME, tmp_path, base_url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_broken_connection_leaves_no_file(server, known, tmp_path):
    server.served[f"/v/{NAME}"] = CONTENT[:1000]
    server.declared = len(CONTENT)
    with pytest.raises(YolotrtError, match=r"/v/yolov5s\.pt.*pass it with -w"):
        fetch_official(NAME, tmp_path, base_url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_http_error_names_the_address(server, known, tmp_path):
    server.served.clear()
    with pytest.raises(YolotrtError) as caught:
        fetch_official(NAME, tmp_path, base_url=server.url)
    assert str(caught.value) == (
        f"{server.url}/{NAME} answers 404 Not Found: download it elsewhere and pass it with -w"
    )
    assert caught.value.exit_status == 1


def test_missing_connection_names_the_address(known, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise official.urllib.error.URLError(OSError("no route"))

    monkeypatch.setattr(official.urllib.request, "urlopen", offline)
    with pytest.raises(YolotrtError) as caught:
        fetch_official(NAME, tmp_path)
    assert str(caught.value) == (
        f"{BASE_URL}/{NAME} cannot be downloaded (no route): download it elsewhere and pass it with -w"
    )
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_that_name_is_neither_used_nor_replaced(server, known, tmp_path):
    own = tmp_path / NAME
    own.write_bytes(b"my own model")
    with pytest.raises(CheckpointError, match="not the official file of that name"):
        fetch_official(NAME, tmp_path, base_url=server.url)
    assert own.read_bytes() == b"my own model"
    assert server.requests == []


def test_file_without_known_hash_is_not_downloaded(server, tmp_path):
    name = next(iter(OFFICIAL_NAMES - set(ASSETS)))
    with pytest.raises(CheckpointError, match=f"no known hash.*: download {BASE_URL}/{name} yourself"):
        fetch_official(name, tmp_path)
    assert server.requests == []


@pytest.mark.parametrize("name", ["yolov8n.pt", "../yolov5s.pt", "", "yolov5s"])
def test_other_names_are_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match="no official YOLOv5 checkpoint: use one such as"):
        fetch_official(name, tmp_path)


def test_folder_that_cannot_be_made_is_an_output_error(server, known, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError):
        fetch_official(NAME, tmp_path / "file", base_url=server.url)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_only_on_a_terminal(server, known, tmp_path, monkeypatch, is_terminal):
    screen = io.StringIO()
    screen.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", screen)
    fetch_official(NAME, tmp_path, base_url=server.url)
    assert (NAME in screen.getvalue()) == is_terminal
