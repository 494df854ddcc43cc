"""What the S3 store makes of servers and networks that fail, with either client, over real sockets."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fakes3
import netproxy
import s3servers
from botocore.loaders import JSONFileLoader
from fakes3 import Answer, FakeS3, Request, content, error

from tierfs.errors import (
    BucketMissingError,
    ObjectArchivedError,
    ObjectCorruptError,
    ObjectMissingError,
    PreconditionError,
    StoreDeniedError,
    StoreFullError,
    StoreThrottledError,
    StoreUnavailableError,
)
from tierfs.store.base import Capabilities
from tierfs.store.retry import RetryingStore, RetryPolicy
from tierfs.store.s3 import S3Settings, S3Store, Timeouts
from tierfs.store.s3_boto import BotoData

BODY = os.urandom(200_000)
IN_THE_BODY = 100_000


@pytest.fixture(scope="module")
def server() -> Iterator[FakeS3]:
    with fakes3.serve() as fake:
        yield fake


@pytest.fixture(scope="module")
def proxy(server: FakeS3) -> Iterator[netproxy.Proxy]:
    with netproxy.proxy(server.address) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def fresh(server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3servers.credentials().items():
        monkeypatch.setenv(name, value)
    server.answer = lambda request: content(BODY, request)
    server.requests.clear()
    server.connections = 0


Opener = Callable[..., S3Store]


@pytest.fixture(params=["obstore", "boto3"])
def open_s3(request: pytest.FixtureRequest, server: FakeS3) -> Iterator[Opener]:
    opened: list[S3Store] = []

    def make(endpoint: str = "", **capabilities: bool) -> S3Store:
        settings = S3Settings("bucket", "prefix", endpoint or server.endpoint)
        timeouts = Timeouts(connect=1, read=0.4, upload=0.4)
        opened.append(S3Store(settings, Capabilities(client=request.param, **capabilities), timeouts))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "ExpiredToken", StoreDeniedError),
        (400, "BadDigest", ObjectCorruptError),
        (400, "InvalidArgument", StoreDeniedError),
        (400, "RequestTimeout", StoreUnavailableError),
        (400, "AuthorizationHeaderMalformed", StoreDeniedError),
        (301, "PermanentRedirect", StoreDeniedError),
        (401, "Unauthorized", StoreDeniedError),
        (403, "AccessDenied", StoreDeniedError),
        (403, "SignatureDoesNotMatch", StoreDeniedError),
        (403, "RequestTimeTooSkewed", StoreDeniedError),
        (403, "QuotaExceeded", StoreFullError),
        (403, "InvalidObjectState", ObjectArchivedError),
        (404, "NoSuchKey", ObjectMissingError),
        (404, "NoSuchBucket", BucketMissingError),
        (409, "ConditionalRequestConflict", PreconditionError),
        (412, "PreconditionFailed", PreconditionError),
        (416, "InvalidRange", ObjectCorruptError),
        (429, "TooManyRequests", StoreThrottledError),
        (500, "InternalError", StoreUnavailableError),
        (501, "NotImplemented", StoreDeniedError),
        (502, "BadGateway", StoreUnavailableError),
        (503, "SlowDown", StoreThrottledError),
        (503, "ServiceUnavailable", StoreThrottledError),
        (507, "InsufficientStorage", StoreFullError),
    ],
)
def test_answers(server: FakeS3, open_s3: Opener, status: int, code: str, expected: type) -> None:
    server.answer = lambda request: error(status, code)
    store = open_s3()
    for call in (
        lambda: store.get("key", 5, 10),
        lambda: list(store.stream("key")),
        lambda: store.put("key", b"x", 1),
    ):
        with pytest.raises(expected) as caught:
            call()
        assert type(caught.value) is expected
        assert "bucket" in str(caught.value)
        for secret in ("leaked", s3servers.SECRET_KEY, "\n"):
            assert secret not in str(caught.value)
    looks = [request for request in server.requests if request.method == "HEAD"]
    assert len(looks) <= (3 if status == 301 else 0)  # boto3 looks for the region, once a call
    assert len(server.requests) - len(looks) == 3  # none was repeated: that is the decorator's business


@pytest.mark.parametrize("status", [301, 302, 307])
def test_who_redirects_without_a_word_is_no_store(server: FakeS3, open_s3: Opener, status: int) -> None:
    server.answer = lambda request: Answer(status)
    for call in (open_s3().get, open_s3().head):
        with pytest.raises(StoreDeniedError, match="redirects"):
            call("key")
    assert len(server.requests) <= 6


def test_an_error_without_words(server: FakeS3, open_s3: Opener) -> None:
    for status, expected in ((403, StoreDeniedError), (404, ObjectMissingError), (503, StoreThrottledError)):
        server.answer = lambda request, status=status: Answer(status)
        for call in (open_s3().get, open_s3().head):
            with pytest.raises(expected):
                call("key")


def test_what_botocore_knows_of_s3_is_read_once(open_s3: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_s3().get("key") == BODY
    monkeypatch.setattr(JSONFileLoader, "load_file", lambda *_: pytest.fail("it is read again"))
    assert open_s3().get("key") == BODY


def test_a_read_is_one_request_on_a_warm_connection(server: FakeS3, open_s3: Opener) -> None:
    store = open_s3()
    reads = (
        (lambda: store.get("key"), BODY),
        (lambda: store.get("key", 10, 20), BODY[10:30]),
        (lambda: b"".join(store.stream("key", 10, 150_000)), BODY[10:150_010]),
    )
    for read, expected in reads * 5:
        opened = server.connections
        # A thread of the client gives a connection back: on a busy machine the next request may come first.
        # Then there is one more; asked again, none is opened.
        for attempt in range(5):
            time.sleep(attempt * 0.05)
            before = server.connections
            del server.requests[:]
            assert read() == expected
            assert [request.method for request in server.requests] == ["GET"]
            if server.connections == before or not opened:
                break
        else:
            raise AssertionError("each read opens a connection")


def test_a_range_that_comes_back_shorter(server: FakeS3, open_s3: Opener) -> None:
    store = open_s3()
    for call in (lambda: store.get("key", 199_990, 20), lambda: list(store.stream("key", 199_990, 20))):
        with pytest.raises(ObjectCorruptError, match="shorter than recorded"):
            call()


def test_a_range_answered_with_the_whole_object(server: FakeS3, open_s3: Opener) -> None:
    server.answer = lambda request: Answer(200, BODY, {"ETag": '"e"', "Last-Modified": fakes3.DATE})
    store = open_s3()
    if store.capabilities.client == "obstore":
        with pytest.raises(StoreDeniedError, match="it needs boto3"):
            store.get("key", 10, 20)
    else:
        assert store.get("key", 10, 20) == BODY[10:30]
        assert b"".join(store.stream("key", 150_000)) == BODY[150_000:]


@pytest.mark.parametrize("raw", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Le"])
def test_nonsense(server: FakeS3, open_s3: Opener, raw: bytes) -> None:
    server.answer = lambda request: Answer(raw=raw)
    store = open_s3()
    for call in (lambda: store.get("key"), lambda: store.put("key", b"x", 1), lambda: list(store.list(""))):
        with pytest.raises(StoreUnavailableError):
            call()


UPLOADS = {
    "POST ?uploads": b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>",
    "POST ": b"<CompleteMultipartUploadResult><ETag>&quot;e&quot;</ETag></CompleteMultipartUploadResult>",
}


@pytest.mark.parametrize("bad", [Answer(raw=b""), error(503, "SlowDown"), error(500, "InternalError")])
def test_of_a_large_upload_the_part_that_failed_is_sent_again(
    server: FakeS3, open_s3: Opener, bad: Answer
) -> None:
    """On a bad line one of a thousand parts always fails: no upload of that size would ever end."""
    size, sent = 20 << 20, Counter()

    def answer(request: Request) -> Answer:
        if request.method == "PUT":
            (part,) = re.findall(r"partNumber=(\d+)", request.path)
            sent[part] += 1
            return bad if part == "2" and sent[part] == 1 else Answer(headers={"ETag": f'"{part}"'})
        if request.method == "HEAD":
            return Answer(200, bytes(size), {"ETag": '"e"', "Last-Modified": fakes3.DATE})
        return Answer(200, UPLOADS["POST ?uploads" if "uploads" in request.path else "POST "])

    server.answer = answer
    assert open_s3().put("a", iter([bytes(size)]), size).etag == '"e"'
    assert sent == {"1": 1, "2": 2, "3": 1}


def test_a_web_page_instead_of_a_listing(server: FakeS3, open_s3: Opener) -> None:
    server.answer = lambda request: Answer(200, b"<html>Please log in<p></html>")
    with pytest.raises(StoreUnavailableError):
        list(open_s3().list(""))


def listing(names: list[str], rest: str = "", encoding: str = "") -> Answer:
    entries = "".join(
        f"<Contents><Key>{name}</Key><Size>1</Size><ETag>e</ETag>"
        "<LastModified>2026-11-23T03:00:00Z</LastModified></Contents>"
        for name in names
    )
    said = f"<IsTruncated>{str(bool(rest)).lower()}</IsTruncated>{rest}{encoding}"
    return Answer(200, f"<ListBucketResult>{said}{entries}</ListBucketResult>".encode())


def test_a_listing_in_pages_of_any_size(server: FakeS3, open_s3: Opener) -> None:
    """A server may send fewer keys than it could, or none, and go on all the same."""
    keys = [f"data/{number:03}" for number in range(40)]
    sizes = [7, 0, 1, 32]

    def answer(request: Request) -> Answer:
        token = re.search(r"continuation-token=(\d+)", request.path)
        page = int(token[1]) if token else 0
        first = sum(sizes[:page])
        more = f"<NextContinuationToken>{page + 1}</NextContinuationToken>" if page + 1 < len(sizes) else ""
        return listing([f"prefix/{key}" for key in keys[first : first + sizes[page]]], more)

    server.answer = answer
    assert [info.key for info in open_s3().list("")] == keys


@pytest.mark.parametrize("rest", ["<NextMarker>prefix/b</NextMarker>", "<Marker/>"])
def test_a_listing_that_breaks_off_is_not_taken_for_all(server: FakeS3, open_s3: Opener, rest: str) -> None:
    """As of a server that knows the first version of the request only."""
    server.answer = lambda request: listing(["prefix/a", "prefix/b"], rest)
    with pytest.raises(StoreDeniedError, match="1000 objects at most"):
        list(open_s3().list(""))


def test_a_listing_of_other_keys_is_not_taken_for_ours(server: FakeS3, open_s3: Opener) -> None:
    server.answer = lambda request: listing(["prefix/data/a", "sommat/data/b"])
    with pytest.raises(StoreDeniedError, match="lists what was not asked for"):
        list(open_s3().list("data/"))


@pytest.mark.parametrize("encoding", ["<EncodingType>url</EncodingType>", ""])
def test_odd_keys_come_encoded_or_not(server: FakeS3, open_s3: Opener, encoding: str) -> None:
    names = ["a b", "a%20b", "ü", "a+b", "a=b;c"]

    def shown(name: str) -> str:
        return urllib.parse.quote(name) if encoding else name

    server.answer = lambda request: listing([f"prefix/{shown(name)}" for name in names], "", encoding)
    assert [info.key for info in open_s3().list("")] == names
    assert "encoding-type=url" in server.requests[0].path


def test_a_body_that_ends_early(server: FakeS3, open_s3: Opener) -> None:
    def cut(request: Request) -> Answer:
        answer = content(BODY, request)
        answer.cut = 70_000
        return answer

    server.answer = cut
    store = open_s3()
    for call in (
        lambda: store.get("key"),
        lambda: store.get("key", 5, 150_000),
        lambda: list(store.stream("key")),
    ):
        with pytest.raises(StoreUnavailableError):
            call()


def test_success_that_is_an_error(server: FakeS3, open_s3: Opener) -> None:
    """S3 answers the end of an upload in parts with 200 before it knows how that ends."""

    def answer(request: Request) -> Answer:
        if request.method == "PUT":
            return Answer(headers={"ETag": '"part"'})
        if request.method == "POST" and "uploadId" not in request.path:
            xml = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
            return Answer(200, xml)
        return Answer(204) if request.method == "DELETE" else Answer(200, error(200, "InternalError").body)

    server.answer = answer
    size = 17 * 1024 * 1024
    with pytest.raises(StoreUnavailableError):
        open_s3().put("key", iter([bytes(size)]), size)
    assert "DELETE" in [request.method for request in server.requests]


def test_silence_ends_in_time(server: FakeS3, open_s3: Opener) -> None:
    going = threading.Event()

    def wait(request: Request) -> Answer:
        going.wait(5)
        return Answer()

    server.answer = wait
    store = open_s3()
    for call in (lambda: store.get("key"), lambda: store.put("key", b"x", 1), lambda: store.head("key")):
        begun = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="did not answer in time"):
            call()
        assert time.monotonic() - begun < 3
    going.set()


@pytest.mark.parametrize("fault", ["reset", "cut"])
def test_a_connection_that_breaks(proxy: netproxy.Proxy, open_s3: Opener, fault: str) -> None:
    store = open_s3(proxy.endpoint)
    assert store.get("key") == BODY
    for call in (
        lambda: store.get("key"),
        lambda: store.get("key", 1, 199_999),
        lambda: list(store.stream("key")),
    ):
        proxy.fault(fault, after=IN_THE_BODY)
        with pytest.raises(StoreUnavailableError):
            call()
        proxy.clear()
        assert store.get("key") == BODY


def test_a_name_that_nobody_knows(open_s3: Opener) -> None:
    """DNS says no: as a store that is down (`.invalid` never resolves, RFC 6761)."""
    store = open_s3("http://store.invalid:9000")
    for call in (lambda: store.get("key"), lambda: store.put("key", b"x", 1), lambda: store.head("key")):
        with pytest.raises(StoreUnavailableError):
            call()


def test_a_body_that_stops_coming(proxy: netproxy.Proxy, open_s3: Opener) -> None:
    store = open_s3(proxy.endpoint)
    proxy.fault("hang", after=IN_THE_BODY)
    for call in (lambda: store.get("key"), lambda: list(store.stream("key"))):
        with pytest.raises(StoreUnavailableError):
            call()
    proxy.clear()
    assert store.get("key") == BODY


def test_one_bit_is_for_the_reader_to_notice(proxy: netproxy.Proxy, open_s3: Opener) -> None:
    store = open_s3(proxy.endpoint)
    proxy.fault("flip", after=IN_THE_BODY, times=1)
    got = store.get("key")
    assert sum((a ^ b).bit_count() for a, b in zip(got, BODY, strict=True)) == 1
    assert store.get("key") == BODY
    proxy.clear()


def test_refused_and_unknown_servers(proxy: netproxy.Proxy, open_s3: Opener) -> None:
    store = open_s3(proxy.endpoint)
    assert store.get("key") == BODY
    proxy.fault("refuse")
    with pytest.raises(StoreUnavailableError):
        store.get("key")
    with pytest.raises(StoreUnavailableError, match="cannot connect"):
        store.get("key")
    proxy.clear()
    assert store.get("key") == BODY
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for endpoint in (f"http://127.0.0.1:{taken.getsockname()[1]}", "http://no-such-host.invalid"):
            with pytest.raises(StoreUnavailableError, match="cannot connect to the server: check") as caught:
                open_s3(endpoint).get("key")
            assert endpoint in str(caught.value) and "key" not in str(caught.value)


def test_with_retries_a_broken_network_is_not_noticed(proxy: netproxy.Proxy, open_s3: Opener) -> None:
    policy = RetryPolicy(first=0.01, longest=0.05, deadline=10)
    store = RetryingStore(open_s3(proxy.endpoint), policy, policy)
    for fault in ("reset", "cut", "hang"):
        proxy.fault(fault, after=IN_THE_BODY, times=2)
        assert store.get("key") == BODY
        proxy.fault(fault, after=IN_THE_BODY, times=2)
        assert b"".join(store.stream("key", 7)) == BODY[7:]
    proxy.clear()


def test_no_credentials(server: FakeS3, open_s3: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = open_s3()
    for call in (lambda: store.get("key"), lambda: store.put("key", b"x", 1), lambda: list(store.list(""))):
        with pytest.raises(StoreDeniedError, match="no AWS credentials found: set AWS_PROFILE"):
            call()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreDeniedError, match="ProfileNotFound"):
        open_s3().get("key")
    assert server.requests == []


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "InvalidAccessKeyId", r"does not accept .* \(403 InvalidAccessKeyId\): correct them, or set"),
        (403, "SignatureDoesNotMatch", "does not accept .*: correct them"),
        (401, "", "does not accept .*: correct them"),
        (403, "AccessDenied", r"may not do this in the bucket \(403 AccessDenied\): they need s3:ListBucket"),
        (403, "", "correct them, or set AWS_PROFILE to others; or they may not do this in the bucket"),
    ],
)
@pytest.mark.parametrize("kept", ["in the environment", "in a file"])
def test_refused_credentials_are_named_with_what_is_to_be_done(
    server: FakeS3, open_s3: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    status: int, code: str, remedy: str, kept: str,
) -> None:  # fmt: skip
    origin = "the environment (AWS_ACCESS_KEY_ID ends in "
    if kept == "in a file":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        file = tmp_path / "credentials"
        file.write_text("[work]\naws_access_key_id = AKIA1234\naws_secret_access_key = a secret\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
        monkeypatch.setenv("AWS_PROFILE", "work")
        origin = f"{file}, profile work, key ending in 1234"
    server.answer = lambda request: error(status, code) if code else Answer(status)
    store = open_s3()
    for call in (
        lambda: store.get("the key"),
        lambda: store.put("the key", b"x", 1),
        lambda: list(store.list("")),
    ):
        with pytest.raises(StoreDeniedError, match=remedy) as caught:
            call()
        said = str(caught.value)
        assert origin in said and said.startswith("s3://bucket") and "the key" not in said
        assert "a secret" not in said and s3servers.SECRET_KEY not in said


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        (
            "AccessDenied",
            StoreDeniedError,
            "they need .* s3:DeleteObject, and a bucket whose objects are not locked",
        ),
        ("SlowDown", StoreThrottledError, "asks for fewer requests"),
        ("InternalError", StoreUnavailableError, "the server cannot now"),
        ("MethodNotAllowed", StoreDeniedError, "refuses the request .*MethodNotAllowed"),
    ],
)
def test_one_of_many_that_is_not_deleted(
    server: FakeS3, open_s3: Opener, code: str, expected: type, said: str
) -> None:
    """S3 answers with status 200 all the same."""
    left = f"<Error><Key>prefix/b</Key><Code>{code}</Code><Message>leaked</Message></Error>"
    result = f"<DeleteResult><Deleted><Key>prefix/a</Key></Deleted>{left}</DeleteResult>"
    server.answer = lambda request: Answer(200, result.encode())
    with pytest.raises(expected, match=said) as caught:
        open_s3().delete(["a", "b"])
    assert type(caught.value) is expected and "leaked" not in str(caught.value)


def test_a_false_condition_writes_nothing(server: FakeS3, open_s3: Opener) -> None:
    server.answer = lambda request: error(412, "PreconditionFailed")
    store = open_s3(conditional_put=True)
    with pytest.raises(PreconditionError):
        store.put_if("key", b"x", None)
    with pytest.raises(PreconditionError):
        store.put_if("key", b"x", '"etag"')
    conditions = [
        request.headers.get("if-match") or request.headers.get("if-none-match") for request in server.requests
    ]
    assert conditions == ["*", '"etag"', "etag"]  # RADOS gateways compare etags without their quotes


def test_an_upload_that_has_failed_is_given_up_once_and_says_why():
    """A client that tries again would do so for minutes, and its error be the one that is heard of."""
    calls = []

    class Client:
        def __init__(self, dogged):
            self._dogged = dogged

        def create_multipart_upload(self, **asked):
            return {"UploadId": "1"}

        def upload_part(self, **asked):
            raise ValueError("the reason")

        def abort_multipart_upload(self, **asked):
            calls.append(self._dogged)
            raise OSError("no network")

    data = BotoData(Client(False), Client(True), Client(True), "bucket", Capabilities(checks_sha256=True))
    size = 20 << 20
    with pytest.raises(ValueError, match="the reason"):
        data.put("data/x", bytes(size), size, "")
    assert calls == [False]
