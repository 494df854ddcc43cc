"""What the probe makes of servers that lack a part of S3, and whether the store then works on them."""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from urllib.parse import parse_qs, urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fakes3
import s3servers
from fakes3 import Answer, FakeS3, Request, content, error

from tierfs import restoring
from tierfs.commands import restore
from tierfs.errors import StoreDeniedError, StoreUnavailableError, VolumeError
from tierfs.store.base import Capabilities, ObjectStore
from tierfs.store.probe import probe
from tierfs.store.urls import open_store


class SmallS3:
    """Objects by their paths. `bulk` is what a request to remove many gets; None: they are removed.

    `goes_on`: says how a listing does; `conditions`: looks whether they hold; `together`: between that look and
    the write it waits for so many.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.partial = True
        self.bulk: Answer | None = None
        self.single = Answer(204)
        self.conditions = False
        self.goes_on = True
        self.together: threading.Barrier | None = None

    def __call__(self, request: Request) -> Answer:
        path, query = urlsplit(request.path).path, urlsplit(request.path).query
        if request.method == "POST":
            return self._post(path, query, request.body)
        if request.method == "PUT":
            return self._put(path, query, request)
        if request.method == "DELETE":
            if self.single.status == 204:
                self.objects.pop(path, None)
            return self.single
        if "list-type" in query:
            return self._listing(path, parse_qs(query))
        if path not in self.objects:
            return error(404, "NoSuchKey")
        if not self.partial:
            request.headers.pop("range", None)
        return content(self.objects[path], request)

    def _put(self, path: str, query: str, request: Request) -> Answer:
        if "partNumber" in query:
            return Answer(headers={"ETag": '"e"'})
        if self.conditions and not self._as_expected(path, request.headers):
            return error(412, "PreconditionFailed")
        if self.together and "-race-" in path:
            self.together.wait()
        self.objects[path] = request.body
        return Answer(headers={"ETag": _etag(request.body)})

    def _as_expected(self, path: str, headers: dict[str, str]) -> bool:
        if headers.get("if-none-match") == "*":
            return path not in self.objects
        wanted = headers.get("if-match")
        return not wanted or (path in self.objects and wanted == _etag(self.objects[path]))

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> Answer:
        top = bucket.rstrip("/") + "/"
        keys = sorted(
            path.removeprefix(top) for path in self.objects if path.startswith(top + query["prefix"][0])
        )
        first, most = int(query.get("continuation-token", ["0"])[0]), int(query["max-keys"][0])
        more = first + most < len(keys)
        token = f"<NextContinuationToken>{first + most}</NextContinuationToken>"
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>1</Size><ETag>e</ETag>"
            "<LastModified>2026-11-23T03:00:00Z</LastModified></Contents>"
            for key in keys[first : first + most]
        )
        rest = f"<IsTruncated>{str(more).lower()}</IsTruncated>{token if more and self.goes_on else ''}"
        return Answer(200, f"<ListBucketResult>{rest}{entries}</ListBucketResult>".encode())

    def _post(self, path: str, query: str, body: bytes) -> Answer:
        if "uploads" in query:
            upload = "<UploadId>u</UploadId>"
            return Answer(
                200, f"<InitiateMultipartUploadResult>{upload}</InitiateMultipartUploadResult>".encode()
            )
        if self.bulk:
            return self.bulk
        keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
        for key in keys:
            self.objects.pop(f"{path.rstrip('/')}/{key}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        return Answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SmallS3, FakeS3]]:
    for name, value in s3servers.credentials().items():
        monkeypatch.setenv(name, value)
    with fakes3.serve() as fake:
        fake.answer = small = SmallS3()
        yield small, fake


def _url(fake: FakeS3) -> str:
    return f"s3://bucket/prefix?endpoint={fake.endpoint}"


SAID_ONLY = Answer(200, b"<DeleteResult></DeleteResult>")
REFUSALS = [
    error(501, "NotImplemented"),
    error(400, "MissingContentMD5"),
    error(405, "MethodNotAllowed"),
    SAID_ONLY,
]


@pytest.mark.parametrize("partial", [True, False], ids=["obstore", "boto3"])
@pytest.mark.parametrize("refusal", REFUSALS, ids=["501", "400", "405", "only-said"])
def test_what_cannot_be_removed_together_is_removed_one_by_one(
    small: tuple[SmallS3, FakeS3], partial: bool, refusal: Answer
) -> None:
    server, fake = small
    server.partial, server.bulk = partial, refusal
    seen = probe(open_store(_url(fake)))
    assert seen.client == ("obstore" if partial else "boto3")
    assert not seen.bulk_delete
    assert server.objects == {}
    store = open_store(_url(fake), capabilities=seen)
    for key in ("data/a", "data/b", "data/c"):
        store.put(key, b"x", 1)
    store.delete(["data/a", "data/b", "data/gone"])
    assert list(server.objects) == ["/bucket/prefix/data/c"]
    store.close()


@pytest.mark.parametrize("partial", [True, False], ids=["obstore", "boto3"])
def test_where_many_can_be_removed_together_they_are(small: tuple[SmallS3, FakeS3], partial: bool) -> None:
    server, fake = small
    server.partial = partial
    seen = probe(open_store(_url(fake)))
    assert seen.bulk_delete
    store = open_store(_url(fake), capabilities=seen)
    store.put("data/a", b"x", 1)
    fake.requests.clear()
    store.delete(["data/a", "data/b"])
    assert [request.method for request in fake.requests] == ["POST"]
    assert server.objects == {}
    store.close()


def test_who_may_not_remove_is_told(small: tuple[SmallS3, FakeS3]) -> None:
    server, fake = small
    server.bulk = server.single = error(403, "AccessDenied")
    with pytest.raises(StoreDeniedError, match=r"they need .* s3:DeleteObject"):
        probe(open_store(_url(fake)))


def test_a_server_that_removes_nothing_is_not_used(small: tuple[SmallS3, FakeS3]) -> None:
    server, fake = small
    server.bulk, server.single = SAID_ONLY, Answer(200)
    with pytest.raises(StoreUnavailableError, match="does not remove what it is told"):
        probe(open_store(_url(fake)))


@pytest.mark.parametrize("partial", [True, False], ids=["obstore", "boto3"])
def test_conditions_that_let_one_of_many_writers_through_are_relied_on(
    small: tuple[SmallS3, FakeS3], partial: bool
) -> None:
    server, fake = small
    server.partial, server.conditions = partial, True
    one_after_another, plain = threading.Lock(), fake.answer

    def answer(request: Request) -> Answer:
        with one_after_another:
            return plain(request)

    fake.answer = answer
    assert probe(open_store(_url(fake))).conditional_put
    assert server.objects == {}


@pytest.mark.parametrize("partial", [True, False], ids=["obstore", "boto3"])
def test_conditions_that_let_many_writers_through_at_once_are_none(
    small: tuple[SmallS3, FakeS3], partial: bool
) -> None:
    server, fake = small
    server.partial, server.conditions, server.together = partial, True, threading.Barrier(4, timeout=10)
    assert not probe(open_store(_url(fake))).conditional_put
    assert server.objects == {}


def test_a_restore_knows_what_the_server_can_do_before_it_asks_whose_the_store_is(
    small: tuple[SmallS3, FakeS3], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To tell how long ago the owner was there it writes an object and removes it."""
    server, fake = small
    server.bulk = error(501, "NotImplemented")
    known: list[Capabilities] = []

    def check_owner(store: ObjectStore, state: str, force: bool) -> NoReturn:
        known.append(store.capabilities)
        raise VolumeError("enough")

    monkeypatch.setattr(restoring, "check_owner", check_owner)
    with pytest.raises(VolumeError, match="enough"):
        restore._carry_out(_url(fake), str(tmp_path / "state"), False, False)
    assert [each.bulk_delete for each in known] == [False]


def test_a_server_that_lists_one_page_only_is_not_used(small: tuple[SmallS3, FakeS3]) -> None:
    server, fake = small
    server.goes_on = False
    with pytest.raises(StoreDeniedError, match="it knows no ListObjectsV2"):
        probe(open_store(_url(fake)))
    assert server.objects == {}
