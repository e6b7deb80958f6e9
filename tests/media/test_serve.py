from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.media.videos import number_of, numbered
from yolotrt.detections import Detections
from yolotrt.errors import InputError, OutputError
from yolotrt.media.drawing import draw
from yolotrt.media.frames import Clip, Found, Frame
from yolotrt.media.live import CONNECTING, LIVE, LOST, Status
from yolotrt.media.serve import LivePage, parse_address

NAMES = ("cat", "dog")
CLIP = Clip("0", 48, 64, Fraction(25), Fraction(1, 25), is_live=True)


def result(index: int, clip: Clip = CLIP) -> Found:
    detections = Detections(
        np.array([[20, 20, 40, 40]] * 3, np.float32), np.full(3, 0.5, np.float32), np.array([0, 0, 1], np.int32), NAMES,
        (48, 64),
    )  # fmt: skip
    image = numbered(index % 256)
    return Found(Frame(Path("camera0"), image, clip, index, index), detections, draw(image, detections))


@pytest.fixture
def statuses() -> list[Status]:
    return [Status("0", CONNECTING, 0, 0)]


@pytest.fixture
def page(statuses) -> Iterator[LivePage]:
    page = LivePage("0", lambda: statuses)
    yield page
    if not page.is_closed:
        page.close()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and any(t.name == "yolotrt-serve" for t in threading.enumerate()):
        time.sleep(0.01)
    assert not any(t.name == "yolotrt-serve" for t in threading.enumerate())


def get(page: LivePage, path: str, **headers: str) -> bytes:
    request = urllib.request.Request(page.url + path, headers=headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read()


def test_the_state_tells_connection_rate_counts_and_drops(page, statuses):
    state = {"name": "0", "state": CONNECTING, "dropped": 0, "fps": 0.0, "frame": 0, "counts": {}}
    assert json.loads(get(page, "state.json")) == {"sources": [state]}
    statuses[:] = [Status("0", LIVE, 10, 3)]
    for index in range(8):
        page.show(result(index))
        time.sleep(0.01)
    found = json.loads(get(page, "state.json"))["sources"][0]
    assert 20 < found.pop("fps") < 120
    assert found == {"name": "0", "state": LIVE, "dropped": 3, "frame": 7, "counts": {"cat": 2, "dog": 1}}
    statuses[:] = [Status("0", LOST, 10, 3)]
    assert json.loads(get(page, "state.json"))["sources"][0]["state"] == LOST


def test_passwords_are_not_shown(page):
    page.show(result(0, Clip("rtsp://u:secret@host/a", 48, 64, Fraction(25), Fraction(1, 25))))
    assert b"secret" not in get(page, "state.json")


def parts(stream) -> Iterator[bytes]:
    """Pictures of an MJPEG stream."""
    while True:
        length = 0
        while (line := stream.readline().strip()) or not length:
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        yield stream.read(length)


def test_the_picture_is_the_newest_one(page):
    stop = threading.Event()

    def show() -> None:
        index = 0
        while not stop.wait(0.01):
            page.show(result(index))
            index += 1

    thread = threading.Thread(target=show)
    thread.start()
    with urllib.request.urlopen(page.url + "picture.mjpg?source=0", timeout=5) as stream:
        assert stream.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
        pictures = parts(stream)
        numbers = []
        for _ in range(10):
            image = cv2.imdecode(np.frombuffer(next(pictures), np.uint8), cv2.IMREAD_COLOR)
            numbers.append(number_of(image))
        time.sleep(0.3)  # a viewer that sleeps
        for _ in range(40):
            latest = next(pictures)
        newest = number_of(cv2.imdecode(np.frombuffer(latest, np.uint8), cv2.IMREAD_COLOR))
    stop.set()
    thread.join()
    assert numbers == sorted(set(numbers))
    assert newest > numbers[-1] + 10


def test_closing_ends_the_viewers_stream(page):
    page.show(result(0))
    with urllib.request.urlopen(page.url + "picture.mjpg?source=0", timeout=5) as stream:
        next(parts(stream))
        page.close()
        assert stream.read() is not None  # it ends


def test_only_this_machine_is_answered_and_by_its_own_name(page):
    port = page.url.rsplit(":", 1)[1].strip("/")
    assert page.url.startswith("http://127.0.0.1:")
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert get(page, "state.json", Host=host)
    with pytest.raises(urllib.error.HTTPError) as refused:  # a page elsewhere whose name resolves to this machine
        get(page, "state.json", Host=f"evil.example:{port}")
    assert refused.value.code == 403


@pytest.mark.parametrize("path", ["x", "../cli.py", "state.json/..", "picture.mjpg/x", "%2e%2e/cli.py"])
def test_there_is_nothing_else(page, path):
    with pytest.raises(urllib.error.HTTPError) as missing:
        get(page, path)
    assert missing.value.code == 404


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8000", ("127.0.0.1", 8000)),
        ("0", ("127.0.0.1", 0)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("host:1", ("host", 1)),
        ("[::1]:9", ("::1", 9)),
        (":9", ("127.0.0.1", 9)),
    ],
)
def test_addresses(address, expected):
    assert parse_address(address) == expected


@pytest.mark.parametrize("address", ["", "x", "8000x", "host:", "65536", "-1", "http://a"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError, match="is no address: give a port such as 8000, or HOST:PORT"):
        parse_address(address)


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=rf"cannot serve on 127\.0\.0\.1:{port} \(.*\): choose another --serve"):
            LivePage(str(port))


# --- in a browser ---


class Browser:
    """Headless Chromium, driven by its own WebDriver server (W3C WebDriver, JSON over HTTP)."""

    def __init__(self, profile: Path) -> None:
        driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
        if driver is None or chromium is None:
            pytest.skip("chromium and chromedriver are not installed")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._process = subprocess.Popen(
            [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}
        )
        self._base = f"http://127.0.0.1:{port}"
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", "--window-size=1000,800", f"--user-data-dir={profile}",
        ]  # fmt: skip
        options = {"binary": chromium, "args": flags}
        deadline = time.monotonic() + 20
        while not self._is_up():
            assert time.monotonic() < deadline, "chromedriver does not answer"
            time.sleep(0.05)
        self._session = ""
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self._session = f"/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str):
        return self._call("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def wait_for(self, script: str, seconds: float = 10):
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}; the page: {self.run('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        self._call("DELETE", "")
        self._process.terminate()
        self._process.wait()

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._base}/status", timeout=5) as answer:
                return bool(json.load(answer)["value"]["ready"])
        except OSError:
            return False

    def _call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._base + (self._session + path if hasattr(self, "_session") else path), data, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


PIXELS = """(() => {
    const picture = document.querySelector("article img"), canvas = document.createElement("canvas");
    if (!picture.naturalWidth) return "";
    canvas.width = picture.naturalWidth; canvas.height = picture.naturalHeight;
    canvas.getContext("2d").drawImage(picture, 0, 0);
    return canvas.toDataURL();
})()"""


def test_the_page_in_a_browser_shows_the_live_picture_and_the_counts(browser, page, statuses, tmp_path):
    statuses[:] = [Status("0", LIVE, 500, 7)]
    stop = threading.Event()

    def show() -> None:
        index = 0
        while not stop.wait(0.03):
            page.show(result(index))
            index += 1

    thread = threading.Thread(target=show)
    thread.start()
    try:
        browser.open(page.url)
        first = browser.wait_for(PIXELS)
        browser.wait_for(f"{PIXELS} != {json.dumps(first)}")  # it moves
        assert browser.run("[...document.querySelectorAll('li')].map(item => item.innerText)") == ["2cat", "1dog"]
        assert browser.run("document.querySelector('.state').innerText") == "live"
        assert browser.run("document.querySelector('.dropped').innerText") == "7"
        assert browser.wait_for("parseFloat(document.querySelector('.fps').innerText)") > 5
        assert browser.run("document.getElementById('link').innerText") == "connected"
        statuses[:] = [Status("0", LOST, 500, 7)]
        browser.wait_for("document.querySelector('.state.lost')?.innerText == 'lost'")
        browser.screenshot(tmp_path / "page.png")
        assert cv2.imread(str(tmp_path / "page.png")).std() > 10
    finally:
        stop.set()
        thread.join()
    page.close()
    browser.wait_for("document.getElementById('link').innerText == 'the program has ended or cannot be reached'")


def test_a_written_video_plays_in_a_browser(browser, tmp_path):
    pytest.importorskip("av")
    from yolotrt.media.video_writer import VideoWriter

    clip = Clip("x", 48, 64, Fraction(25), Fraction(1, 25))
    writer = VideoWriter(tmp_path / "a.mp4", clip)
    for index in range(60):
        writer.write(Frame(Path("x"), numbered(index), clip, index, index), numbered(index))
    writer.close()
    (tmp_path / "a.html").write_text("<video id=v muted autoplay src=a.mp4></video>")
    browser.open((tmp_path / "a.html").as_uri())
    assert browser.wait_for("v.ended && v.duration", 20) == pytest.approx(2.4, abs=0.05)
    assert browser.run("[v.videoWidth, v.videoHeight]") == [64, 48]
    assert browser.run("v.error") is None
