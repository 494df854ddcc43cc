"""The network proxy is an instrument: what it claims to add to a connection is what it adds."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import netproxy

BLOCK = bytes(range(256)) * 4096  # 1 MiB


def _serve(connection: socket.socket) -> None:
    """Each line asks for so many bytes."""
    with contextlib.suppress(OSError), connection, connection.makefile("rwb") as stream:
        for line in stream:
            count = int(line)
            while count > 0:
                stream.write(BLOCK[: min(count, len(BLOCK))])
                count -= len(BLOCK)
            stream.flush()


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


def fetch(proxy: netproxy.Proxy, count: int, connection: socket.socket | None = None) -> bytes:
    with connection or socket.create_connection((proxy.host, proxy.port), timeout=10) as sock:
        sock.sendall(b"%d\n" % count)
        data = bytearray()
        while len(data) < count and (piece := sock.recv(1 << 20)):
            data += piece
        return bytes(data)


def test_latency_does_not_limit_bandwidth(address: tuple[str, int]) -> None:
    with netproxy.proxy(address, rtt_ms=60) as proxy:
        begun = time.monotonic()
        fetch(proxy, 1)
        assert 0.12 <= time.monotonic() - begun < 0.3  # the handshake, and the request
        begun = time.monotonic()
        assert len(fetch(proxy, 64 << 20)) == 64 << 20
        assert time.monotonic() - begun < 2
        proxy.set(rtt_ms=0)
        begun = time.monotonic()
        fetch(proxy, 1)
        assert time.monotonic() - begun < 0.05


def test_bandwidth(address: tuple[str, int]) -> None:
    with netproxy.proxy(address, bandwidth_mbps=160) as proxy:
        begun = time.monotonic()
        assert fetch(proxy, 8 << 20) == BLOCK * 8
        assert 0.35 < time.monotonic() - begun < 0.8


def test_as_many_connections_as_there_are(address: tuple[str, int]) -> None:
    """Each takes two of the proxy's descriptors: more than select() knows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(2048, hard)), hard))
    try:
        with netproxy.proxy(address, rtt_ms=2) as proxy, contextlib.ExitStack() as stack:
            place = (proxy.host, proxy.port)
            many = [stack.enter_context(socket.create_connection(place, timeout=10)) for _ in range(600)]
            for connection in many:
                connection.sendall(b"1000\n")
            for connection in many:
                assert connection.recv(1000, socket.MSG_WAITALL) == BLOCK[:1000]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_faults(address: tuple[str, int]) -> None:
    with netproxy.proxy(address) as proxy:
        proxy.fault("cut", after=1000, times=1)
        assert fetch(proxy, 5000) == BLOCK[:1000]
        assert fetch(proxy, 5000) == BLOCK[:5000]
        proxy.fault("flip", after=1000, times=1)
        assert [i for i, (a, b) in enumerate(zip(fetch(proxy, 5000), BLOCK, strict=False)) if a != b] == [1000]
        proxy.fault("reset", after=1000)
        with pytest.raises(ConnectionResetError):
            for _ in range(2):
                fetch(proxy, 5000)
        proxy.fault("refuse")
        with pytest.raises(ConnectionRefusedError):
            fetch(proxy, 1)
        proxy.fault("hang", after=1000)
        with socket.create_connection((proxy.host, proxy.port)) as sock:
            sock.settimeout(0.1)
            sock.sendall(b"5000\n")
            assert sock.recv(5000) == BLOCK[:1000]
            with pytest.raises(TimeoutError):
                sock.recv(5000)
        proxy.clear()
        assert fetch(proxy, 1 << 20) == BLOCK
