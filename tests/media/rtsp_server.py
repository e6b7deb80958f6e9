"""A camera on the network for tests: RTSP (RFC 2326) with H.264 in RTP (RFC 6184) inside the TCP connection.

    python rtsp_server.py [PORT]

prints its port and serves `numbered` frames, 25 a second, to one client after the other, until killed.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.media.videos import numbered

RATE = 25
CLOCK = 90_000
LARGEST = 1400
SDP = """v=0
o=- 0 0 IN IP4 127.0.0.1
s=test
t=0 0
m=video 0 RTP/AVP 96
a=rtpmap:96 H264/90000
a=fmtp:96 packetization-mode=1
a=control:track1
""".replace("\n", "\r\n")
HEADERS = {
    "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
    "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n",
    "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n",
    "PLAY": "Session: 1\r\nRange: npt=0-\r\n",
}


def main() -> None:
    """Serve clients, one at a time."""
    with socket.create_server(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            client, _ = server.accept()
            with client:
                try:
                    if answer_requests(client):
                        play(client)
                except OSError:
                    pass  # the client has gone


def answer_requests(client: socket.socket) -> bool:
    """Answer until PLAY; returns False if the client leaves before."""
    requests = client.makefile("r", newline="\r\n")
    while True:
        lines = []
        while (line := requests.readline()).strip():
            lines.append(line.strip())
        if not lines:
            return False
        method = lines[0].split()[0]
        number = next(line for line in lines if line.lower().startswith("cseq"))
        body = SDP if method == "DESCRIBE" else ""
        client.sendall(f"RTSP/1.0 200 OK\r\n{number}\r\n{HEADERS.get(method, '')}\r\n{body}".encode())
        if method == "PLAY":
            return True


def play(client: socket.socket) -> None:
    """Send frames at their rate."""
    sequence = 0
    began = time.monotonic()
    for index, units in enumerate(access_units()):
        time.sleep(max(0.0, began + index / RATE - time.monotonic()))
        payloads = [payload for unit in units for payload in packetized(unit)]
        for position, payload in enumerate(payloads):
            marker = 0x80 if position == len(payloads) - 1 else 0
            timestamp = index * CLOCK // RATE & 0xFFFFFFFF
            packet = struct.pack(">BBHII", 0x80, marker | 96, sequence & 0xFFFF, timestamp, 1) + payload
            client.sendall(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
            sequence += 1


def access_units() -> Iterator[list[bytes]]:
    """The NAL units of each frame, with the parameter sets before each key frame."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 64, 48, "yuv420p"
    encoder.framerate, encoder.time_base, encoder.gop_size = Fraction(RATE), Fraction(1, RATE), RATE
    encoder.options = {"preset": "ultrafast", "tune": "zerolatency", "crf": "12"}
    for index in range(10**9):
        frame = av.VideoFrame.from_ndarray(numbered(index), format="bgr24")
        frame.pts = index
        for packet in encoder.encode(frame):
            units = bytes(packet).replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")
            yield [unit for unit in units if unit]


def packetized(unit: bytes) -> Iterator[bytes]:
    """RTP payloads of a NAL unit: itself, or fragments (FU-A)."""
    if len(unit) <= LARGEST:
        yield unit
        return
    body = unit[1:]
    for start in range(0, len(body), LARGEST):
        flags = (0x80 if start == 0 else 0) | (0x40 if start + LARGEST >= len(body) else 0)
        yield bytes([unit[0] & 0xE0 | 28, flags | unit[0] & 0x1F]) + body[start : start + LARGEST]


if __name__ == "__main__":
    main()
