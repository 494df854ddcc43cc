"""Large ranges by signed URLs: taken where they are the range that was asked for, else left to the client."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fakes3
import s3servers
from fakes3 import Answer, FakeS3, Request, content, error

from tierfs.errors import ObjectMissingError, StoreUnavailableError
from tierfs.model import LEAF
from tierfs.store import s3_ranges
from tierfs.store.base import Capabilities
from tierfs.store.s3 import S3Settings, S3Store, Timeouts

BODY = os.urandom(20 << 20)
START, LENGTH = 100_000, 2 << 20
RANGE = BODY[START : START + LENGTH]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    for name, value in s3servers.credentials().items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with fakes3.serve() as fake:
        fake.answer = lambda request: content(BODY, request)
        yield fake


def opened(server: FakeS3, seconds: float) -> S3Store:
    """A store that puts up with so much silence."""
    settings = S3Settings("bucket", "a prefix", server.endpoint)
    timeouts = Timeouts(connect=1, read=seconds, upload=seconds)
    return S3Store(settings, Capabilities(client="obstore"), timeouts)


@pytest.fixture
def store(server: FakeS3) -> Iterator[S3Store]:
    with contextlib.closing(opened(server, 0.4)) as made:
        yield made


@pytest.fixture
def patient(server: FakeS3) -> Iterator[S3Store]:
    with contextlib.closing(opened(server, 60)) as made:
        yield made


Get = Callable[[S3Store, str], bytes]


@pytest.fixture(params=["get", "pieces"])
def get(request: pytest.FixtureRequest) -> Get:
    """Both ways to the range."""
    if request.param == "get":
        return lambda store, key: bytes(store.get(key, START, LENGTH))
    return lambda store, key: b"".join(bytes(piece) for piece in store.pieces(key, START, LENGTH))


def signed(request: Request) -> bool:
    return "X-Amz-Signature=" in request.path


def only_signed(answer: Callable[[Request], Answer]) -> Callable[[Request], Answer]:
    """This answer to requests by signed URLs, the range to the others."""
    return lambda request: answer(request) if signed(request) else content(BODY, request)


def test_a_large_range_is_one_signed_request_on_a_warm_connection(
    server: FakeS3, store: S3Store, get: Get
) -> None:
    for _ in range(5):
        assert get(store, "the key") == RANGE
    assert [signed(request) for request in server.requests] == [True] * 5
    assert server.requests[0].path.startswith("/bucket/a%20prefix/the%20key?")
    assert server.connections == 1


def test_who_receives_sleeps_until_a_whole_piece_is_there(
    server: FakeS3, patient: S3Store, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the 256 parts in which it comes would otherwise wake it.

    Who has been woken receives. The thread's own switches would be no measure: on a busy machine it also waits
    for the interpreter, in naps of 5 ms, while the server's thread has that and no processor.
    """
    receive, woken = s3_ranges._Connection._receive, 0

    def counted(connection: s3_ranges._Connection, into: memoryview, flags: int = 0) -> int:
        nonlocal woken
        woken += 1
        return receive(connection, into, flags)

    monkeypatch.setattr(s3_ranges._Connection, "_receive", counted)
    server.answer = lambda request: replace(content(BODY, request), part=8 << 10)
    assert get(patient, "key") == RANGE
    assert 0 < woken < 50
    assert [signed(request) for request in server.requests] == [True]


def test_a_small_range_is_the_clients(server: FakeS3, store: S3Store) -> None:
    assert store.get("key", START, s3_ranges.LEAST - 1) == BODY[START : START + s3_ranges.LEAST - 1]
    assert not any(map(signed, server.requests))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda request: error(403, "AccessDenied"),
        lambda request: Answer(200, BODY),
        lambda request: Answer(206, RANGE, {"Content-Range": f"bytes 0-{LENGTH - 1}/{len(BODY)}"}),
        lambda request: Answer(206, RANGE[:-1], content(BODY, request).headers),
        lambda request: Answer(206, RANGE, content(BODY, request).headers, cut=LENGTH // 2),
        lambda request: Answer(raw=b"SSH-2.0-OpenSSH_9.2\r\n"),
        lambda request: Answer(raw=b""),
        lambda request: Answer(raw=b"HTTP/1.1 many thanks\r\n\r\n"),
        lambda request: Answer(raw=b"HTTP/1.1 206 Partial Content\r\nX: " + b"x" * (80 << 10)),
        lambda request: Answer(206, RANGE, {**content(BODY, request).headers, "Transfer-Encoding": "chunked"}),
    ],
    ids=[
        *("refused", "whole", "elsewhere", "short", "cut", "nonsense", "silence"),
        *("no number", "endless head", "chunked"),
    ],
)
def test_what_is_not_the_range_is_left_to_the_client(
    server: FakeS3, store: S3Store, get: Get, wrong: Callable[[Request], Answer]
) -> None:
    server.answer = only_signed(wrong)
    assert get(store, "key") == RANGE
    assert [signed(request) for request in server.requests] == [True, False]
    server.answer = lambda request: content(BODY, request)
    assert get(store, "key") == RANGE
    assert signed(server.requests[-1])


@pytest.mark.parametrize(
    ("status", "code", "asked"),
    [(403, "AccessDenied", 3), (400, "InvalidArgument", 3), (503, "SlowDown", 5), (404, "NoSuchKey", 5)],
)
def test_a_server_that_takes_none_is_asked_no_more(
    server: FakeS3, store: S3Store, get: Get, status: int, code: str, asked: int
) -> None:
    server.answer = only_signed(lambda request: error(status, code))
    for _ in range(5):
        assert get(store, "key") == RANGE
    assert sum(map(signed, server.requests)) == asked


def test_a_server_that_took_none_for_a_while_is_asked_again(
    server: FakeS3, store: S3Store, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while credentials had run out. One that takes none even then is asked once each time."""
    now, later = time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now() + later)
    server.answer = only_signed(lambda request: error(403, "AccessDenied"))
    for gone_by, asked in ((0.0, 3), (700.0, 4)):
        later = gone_by
        for _ in range(5):
            assert get(store, "key") == RANGE
        assert sum(map(signed, server.requests)) == asked
    server.answer = lambda request: content(BODY, request)
    later = 1400.0
    for _ in range(3):
        assert get(store, "key") == RANGE
    assert sum(map(signed, server.requests)) == 7


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of which a URL has been signed."""
    signs: list[str] = []
    sign = obstore.sign

    def noted(store: Any, method: Any, key: str, expires_in: Any) -> str:
        signs.append(key)
        return sign(store, method, key, expires_in=expires_in)

    monkeypatch.setattr(obstore, "sign", noted)
    return signs


def test_a_url_is_signed_once_for_the_ranges_of_an_object(
    server: FakeS3, store: S3Store, get: Get, signs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, later = time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now() + later)
    for key, gone_by in (("one", 0.0), ("one", 0.0), ("other", 0.0), ("other", 0.0), ("other", 60.0)):
        later += gone_by
        assert get(store, key) == RANGE
    assert signs == ["a prefix/one", "a prefix/other", "a prefix/other"]
    assert all(map(signed, server.requests))


def test_a_url_whose_time_is_over_says_nothing_about_the_server(
    server: FakeS3, store: S3Store, get: Get, signs: list[str]
) -> None:
    """What it was signed with may have run out since. Another is signed."""
    for _ in range(s3_ranges._REFUSALS + 1):
        server.answer = lambda request: content(BODY, request)
        assert get(store, "key") == RANGE
        server.answer = only_signed(lambda request: error(403, "ExpiredToken"))
        assert get(store, "key") == RANGE
    assert len(signs) == s3_ranges._REFUSALS + 1


def test_a_place_is_taken_when_a_piece_has_come_and_is_that_of_the_one_before(
    server: FakeS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it stays in the processor's cache."""
    made: list[int] = []
    pages, await_piece = s3_ranges._pages, s3_ranges._Connection.await_piece
    monkeypatch.setattr(s3_ranges, "_pages", lambda size: made.append(size) or pages(size))
    first, second = (store.pieces("key", start, 2 << 20) for start in (START, START + (4 << 20)))
    pieces = [next(first), next(second)]
    assert [bytes(piece[:9]) for piece in pieces] == [BODY[at : at + 9] for at in (START, START + (4 << 20))]
    assert len(made) == 2  # both are looked at

    def waits(connection: s3_ranges._Connection, size: int) -> None:
        """While one range waits for its next piece, another one comes, as a whole."""
        monkeypatch.setattr(s3_ranges._Connection, "await_piece", await_piece)
        assert {place_of(piece) for piece in store.pieces("key", START, LENGTH)} == {place_of(pieces[1])}
        connection.await_piece(size)

    monkeypatch.setattr(s3_ranges._Connection, "await_piece", waits)
    assert place_of(next(second)) == place_of(pieces[1])
    assert len(made) == 2


def place_of(piece: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(piece))


def test_the_client_says_what_is_wrong(server: FakeS3, store: S3Store, get: Get) -> None:
    server.answer = lambda request: error(404, "NoSuchKey")
    with pytest.raises(ObjectMissingError):
        get(store, "key")


def test_a_server_that_hangs_is_waited_for_once(server: FakeS3, store: S3Store, get: Get) -> None:
    server.answer = lambda request: Answer(206, RANGE, content(BODY, request).headers, hang=True)
    with pytest.raises(StoreUnavailableError, match="did not answer in time"):
        get(store, "key")
    assert [signed(request) for request in server.requests] == [True]


def test_a_connection_that_the_server_has_closed(
    server: FakeS3, store: S3Store, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(store, "key") == RANGE
    monkeypatch.setattr(s3_ranges, "_KEPT_SECONDS", 0.0)
    assert get(store, "key") == RANGE
    assert server.connections == 2
    assert [signed(request) for request in server.requests] == [True] * 2


def test_a_server_that_keeps_no_connection(server: FakeS3, store: S3Store, get: Get) -> None:
    def answer(request: Request) -> Answer:
        given = content(BODY, request)
        return Answer(given.status, given.body, {**given.headers, "Connection": "close"})

    server.answer = answer
    for _ in range(3):
        assert get(store, "key") == RANGE
    assert [signed(request) for request in server.requests] == [True] * 3


def test_by_way_of_a_proxy_it_is_the_clients(
    server: FakeS3, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.endpoint)
    settings = S3Settings("bucket", "a prefix", "http://store.invalid:9000")
    with contextlib.closing(S3Store(settings, Capabilities(client="obstore"))) as store:
        assert get(store, "key") == RANGE
    assert server.requests and not any(map(signed, server.requests))


def test_past_a_proxy_it_is_not(
    server: FakeS3, store: S3Store, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    assert get(store, "key") == RANGE
    assert server.requests and all(map(signed, server.requests))


def test_the_rest_of_a_range_that_breaks_off_is_the_clients(server: FakeS3, store: S3Store) -> None:
    """What has come is not asked for again."""
    asked: list[str] = []

    def answer(request: Request) -> Answer:
        asked.append(request.headers["range"])
        return content(BODY, request) if not signed(request) else broken(request)

    def broken(request: Request) -> Answer:
        return Answer(206, RANGE, content(BODY, request).headers, cut=LENGTH - 5)

    server.answer = answer
    pieces = store.pieces("key", START, LENGTH)
    assert bytes(next(pieces)) == RANGE[: s3_ranges.PIECE]
    assert b"".join(map(bytes, pieces)) == RANGE[s3_ranges.PIECE :]
    rest = START + s3_ranges.PIECE
    assert asked == [f"bytes={START}-{START + LENGTH - 1}", f"bytes={rest}-{START + LENGTH - 1}"]


def test_a_server_that_falls_silent_on_the_way_is_waited_for_once(server: FakeS3, store: S3Store) -> None:
    def answer(request: Request) -> Answer:
        cut = content(BODY, request)
        return Answer(206, RANGE, cut.headers, cut=s3_ranges.PIECE + 1, pause=3)

    server.answer = answer
    pieces = store.pieces("key", START, LENGTH)
    assert bytes(next(pieces)) == RANGE[: s3_ranges.PIECE]
    with pytest.raises(StoreUnavailableError, match="did not answer in time"):
        next(pieces)
    assert [signed(request) for request in server.requests] == [True]


def test_a_range_that_is_given_up_ends_its_connection(server: FakeS3, store: S3Store) -> None:
    with contextlib.closing(store.pieces("key", START, LENGTH)) as pieces:
        next(pieces)
    assert b"".join(map(bytes, store.pieces("key", START, LENGTH))) == RANGE
    assert server.connections == 2
    assert [signed(request) for request in server.requests] == [True] * 2


def test_after_its_last_piece_a_connection_is_good_for_the_next(server: FakeS3, store: S3Store) -> None:
    for _ in range(3):
        with contextlib.closing(store.pieces("key", START, s3_ranges.PIECE)) as pieces:
            next(pieces)
    assert server.connections == 1


def sizes(store: S3Store, length: int = len(BODY)) -> list[int]:
    return [len(piece) for piece in store.pieces("key", 0, length)]


def test_pieces_that_come_quickly_are_larger(
    server: FakeS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = s3_ranges.PIECE
    monkeypatch.setattr(s3_ranges, "_QUICK_SECONDS", 100.0)
    assert sizes(store) == [piece, 8 * piece, 8 * piece, 3 * piece]
    assert sizes(store) == [8 * piece, 8 * piece, 4 * piece]  # the network is as it was a moment ago
    # Who waits for a small range gets half of it sooner. Each piece can be checked: it is one of whole leaves.
    assert sizes(store, 6 * piece) == [3 * piece] * 2
    assert sizes(store, 5 * piece + 3 * LEAF) == [2 * piece, 2 * piece, piece + 3 * LEAF]
    assert sizes(store, piece + 1) == [piece, 1]
    monkeypatch.setattr(s3_ranges, "_QUICK_SECONDS", 0.0)
    assert sizes(store) == [8 * piece, *[piece] * 12]
    assert sizes(store) == [piece] * 20
    assert server.connections == 1


def test_large_pieces_lie_in_large_pages(
    server: FakeS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage"):
        pytest.skip("this kernel has none")
    monkeypatch.setattr(s3_ranges, "_QUICK_SECONDS", 100.0)
    flags = []
    for piece in store.pieces("key", 0, len(BODY)):
        assert isinstance(piece, memoryview)
        flags.append("hg" in flags_of(place_of(piece)))
    assert flags == [True] * 4


def flags_of(address: int) -> list[str]:
    """Of the mapping of this process in which the address lies, as the kernel shows them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return rest
    raise AssertionError(f"no mapping at {address:x}")
