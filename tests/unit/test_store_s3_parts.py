"""Parts that a server takes from other objects: it is believed as far as it names their sums."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, unquote, urlsplit

import fakes3
import pytest

from tierfs.errors import ObjectCorruptError
from tierfs.store.base import PART, Capabilities, ObjectStore, Part
from tierfs.store.s3 import S3Settings, S3Store, Timeouts

FORMER = os.urandom(PART) * 4
WANTED = FORMER[:PART] + os.urandom(PART) + FORMER[2 * PART : 3 * PART] + b"the end"
AWS = Capabilities(conditional_put=True, partial_content=True, checks_sha256=True, client="obstore")
SUM = "x-amz-checksum-sha256"


def sum_of(body: bytes) -> str:
    return base64.b64encode(hashlib.sha256(body).digest()).decode()


class Server:
    """Uploads in parts as S3 makes them of former objects. `copied` makes the answer to a copy, of what was
    copied; `sent` counts bytes."""

    def __init__(self, fake: fakes3.FakeS3) -> None:
        self.fake = fake
        self.objects: dict[str, bytes] = {"data/former": FORMER}
        self.parts: dict[int, bytes] = {}
        self.sent = 0
        self.copied: Callable[[bytes], fakes3.Answer] = copy_answer
        self.aborted = False

    def __call__(self, request: fakes3.Request) -> fakes3.Answer:
        parts = urlsplit(request.path)
        key, words = unquote(parts.path).removeprefix("/bucket/prefix/"), parse_qs(parts.query, True)
        if request.method == "POST" and "uploads" in words:
            return xml("InitiateMultipartUploadResult", f"<UploadId>u</UploadId><Key>{key}</Key>")
        if request.method == "POST":
            return self.complete(key, request.body.decode())
        if request.method == "DELETE":
            self.aborted = True
            return fakes3.Answer(204)
        if request.method == "HEAD":
            size = str(len(self.objects[key]))
            headers = {"Content-Length": size, "ETag": '"e"', "Last-Modified": fakes3.DATE}
            return fakes3.Answer(200, b"", headers)
        return self.part(int(words["partNumber"][0]), request)

    def part(self, number: int, request: fakes3.Request) -> fakes3.Answer:
        source = unquote(request.headers.get("x-amz-copy-source", "")).removeprefix("bucket/prefix/")
        if source and source not in self.objects:
            return fakes3.error(404, "NoSuchKey")
        if source:
            first, _, last = request.headers["x-amz-copy-source-range"].removeprefix("bytes=").partition("-")
            self.parts[number] = self.objects[source][int(first) : int(last) + 1]
            return self.copied(self.parts[number])
        self.parts[number] = request.body
        self.sent += len(request.body)
        assert request.headers[SUM] == sum_of(request.body)
        return fakes3.Answer(200, b"", {"ETag": f'"{number}"', SUM: request.headers[SUM]})

    def complete(self, key: str, body: str) -> fakes3.Answer:
        """As S3 does: only with the sums of the parts that it has."""
        named = {
            int(re.findall(r"<PartNumber>(\d+)<", part)[0]): re.findall(r"<ChecksumSHA256>(.*?)<", part)[0]
            for part in re.findall(r"<Part>(.*?)</Part>", body)
        }
        if named != {number: sum_of(part) for number, part in self.parts.items()}:
            return fakes3.error(400, "InvalidPart")
        self.objects[key] = b"".join(self.parts[number] for number in sorted(self.parts))
        return xml("CompleteMultipartUploadResult", f'<ETag>"e"</ETag><Key>{key}</Key>')


def xml(name: str, text: str) -> fakes3.Answer:
    head = '<?xml version="1.0" encoding="UTF-8"?>'
    return fakes3.Answer(200, f'{head}<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{text}</{name}>'.encode())


def copy_answer(body: bytes) -> fakes3.Answer:
    return xml("CopyPartResult", f'<ETag>"c"</ETag><ChecksumSHA256>{sum_of(body)}</ChecksumSHA256>')


@pytest.fixture
def server() -> Iterator[tuple[Server, ObjectStore]]:
    with pytest.MonkeyPatch.context() as patch, fakes3.serve() as fake:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "x")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        made = fake.answer = Server(fake)
        store = S3Store(S3Settings("bucket", "prefix", fake.endpoint), AWS)
        yield made, store
        store.close()


def parts() -> Iterator[Part]:
    for at in range(0, len(WANTED), PART):
        body = WANTED[at : at + PART]
        yield Part(body, "data/former" if body in (FORMER[:PART], FORMER[2 * PART : 3 * PART]) else "", at)


def test_what_the_server_has_and_names_the_sum_of_is_not_sent(server) -> None:
    s3, store = server
    answer = store.put_parts("data/new", parts(), len(WANTED))
    assert (answer.verified, answer.copied) == (True, 2 * PART)
    assert s3.objects["data/new"] == WANTED and s3.sent == len(WANTED) - 2 * PART


@pytest.mark.parametrize("found", ["another sum", "no sum", "501", "denied", "archived"])
def test_what_the_server_does_not_have_or_does_not_vouch_for_is_sent(server, found: str) -> None:
    s3, store = server
    if found == "another sum":
        s3.objects["data/former"] = bytes(len(FORMER))
    elif found == "no sum":
        s3.copied = lambda body: xml("CopyPartResult", '<ETag>"c"</ETag>')
    else:
        code = {"501": "NotImplemented", "denied": "AccessDenied", "archived": "InvalidObjectState"}[found]
        s3.copied = lambda body: fakes3.error(501 if found == "501" else 403, code)
    answer = store.put_parts("data/new", parts(), len(WANTED))
    assert (answer.verified, answer.copied) == (True, 0)
    assert s3.objects["data/new"] == WANTED and s3.sent == len(WANTED)


def test_a_server_that_makes_something_else_of_a_copy_is_found_out(server) -> None:
    """An upload of an empty part in its place, which another may not replace."""
    s3, store = server
    s3.copied = lambda body: fakes3.Answer(200, b"", {"ETag": '"0"'})
    with pytest.raises(ObjectCorruptError, match="copies no parts"):
        store.put_parts("data/new", parts(), len(WANTED))
    assert s3.aborted and "data/new" not in s3.objects


def test_an_error_in_an_answer_of_success_is_an_error(server) -> None:
    """S3 begins to answer before it has copied, and says in the body how that ended."""
    s3, store = server
    s3.copied = lambda body: fakes3.Answer(200, fakes3.error(500, "InternalError").body)
    answer = store.put_parts("data/new", parts(), len(WANTED))
    assert s3.objects["data/new"] == WANTED and answer.copied == 0


def test_a_copy_that_is_not_answered_is_no_reason_to_send_nothing(server) -> None:
    s3, store = server
    s3.copied = lambda body: fakes3.Answer(200, b"<Copy", cut=2)
    answer = store.put_parts("data/new", parts(), len(WANTED))
    assert s3.objects["data/new"] == WANTED and answer.copied == 0


def test_parts_that_the_server_does_not_know_in_the_end(server) -> None:
    """Of what it has copied it makes no object: that is told from being forbidden to put one."""
    s3, store = server
    s3.copied = lambda body: [copy_answer(body), s3.parts.clear()][0]
    with pytest.raises(ObjectCorruptError, match="does not know the parts"):
        store.put_parts("data/new", parts(), len(WANTED))
    assert s3.aborted and "data/new" not in s3.objects


def test_a_slow_line_takes_its_time(server, monkeypatch) -> None:
    """What is sent goes under the timeout for connecting, in urllib3: that of a part is another."""
    s3, store = server
    unhurried = S3Store(store.settings, AWS, Timeouts(connect=0.3, send=20))
    s3.fake.slow = 1.0
    answer = unhurried.put_parts("data/new", parts(), len(WANTED))
    assert s3.objects["data/new"] == WANTED and answer.copied == 2 * PART
    sent = [request for request in s3.fake.requests if request.method == "PUT" and request.body]
    assert len(sent) == 2, "something was sent twice"
    unhurried.close()


def test_where_reading_is_paid_for_all_is_sent() -> None:
    for storage_class, free in (("", True), ("STANDARD", True), ("STANDARD_IA", False), ("GLACIER_IR", False)):
        store = S3Store(S3Settings("bucket", storage_class=storage_class))
        assert (store.part_size(64 * PART) == PART) == free
        assert store.part_size(4 * PART - 1) == 0
        store.close()


@pytest.mark.parametrize("size", [4 * PART, 9000 * PART, 9000 * PART + 1, 5 << 40])
def test_parts_are_whole_and_not_too_many(size: int) -> None:
    store = S3Store(S3Settings("bucket"))
    part = store.part_size(size)
    assert part % PART == 0 and -(-size // part) <= 10_000 and part <= 5 << 30
    store.close()
