"""A TCP proxy that makes a loopback server look far away, slow or broken. For tests and benchmarks.

    with netproxy.proxy(server.address, rtt_ms=20) as proxy:
        store = open_store(server.url_for("tests", proxy.endpoint))
        proxy.fault("cut", after=2000, times=1)
        proxy.clear()

Half of the round trip passes in each direction, for each piece by its own clock: latency does not limit
bandwidth. `bandwidth_mbps` are megabits a second, each way, of each connection. Faults strike what comes back
from the server, on each connection, once `after` bytes have come since the fault was set:

    reset   the connection is reset        cut     it is closed in order, the rest missing
    flip    one bit is another             hang    nothing more comes, until `clear`
    refuse  new connections are refused, the present ones reset

As a program: netproxy.py --listen HOST:PORT --to HOST:PORT [--rtt-ms N] [--bandwidth-mbps N] [--fault NAME
[--after N] [--times N]]. It prints its port, takes further settings as JSON lines from its standard input,
answers each with "ok", and ends with its input or its parent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import resource
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

_BUFFER = 512 * 1024  # bytes taken from a socket at once
_WINDOW = 64 * 1024 * 1024  # bytes under way in one direction before the sender is held up
_PR_SET_PDEATHSIG = 1
_NO_LINGER = struct.pack("ii", 1, 0)  # close() sends a reset
FAULTS = ("reset", "cut", "flip", "hang", "refuse")


@dataclass
class Settings:
    """What the network is like now. `times`: how many more connections a fault strikes; -1 for all."""

    rtt_ms: float = 0.0
    bandwidth_mbps: float = 0.0
    fault: str | None = None
    after: int = 0
    times: int = -1
    epoch: int = 0  # counts changes of the fault

    @property
    def delay(self) -> float:
        return self.rtt_ms / 2000

    @property
    def rate(self) -> float:
        """Bytes a second; 0 without a limit."""
        return self.bandwidth_mbps * 125_000

    @property
    def window(self) -> float:
        return min(_WINDOW, self.rate * self.delay + _BUFFER) if self.rate else _WINDOW


class Side(asyncio.BufferedProtocol):
    """One socket of a connection, and the way from it to the other one."""

    def __init__(self, relay: Relay, from_server: bool) -> None:
        self.relay = relay
        self.from_server = from_server
        self.transport: asyncio.Transport | None = None
        self.other: Side | None = None
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._queue: deque[tuple[float, bytes]] = deque()  # due time and bytes; no bytes: the end
        self._queued = 0
        self._early: list[bytes] = []
        self._line_free = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._held: set[str] = set()  # reasons not to read
        self._seen = 0
        self._epoch = -1
        self._struck = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        transport.set_write_buffer_limits(high=4 * _BUFFER)  # type: ignore[attr-defined]
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.relay.sides.add(self)
        if not self.from_server:
            self.hold("connecting")
            self.relay.connect(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        data = self._view[:nbytes]
        if self.from_server and self.relay.settings.fault:
            self._harm(data)
        else:
            self._send(data)

    def _send(self, data: memoryview) -> None:
        settings = self.relay.settings
        if "connecting" in self._held:
            # Before Python 3.11.4 a transport that was told to pause as it was made reads all the same.
            self._early.append(bytes(data))
            return
        if not (settings.rtt_ms or settings.bandwidth_mbps or self._queue):
            self.other.transport.write(bytes(data))  # a copy: a transport may keep what it cannot send at once
            return
        self._enqueue(bytes(data))

    def _begin(self) -> None:
        """The way is there: what came before it is sent now."""
        early, self._early = self._early, []
        for data in early:
            if data:
                self._send(memoryview(data))
            else:
                self.eof_received()

    def _enqueue(self, data: bytes) -> None:
        settings, now = self.relay.settings, self.relay.loop.time()
        if settings.rate:
            self._line_free = max(now, self._line_free) + len(data) / settings.rate
        self._queue.append((max(now, self._line_free) + settings.delay, data))
        self._queued += len(data)
        if self._queued > settings.window:
            self.hold("window")
        if self._timer is None:
            self._timer = self.relay.loop.call_at(self._queue[0][0], self._deliver)

    def _deliver(self) -> None:
        self._timer = None
        now = self.relay.loop.time()
        while self._queue and self._queue[0][0] <= now:
            data = self._queue.popleft()[1]
            self._queued -= len(data)
            if data and not self.other.transport.is_closing():
                self.other.transport.write(data)
            else:
                self._finish()
        if self._queued <= self.relay.settings.window:
            self.release("window")
        if self._queue:
            self._timer = self.relay.loop.call_at(self._queue[0][0], self._deliver)

    def _harm(self, data: memoryview) -> None:
        """Apply the fault to bytes that came from the server."""
        settings = self.relay.settings
        if self._epoch != settings.epoch:
            self._epoch, self._seen, self._struck = settings.epoch, 0, False
        position = settings.after - self._seen
        self._seen += len(data)
        if self._struck or position >= len(data) or settings.times == 0:
            self._send(data)
            return
        self._struck = True
        settings.times -= settings.times > 0
        position = max(0, position)
        if settings.fault == "flip":
            data[position] ^= 1
            self._send(data)
            return
        if position:
            self._send(data[:position])
        self._stop(settings.fault)

    def _stop(self, fault: str | None) -> None:
        if fault == "hang":
            self.hold("fault")
            return
        self.hold("struck")
        # What was let through has to arrive first.
        end = self.reset if fault == "reset" else self.close
        self.relay.loop.call_later(self.relay.settings.delay + 0.01, end)

    def reset(self) -> None:
        """Break both connections without a farewell."""
        for side in (self, self.other):
            if side and side.transport:
                sock = side.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                side.transport.abort()

    def close(self) -> None:
        for side in (self, self.other):
            if side and side.transport:
                side.transport.close()

    def hold(self, reason: str) -> None:
        if not self._held and self.transport:
            self.transport.pause_reading()
        self._held.add(reason)

    def release(self, reason: str) -> None:
        if reason in self._held:
            self._held.discard(reason)
            if reason == "connecting":
                self._begin()
            if not self._held and self.transport and not self.transport.is_closing():
                self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.other.hold("full")

    def resume_writing(self) -> None:
        self.other.release("full")

    def eof_received(self) -> bool:
        if "connecting" in self._held:
            self._early.append(b"")
        elif self._queue:
            self._enqueue(b"")
        else:
            self._finish()
        return True

    def _finish(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self.other.transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self.relay.sides.discard(self)
        if self._queue:
            self._enqueue(b"")
        elif self.other and self.other.transport:
            self.other.transport.close()


class Relay:
    """The listener, its connections and the present settings."""

    def __init__(self, listen: tuple[str, int], to: tuple[str, int], settings: Settings) -> None:
        self.loop = asyncio.get_running_loop()
        self.settings = settings
        self.sides: set[Side] = set()
        self.port = listen[1]
        self._host = listen[0]
        self._to = to
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task] = set()

    async def open(self) -> None:
        if self._server is None:
            address = (self._host, self.port)
            self._server = await self.loop.create_server(lambda: Side(self, False), *address, backlog=512)
            self.port = self._server.sockets[0].getsockname()[1]

    def connect(self, client: Side) -> None:
        task = self.loop.create_task(self._connect(client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, client: Side) -> None:
        await asyncio.sleep(self.settings.rtt_ms / 1000)  # the handshake's round trip
        server = Side(self, True)
        server.other, client.other = client, server
        try:
            await self.loop.create_connection(lambda: server, *self._to)
        except OSError:
            client.reset()
            return
        client.release("connecting")
        if client.transport.is_closing():
            server.close()

    async def change(self, wanted: dict) -> None:
        """Take new settings; a change of the fault makes it strike every connection again."""
        for name, value in wanted.items():
            setattr(self.settings, name, value)
        if "fault" in wanted:
            self.settings.epoch += 1
            for side in list(self.sides):
                side.release("fault")
        if self.settings.fault == "refuse":
            await self._refuse()
        else:
            await self.open()

    async def _refuse(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        for side in list(self.sides):
            side.reset()


class ExactSelector(selectors.EpollSelector):
    """Waits to the microsecond, with any number of connections.

    epoll alone waits to the millisecond, too coarse for a local network, and select() knows no descriptor above
    1023. So select() waits, for epoll's own descriptor.
    """

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            select.select([self.fileno()], [], [], timeout)
        return super().select(0)


async def serve(listen: tuple[str, int], to: tuple[str, int], settings: Settings) -> None:
    relay = Relay(listen, to, settings)
    await relay.open()
    await relay.change({"fault": settings.fault})
    print(relay.port, flush=True)
    reader = asyncio.StreamReader()
    await relay.loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        await relay.change(json.loads(line))
        print("ok", flush=True)


class Proxy:
    """A running proxy. `endpoint` is its URL, `host` and `port` its address."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.host, self.port = "127.0.0.1", port
        self._process = process

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def set(self, **settings: float | int | str | None) -> None:
        """Change `rtt_ms`, `bandwidth_mbps`, `fault`, `after`, `times`; in force when this returns."""
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "ok\n":
            raise RuntimeError("the proxy ended")

    def fault(self, name: str, after: int = 0, times: int = -1) -> None:
        """Break things: one of FAULTS, after so many bytes, on so many connections (-1: all)."""
        self.set(fault=name, after=after, times=times)

    def clear(self) -> None:
        """No fault any more; what hung goes on."""
        self.set(fault=None, after=0, times=-1)


@contextlib.contextmanager
def proxy(to: tuple[str, int], rtt_ms: float = 0, bandwidth_mbps: float = 0) -> Iterator[Proxy]:
    """A proxy in a process of its own, in front of the server at `to`; gone with the block or its parent."""
    argv = [sys.executable, __file__, "--to", f"{to[0]}:{to[1]}"]
    argv += ["--rtt-ms", str(rtt_ms), "--bandwidth-mbps", str(bandwidth_mbps)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(argv, text=True, start_new_session=True, **pipes)
    try:
        yield Proxy(process, int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--listen", type=_address, default=("127.0.0.1", 0))
    parser.add_argument("--to", type=_address, required=True)
    parser.add_argument("--rtt-ms", type=float, default=0)
    parser.add_argument("--bandwidth-mbps", type=float, default=0)
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--times", type=int, default=-1)
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    settings = Settings(args.rtt_ms, args.bandwidth_mbps, args.fault, args.after, args.times)
    loop = asyncio.SelectorEventLoop(ExactSelector())
    with contextlib.suppress(KeyboardInterrupt):
        loop.run_until_complete(serve(args.listen, args.to, settings))


if __name__ == "__main__":
    main()
