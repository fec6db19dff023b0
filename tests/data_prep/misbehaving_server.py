"""A local web server that does to a downloader what the web does, a case per path.

`/ok/N` serves an image, every other case is named by the first part of the path. Requests are
counted per path. Bodies are bounded: "endless" ends after 64 MB.
"""

from __future__ import annotations

import io
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

CASES = (
    "ok", "404", "429", "500-once", "slow", "endless", "truncated", "wrong-type", "loop",
    "to-private", "huge", "bomb", "html", "tiny", "robots", "robots-other", "hop", "drip",
    "same", "cut-jpeg", "gone", "empty", "chunked",
)  # fmt: skip


def picture(number: int, size: tuple[int, int] = (320, 300), quality: int = 70) -> bytes:
    """A small JPEG that is different for every number."""
    noise = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR).save(
        buffer, "JPEG", quality=quality
    )
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few kilobytes (its data is not even complete)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = (30000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    rows = zlib.compress(bytes(1 << 20), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: MisbehavingServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.note(self.path, self.headers.get("User-Agent", ""))
        case, _, rest = self.path.strip("/").partition("/")
        name = "do_" + case.replace("-", "_").replace("404", "missing").replace("500", "broken")
        handler = getattr(self, name.replace("429", "busy"), self.do_missing)
        try:
            handler(int(rest.split("/")[0]) if rest[:1].isdigit() else 0)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(
        self, body: bytes, kind: str = "image/jpeg", code: int = 200, **headers: str
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_ok(self, n: int) -> None:
        self.answer(self.server.images.setdefault(n, picture(n)))

    def do_missing(self, n: int) -> None:
        self.answer(b"no", "text/plain", 404)

    def do_gone(self, n: int) -> None:
        self.answer(b"", "text/plain", 410)

    def do_busy(self, n: int) -> None:
        if self.server.visits(self.path) == 1:
            self.answer(b"later", "text/plain", 429, Retry_After="1")
        else:
            self.do_ok(n)

    def do_broken_once(self, n: int) -> None:
        if self.server.visits(self.path) == 1:
            self.answer(b"", "text/plain", 503)
        else:
            self.do_ok(n)

    def do_slow(self, n: int) -> None:
        time.sleep(self.server.slowness)
        self.do_ok(n)

    def do_drip(self, n: int) -> None:
        """A byte now and then: never silent for long, never done."""
        self.send_response(200)
        self.send_header("Content-Length", "5000")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b"\xff")
            self.wfile.flush()
            time.sleep(self.server.slowness / 5)

    def do_endless(self, n: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.end_headers()
        self.close_connection = True
        for _ in range(1024):
            self.wfile.write(bytes(65536))

    def do_huge(self, n: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(60 << 20))
        self.end_headers()
        self.close_connection = True
        for _ in range(60):
            self.wfile.write(bytes(1 << 20))

    def do_truncated(self, n: int) -> None:
        body = picture(n)
        self.answer(body[: len(body) // 2], length=str(len(body)))
        self.close_connection = True

    def do_cut_jpeg(self, n: int) -> None:
        body = picture(n)
        self.answer(body[: len(body) // 2])

    def do_wrong_type(self, n: int) -> None:
        self.answer(b"%PDF-1.4 nothing to see", "application/pdf")

    def do_html(self, n: int) -> None:
        self.answer(b"<!DOCTYPE html><html><body>Sorry</body></html>", "text/html")

    def do_empty(self, n: int) -> None:
        self.answer(b"")

    def do_chunked(self, n: int) -> None:
        body = picture(n)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(body), 1000):
            piece = body[start : start + 1000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def do_loop(self, n: int) -> None:
        self.answer(b"", code=302, Location=self.path)

    def do_hop(self, n: int) -> None:
        self.answer(b"", code=301, Location=f"/ok/{n}")

    def do_to_private(self, n: int) -> None:
        self.answer(b"", code=302, Location=f"http://127.0.0.1:{self.server.inner_port}/ok/{n}")

    def do_bomb(self, n: int) -> None:
        self.answer(self.server.bomb, "image/png")

    def do_tiny(self, n: int) -> None:
        self.answer(picture(n, (20, 10)))

    def do_same(self, n: int) -> None:
        self.answer(self.server.images.setdefault(-1, picture(10**6)))

    def do_robots(self, n: int) -> None:
        self.answer(picture(n), X_Robots_Tag="noarchive, noai")

    def do_robots_other(self, n: int) -> None:
        self.answer(picture(n), X_Robots_Tag="otherbot: noai")


class MisbehavingServer(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1."""

    daemon_threads = True
    request_queue_size = 512
    inner_port = 1

    def __init__(self, slowness: float = 3.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.slowness = slowness
        self.images: dict[int, bytes] = {}
        self.bomb = bomb()
        self.counts: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True, args=(0.05,)).start()

    def handle_error(self, request: object, client_address: object) -> None:
        pass

    def note(self, path: str, agent: str) -> None:
        with self.lock:
            self.counts[path] += 1
            self.agents.add(agent)

    def visits(self, path: str) -> int:
        return self.counts[path]

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
