"""Whether requests go by a proxy: the same for both clients, and as a person means it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fakes3
import s3servers
from fakes3 import Answer, FakeS3

from tierfs.errors import StoreDeniedError, StoreUnavailableError
from tierfs.store.base import Capabilities
from tierfs.store.s3 import S3Settings, S3Store, Timeouts
from tierfs.store.s3_proxy import proxy_of

PROXY = "http://proxy:3128"
DEAD = "http://127.0.0.1:9"
BODY = b"what is in it" * 200_000
LISTING = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in s3servers.credentials().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def server() -> Iterator[FakeS3]:
    with fakes3.serve() as fake:
        fake.answer = lambda request: (
            Answer(200, LISTING) if "list-type" in request.path else fakes3.content(BODY, request)
        )
        yield fake


@contextlib.contextmanager
def opened(endpoint: str, client: str) -> Iterator[S3Store]:
    timeouts = Timeouts(connect=1, read=2, upload=2)
    with contextlib.closing(
        S3Store(S3Settings("bucket", "x", endpoint), Capabilities(client=client), timeouts)
    ) as store:
        yield store


@pytest.mark.parametrize(
    ("endpoint", "direct"),
    [
        ("http://nas:9000", False),
        ("http://10.1.2.3:9000", False),
        ("http://127.0.0.1:9000", True),
        ("http://127.8.8.8:9000", True),
        ("http://[::1]:9000", True),
        ("http://localhost:9000", True),
        ("http://192.168.7.7:9000", True),
        ("http://[fd00::2]:9000", True),
        ("http://[fe80::2]:9000", False),
        ("http://nas.lan", True),
        ("https://nas", True),  # HTTP_PROXY says nothing about it
    ],
)
def test_which_servers_are_asked_directly(endpoint: str, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", "192.168.0.0/16, fd00::/8,.lan")
    assert proxy_of(endpoint) == (None if direct else PROXY)


def test_other_ways_to_name_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_of("https://nas") is None
    monkeypatch.setenv("ALL_PROXY", "proxy:3128")
    assert proxy_of("https://nas") == PROXY
    monkeypatch.setenv("https_proxy", "http://other:1")
    assert proxy_of("https://nas") == "http://other:1"
    monkeypatch.setenv("https_proxy", "socks5://other:1")
    assert proxy_of("https://nas") is None
    monkeypatch.setenv("NO_PROXY", "*")
    assert proxy_of("http://nas") is None


@pytest.mark.parametrize("client", ["obstore", "boto3"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_all_requests_go_by_the_proxy(
    server: FakeS3, client: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, server.endpoint)
    with opened("http://store.invalid:9000", client) as store:
        assert store.get("a") == BODY
        assert store.get("a", 5, 2 << 20) == BODY[5 : 5 + (2 << 20)]
        assert list(store.list("")) == []
    assert {request.path.split("?")[0] for request in server.requests} == {
        "http://store.invalid:9000/bucket/x/a", "http://store.invalid:9000/bucket",
    }  # fmt: skip


@pytest.mark.parametrize("client", ["obstore", "boto3"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_server_on_this_machine_is_asked_directly(
    server: FakeS3, client: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, DEAD)
    with opened(server.endpoint, client) as store:
        assert store.get("a") == BODY
        assert list(store.list("")) == []


@pytest.mark.parametrize("client", ["obstore", "boto3"])
def test_who_cannot_connect_is_told_of_the_proxy(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", DEAD)
    with opened("http://store.invalid:9000", client) as store:
        for call in (lambda: store.get("a"), lambda: list(store.list(""))):
            with pytest.raises(StoreUnavailableError, match="and the proxy that the environment names"):
                call()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "nas", "http://"])
def test_an_endpoint_of_the_environment_that_is_none_is_named(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with opened("", "obstore") as store, pytest.raises(StoreDeniedError, match="is no endpoint: write https"):
        store.get("a")


def test_a_region_that_is_none_is_named() -> None:
    store = S3Store(S3Settings("bucket", region="nowhere or so"), Capabilities(client="obstore"))
    with pytest.raises(StoreDeniedError, match=r"correct region=\.\.\. in the URL"):
        store.get("a")
