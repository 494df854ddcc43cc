"""A server that answers HTTP requests as a test says, to see what S3 clients make of it. Not an S3 server."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

DATE = "Mon, 23 Nov 2026 03:00:00 GMT"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    """`cut`: bytes of the body that are really sent before the connection ends; `raw`: sent instead of HTTP;
    `hang`: the body comes after seconds; `pause`: so many pass before the connection ends; `part`: bytes of
    the body that are sent every millisecond."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    raw: bytes | None = None
    hang: bool = False
    pause: float = 0.0
    part: int | None = None


def error(status: int, code: str) -> Answer:
    """An error as S3 words it, with things in it that must not get into our messages."""
    details = "<Message>leaked-message</Message><StringToSign>leaked</StringToSign>"
    text = f"<Error><Code>{code}</Code>{details}</Error>"
    return Answer(status, f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode())


def content(body: bytes, request: Request) -> Answer:
    """What S3 answers to a GET of an object, whole or in part."""
    headers = {"ETag": '"e"', "Last-Modified": DATE}
    wanted = request.headers.get("range", "").removeprefix("bytes=")
    if not wanted:
        return Answer(200, body, headers)
    first, _, last = wanted.partition("-")
    start, end = int(first), min(int(last or len(body)) + 1, len(body))
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
    return Answer(206, body[start:end], headers)


class FakeS3:
    """`answer` is what each request gets; `requests` and `connections` are what came."""

    def __init__(self, server: http.server.ThreadingHTTPServer) -> None:
        self.answer: Callable[[Request], Answer] = lambda request: Answer()
        self.requests: list[Request] = []
        self.slow = 0.0  # seconds before the body of a request is read
        self.connections = 0
        self.address = ("127.0.0.1", server.server_address[1])
        self.endpoint = f"http://127.0.0.1:{self.address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeS3

    def setup(self) -> None:
        self.fake.connections += 1
        super().setup()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def _serve(self) -> None:
        time.sleep(self.fake.slow)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        self.fake.requests.append(request)
        self._send(self.fake.answer(request))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

    def _send(self, answer: Answer) -> None:
        if answer.raw is not None:
            self.wfile.write(answer.raw)
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if answer.hang:
            self.wfile.flush()
            time.sleep(3)
        if self.command != "HEAD":
            self._send_body(answer.body[: answer.cut], answer.part)
        time.sleep(answer.pause)
        self.close_connection = self.close_connection or answer.cut is not None

    def _send_body(self, body: bytes, part: int | None) -> None:
        size = part or max(1, len(body))
        for at in range(0, len(body), size):
            self.wfile.write(body[at : at + size])
            time.sleep(0.001 if part else 0)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve(tls: ssl.SSLContext | None = None) -> Iterator[FakeS3]:
    """A fake server on a loopback port, for the length of the block."""
    handler = type("Handler", (_Handler,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    fake = handler.fake = FakeS3(server)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        fake.endpoint = fake.endpoint.replace("http:", "https:")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.socket.close()
