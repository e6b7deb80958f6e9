"""A small page with the live picture, for machines without a display; only this machine can open it by default."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import cv2

from yolotrt.errors import InputError, OutputError
from yolotrt.media.frames import Found, Image
from yolotrt.media.live import Status
from yolotrt.media.sources import public_name
from yolotrt.media.window import FrameRate
from yolotrt.shell import THREAD_PREFIX

DEFAULT_HOST = "127.0.0.1"
_JPEG_QUALITY = 80
_WAIT_S = 1.0
"""After this long without a new frame a viewer gets the old one again, which also shows who has gone."""
_VIEWER_TIMEOUT_S = 10.0
"""Of a viewer that takes nothing more."""
_BOUNDARY = "frame"
_PAGE = Path(__file__).with_name("live_page.html")
_POLICY = "default-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass
class _Channel:
    """What is known of one source."""

    picture: Image | None = None
    number: int = 0
    fps: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    frame: int = 0
    rate: FrameRate = field(default_factory=FrameRate)


class LivePage:
    """Serves the newest result of every source on a page, until closed.

    The page's picture is an MJPEG stream; a frame is encoded for viewers only, and who is slow misses frames.

    Args:
        address: ``PORT`` or ``HOST:PORT``; the host is 127.0.0.1 unless given. Port 0 takes a free one.
        statuses: Gives the state of live sources; an empty list for files.

    Attributes:
        url: The page's address.

    Raises:
        InputError: if the address is malformed.
        OutputError: if it cannot be listened on.
    """

    def __init__(self, address: str, statuses: Callable[[], Sequence[Status]] = list) -> None:
        host, port = parse_address(address)
        self._changed = threading.Condition()
        self._channels: dict[str, _Channel] = {}
        self._statuses = statuses
        self._is_closed = False
        try:
            self._server = _Server((host, port), self)
        except OSError as problem:
            raise OutputError(
                f"cannot serve on {host}:{port} ({problem.strerror or problem}): choose another --serve port"
            ) from problem
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, name=f"{THREAD_PREFIX}-serve", daemon=True)
        self._thread.start()

    def show(self, found: Found) -> bool:
        """Make a result the newest of its source; the run goes on."""
        frame = found.frame
        name = public_name(str(frame.path) if frame.clip is None else frame.clip.source)
        with self._changed:
            channel = self._channels.setdefault(name, _Channel())
            channel.picture = frame.pixels if found.drawn is None else found.drawn
            channel.number += 1
            channel.frame = frame.index
            channel.fps = channel.rate.tick()
            channel.counts = found.detections.counts()
            self._changed.notify_all()
        return True

    def idle(self) -> bool:
        """Nothing to do; the run goes on."""
        return True

    def state(self) -> dict[str, Any]:
        """What the page shows beside the pictures."""
        with self._changed:
            states = {status.name: status for status in self._statuses()}
            names = list(dict.fromkeys([*states, *self._channels]))
            return {"sources": [self._source_state(name, states.get(name)) for name in names]}

    def next_jpeg(self, name: str, after: int) -> tuple[bytes, int] | None:
        """The newest picture of a source as JPEG, once it is newer than number `after` or a second has gone by.

        Returns:
            The bytes and the picture's number; None if there is none yet; also once the page is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._number(name) > after, _WAIT_S)
            channel = self._channels.get(name)
            if self._is_closed or channel is None or channel.picture is None:
                return None
            picture, number = channel.picture, channel.number
        encoded, data = cv2.imencode(".jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY))
        return (data.tobytes(), number) if encoded else None

    @property
    def is_closed(self) -> bool:
        """Whether viewers are to go."""
        return self._is_closed

    def close(self) -> None:
        """Stop serving."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _number(self, name: str) -> int:
        return self._channels[name].number if name in self._channels else 0

    def _source_state(self, name: str, status: Status | None) -> dict[str, Any]:
        channel = self._channels.get(name, _Channel())
        return {
            "name": name,
            "state": "live" if status is None else status.state,
            "dropped": 0 if status is None else status.dropped,
            "fps": round(channel.fps, 1),
            "frame": channel.frame,
            "counts": channel.counts,
        }


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of ``PORT``, ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        InputError: if it is none of them.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--serve {address} is no address: give a port such as 8000, or HOST:PORT")
    return host.strip("[]") or DEFAULT_HOST, int(port)


class _Server(http.server.ThreadingHTTPServer):
    """Hands its page to the handlers."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], page: LivePage) -> None:
        self.page = page
        self.is_local = address[0] in _LOOPBACK
        if ":" in address[0]:
            import socket

            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that went away is no error."""


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers one viewer."""

    server: _Server
    timeout = _VIEWER_TIMEOUT_S
    _routes: ClassVar[dict[str, str]] = {"/": "_page", "/state.json": "_state", "/picture.mjpg": "_picture"}

    def do_GET(self) -> None:
        """Answer a request."""
        parts = urlsplit(self.path)
        # another site's script may reach a local server through a name that resolves to it, but not fake this header
        host = (urlsplit(f"//{self.headers.get('Host', '')}").hostname or "").lower()
        if self.server.is_local and host not in _LOOPBACK:
            self.send_error(403, "This page is served to this machine only")
        elif parts.path not in self._routes:
            self.send_error(404)
        else:
            getattr(self, self._routes[parts.path])(parse_qs(parts.query))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on the terminal."""

    def _page(self, _query: dict[str, list[str]]) -> None:
        self._send("text/html; charset=utf-8", _PAGE.read_bytes())

    def _state(self, _query: dict[str, list[str]]) -> None:
        self._send("application/json", json.dumps(self.server.page.state()).encode())

    def _picture(self, query: dict[str, list[str]]) -> None:
        """Send pictures until the viewer or the run goes."""
        name = query.get("source", [""])[0]
        self.send_response(200)
        self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
        self._end_headers()
        number = 0
        page = self.server.page
        while not page.is_closed:
            newest = page.next_jpeg(name, number)
            if newest is None:
                time.sleep(0 if page.is_closed else 0.05)
                continue
            data, number = newest
            head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            self.wfile.write(head.encode() + data + b"\r\n")

    def _send(self, kind: str, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self._end_headers()
        self.wfile.write(data)

    def _end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _POLICY)
        self.end_headers()
