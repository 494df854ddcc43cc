"""URLs of stores: what is taken, and that what is not is refused in one line that says what to write."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tierfs.errors import BucketMissingError, UsageError
from tierfs.store.base import Capabilities
from tierfs.store.decorators import innermost
from tierfs.store.directory import DirectoryStore
from tierfs.store.priority import Priority
from tierfs.store.retry import RetryingStore, RetryPolicy
from tierfs.store.throttle import ThrottledStore
from tierfs.store.urls import adapt, check_url, open_store


def test_directory(tmp_path) -> None:
    store = open_store(f"file://{tmp_path}/a%20b", create=True)
    store.put("x", b"1", 1)
    assert (tmp_path / "a b" / "x").read_bytes() == b"1"
    assert isinstance(innermost(store), DirectoryStore)
    assert store.describe() == f"file://{tmp_path}/a%20b"
    store.close()


def test_without_create_nothing_is_made(tmp_path) -> None:
    store = open_store(f"file://{tmp_path}/missing")
    with pytest.raises(BucketMissingError, match="mount it, or correct the URL"):
        store.put("x", b"1", 1)
    assert list(tmp_path.iterdir()) == []


def test_s3() -> None:
    url = "s3://bucket/a/b?endpoint=http://host:9000&region=eu-central-1&storage_class=STANDARD_IA"
    store = open_store(url, capabilities=Capabilities(client="boto3"))
    settings = innermost(store).settings
    assert (settings.bucket, settings.prefix, settings.endpoint) == ("bucket", "a/b", "http://host:9000")
    assert (settings.region, settings.storage_class) == ("eu-central-1", "STANDARD_IA")
    assert store.capabilities.client == "boto3"
    assert store.describe() == "s3://bucket/a/b?endpoint=http://host:9000"
    assert open_store("s3://bucket").describe() == "s3://bucket"
    assert open_store("s3://bucket?endpoint=http://[::1]:9000/").describe() == (
        "s3://bucket?endpoint=http://[::1]:9000"
    )
    assert open_store("s3://bucket/p/").describe() == "s3://bucket/p"


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("", "write s3://"),
        ("/mnt/nas", "write s3://bucket/prefix or file:///path"),
        ("http://host/bucket", "write s3://"),
        ("file://mnt/nas", "three slashes"),
        ("file:relative", "three slashes"),
        ("file:///", "directory of its own"),
        ("file:///x?create=1", "three slashes"),
        ("s3://", "write s3://bucket/prefix"),
        ("s3:///prefix", "write s3://bucket/prefix"),
        ("s3://key:hunter2@bucket", "use AWS_PROFILE"),
        ("s3://bucket/a/../b", "write s3://bucket/plain/path"),
        ("s3://bucket/a//b", "write s3://bucket/plain/path"),
        ("s3://bucket/a#b", "%23"),
        ("s3://bucket?profile=x", "there are endpoint, region, storage_class"),
        ("s3://bucket?region=", "give it once"),
        ("s3://bucket?region=a&region=b", "give it once"),
        ("s3://bucket?endpoint=host:9000", "write endpoint="),
        ("s3://bucket?endpoint=http://", "write endpoint="),
        ("s3://bucket?endpoint=http://h:99999", "write endpoint="),
        ("s3://bucket?endpoint=http://me:hunter2@host", "write endpoint="),
        ("s3://bucket?endpoint=http://host/path", "write endpoint="),
    ],
)
def test_bad_urls_are_refused_with_a_remedy(url: str, remedy: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)
    with pytest.raises(UsageError):
        check_url(url)


def test_s3_clients_are_imported_when_an_s3_url_is_opened_and_not_before() -> None:
    code = """
import sys, tierfs.store.urls as urls
urls.open_store("file:///nowhere")
clients = {"boto3", "botocore", "obstore"}
assert not clients & set(sys.modules), clients & set(sys.modules)
urls.open_store("s3://bucket/prefix")
assert clients <= set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_open_store_goes_on_with_other_settings(tmp_path) -> None:
    for url, storage_class in (
        ("s3://bucket/x", "GLACIER_IR"), ("s3://bucket/x?storage_class=STANDARD_IA", "STANDARD_IA"),
        (f"file://{tmp_path}", None),
    ):  # fmt: skip
        store = open_store(url)
        adapt(store, url, RetryPolicy(deadline=7.0), 5, "GLACIER_IR")
        assert isinstance(store, RetryingStore) and isinstance(store.inner, ThrottledStore)
        assert store._tries(Priority.FOREGROUND)._policy.deadline == 7.0
        assert store.inner.gate.limit == 5
        assert getattr(getattr(innermost(store), "settings", None), "storage_class", None) == storage_class
        store.close()
