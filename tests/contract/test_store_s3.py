"""What is special about S3 servers: what the probe sees, wrong accounts and buckets, storage classes."""

from __future__ import annotations

import os
import time

import pytest
from kinds import S3_KINDS

from tierfs.errors import BucketMissingError, ObjectArchivedError, StoreDeniedError, TierError, UsageError
from tierfs.store.base import Capabilities
from tierfs.store.decorators import ReadOnlyStore, innermost
from tierfs.store.probe import look, probe
from tierfs.store.s3 import S3Settings, S3Store
from tierfs.store.urls import open_store

SEEN = {
    "rclone": Capabilities(conditional_put=False, partial_content=False, checks_sha256=False, client="boto3"),
    "moto": Capabilities(conditional_put=True, partial_content=True, checks_sha256=False, client="obstore"),
    "versitygw": Capabilities(conditional_put=True, partial_content=True, checks_sha256=True, client="obstore"),
    "rgw": Capabilities(conditional_put=True, partial_content=True, checks_sha256=False, client="obstore"),
    "seaweedfs": Capabilities(conditional_put=True, partial_content=True, checks_sha256=True, client="obstore"),
    "minio": Capabilities(conditional_put=True, partial_content=True, checks_sha256=True, client="obstore"),
}
every_server = pytest.mark.parametrize("kind", S3_KINDS)


@every_server
def test_the_probe_sees_what_the_server_does_and_leaves_nothing(kind: str, stores) -> None:
    store = stores(kind)
    assert kind == "named" or store.capabilities == SEEN[kind]
    assert list(store.list("probe/")) == []


@every_server
@pytest.mark.parametrize("client", ["obstore", "boto3"])
def test_missing_bucket(kind: str, client: str, s3_server) -> None:
    settings = S3Settings("no-such-bucket", "x", s3_server(kind).endpoint)
    store = S3Store(settings, Capabilities(client=client))
    for call in (
        lambda: store.get("a"),
        lambda: store.get("a", 3, 5),
        lambda: store.head("a"),
        lambda: store.put("a", b"x", 1),
        lambda: list(store.list("")),
    ):
        with pytest.raises(BucketMissingError, match="no such bucket"):
            call()
    store.close()


@pytest.mark.parametrize("kind", [each for each in S3_KINDS if each.values[0] != "moto"])
@pytest.mark.parametrize("client", ["obstore", "boto3"])
def test_wrong_secret(kind: str, client: str, s3_server, monkeypatch: pytest.MonkeyPatch) -> None:
    server = s3_server(kind)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "quite-wrong")
    store = S3Store(S3Settings(server.bucket, "x", server.endpoint), Capabilities(client=client))
    for call in (lambda: store.get("a"), lambda: store.head("a"), lambda: store.put("a", b"x", 1)):
        with pytest.raises(StoreDeniedError) as caught:
            call()
        assert "quite-wrong" not in str(caught.value) and "\n" not in str(caught.value)
    store.close()


@pytest.mark.s3
def test_what_others_put_into_the_bucket_is_not_listed(s3_server) -> None:
    server = s3_server("moto")
    store = S3Store(S3Settings(server.bucket, "shared", server.endpoint))
    store.put("data/a", b"x", 1)
    for name in ("", "data/", "data/dir/", "data//b", "data/../c", "../shared/d"):
        store.admin().put_object(Bucket=server.bucket, Key=f"shared/{name}", Body=b"")
    assert [info.key for info in store.list("")] == ["data/a"]
    store.close()


@pytest.mark.s3
@pytest.mark.parametrize("client", ["obstore", "boto3"])
def test_what_is_in_an_archive_is_said_at_once_with_the_remedy(client: str, s3_server) -> None:
    server = s3_server("moto")
    store = open_store(server.url, capabilities=Capabilities(client=client))
    assert isinstance(innermost(store), S3Store)
    where = {"Bucket": server.bucket, "Key": "tests/data/old"}
    innermost(store).admin().put_object(**where, Body=b"old", StorageClass="DEEP_ARCHIVE")
    begun = time.monotonic()
    remedy = r"data/old: .* \(`aws s3api restore-object`\) and read again"
    for read in (lambda: store.get("data/old"), lambda: list(store.pieces("data/old", 0, 3))):
        with pytest.raises(ObjectArchivedError, match=remedy):
            read()
    assert time.monotonic() - begun < 5
    innermost(store).admin().restore_object(**where, RestoreRequest={"Days": 1})
    assert store.get("data/old") == b"old"
    store.close()


@pytest.mark.parametrize("storage_class", ["GLACIER", "DEEP_ARCHIVE"])
def test_new_objects_do_not_go_into_an_archive(storage_class: str) -> None:
    with pytest.raises(UsageError, match=f"{storage_class} is an archive"):
        probe(open_store(f"s3://bucket/x?storage_class={storage_class}"))


@pytest.mark.s3
@pytest.mark.parametrize("client", ["obstore", "boto3"])
def test_only_data_gets_the_storage_class(client: str, s3_server) -> None:
    server = s3_server("moto")
    store = open_store(f"{server.url}&storage_class=STANDARD_IA", capabilities=Capabilities(client=client))
    large = 17 * 1024 * 1024
    store.put("data/small", b"x", 1)
    store.put("data/large", iter([bytes(large)]), large)
    store.put("meta/journal", b"x", 1)
    admin = innermost(store).admin()
    classes = {
        key: admin.head_object(Bucket=server.bucket, Key=f"tests/{key}").get("StorageClass", "STANDARD")
        for key in ("data/small", "data/large", "meta/journal")
    }
    assert classes == {"data/small": "STANDARD_IA", "data/large": "STANDARD_IA", "meta/journal": "STANDARD"}
    store.close()


@pytest.mark.s3
@pytest.mark.parametrize("client", ["obstore", "boto3"])
def test_sums_are_sent_where_they_are_checked(client: str, s3_server) -> None:
    server = s3_server("versitygw")
    store = S3Store(
        S3Settings(server.bucket, "sums", server.endpoint), Capabilities(checks_sha256=True, client=client)
    )
    large = os.urandom(1024 * 1024) * 18
    assert store.put("small", b"x", 1).verified
    assert store.put("large", iter([large]), len(large)).verified
    for key in ("small", "large"):
        answer = store.admin().head_object(Bucket=server.bucket, Key=f"sums/{key}", ChecksumMode="ENABLED")
        assert answer.get("ChecksumSHA256"), key
    assert store.get("large") == large
    store.close()


@pytest.mark.s3
@pytest.mark.parametrize("client", ["obstore", "boto3"])
def test_an_upload_that_fails_leaves_no_parts(client: str, s3_server) -> None:
    server = s3_server("versitygw")
    store = S3Store(S3Settings(server.bucket, "parts", server.endpoint), Capabilities(client=client))
    with pytest.raises(TierError):
        store.put("a", iter([bytes(20 * 1024 * 1024)]), 30 * 1024 * 1024)
    assert not store.admin().list_multipart_uploads(Bucket=server.bucket).get("Uploads")
    store.close()


@pytest.mark.s3
def test_credentials_are_read_again_when_their_file_changes(
    s3_server, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = s3_server("versitygw")
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    path = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setattr("tierfs.store.s3._LOOK_EVERY", 0.0)
    store = S3Store(S3Settings(server.bucket, "x", server.endpoint))
    with pytest.raises(StoreDeniedError, match="no AWS credentials found: set AWS_PROFILE"):
        store.get("a")
    path.write_text("[default]\naws_access_key_id = tierfs-tests\naws_secret_access_key = wrong\n")
    with pytest.raises(StoreDeniedError):
        store.put("a", b"x", 1)
    path.write_text(f"[default]\naws_access_key_id = tierfs-tests\naws_secret_access_key = {secret}\n")
    os.utime(path, ns=(1, 1))
    assert store.put("a", b"x", 1).etag
    store.close()


@every_server
def test_uploads_that_were_cut_short_are_given_up_once_they_are_old(kind: str, s3_server) -> None:
    server = s3_server(kind)
    store = S3Store(S3Settings(server.bucket, "cut", server.endpoint), Capabilities(client="boto3"))
    admin, bucket = store.admin(), server.bucket
    names = ("data/old", "data/running", "other/theirs")
    uploads = {
        name: admin.create_multipart_upload(Bucket=bucket, Key=f"cut/{name}")["UploadId"] for name in names
    }
    for name, upload in uploads.items():
        target = {"Bucket": bucket, "Key": f"cut/{name}", "UploadId": upload}
        admin.upload_part(**target, PartNumber=1, Body=b"x" * 1000)

    def left() -> set[str]:
        listed = admin.list_multipart_uploads(Bucket=bucket, Prefix="cut/").get("Uploads", ())
        return {upload["Key"] for upload in listed}

    if not left():
        pytest.skip("this server does not list uploads in parts")
    assert store.abort_uploads("data/", 1000.0, set()) == 0
    assert store.abort_uploads("data/", 1e11, {"data/running"}) == 1
    assert left() == {"cut/data/running", "cut/other/theirs"}
    store.close()


@every_server
def test_what_can_be_told_of_a_store_without_writing(kind: str, stores) -> None:
    store = stores(kind)
    store.put("told", b"something to read", 17)
    before = {info.key: info.etag for info in store.list("")}
    reading = ReadOnlyStore(store)
    seen = look(reading, "told")
    known = store.capabilities
    assert (seen.client, seen.partial_content) == (known.client, known.partial_content)
    for change in (
        lambda: reading.put("told", b"x", 1),
        lambda: reading.put_if("other", b"x", None),
        lambda: reading.delete(["told"]),
        lambda: reading.abort_uploads("data/", 1e11, ()),
    ):
        with pytest.raises(StoreDeniedError, match="writes nothing"):
            change()
    assert bytes(reading.get("told")) == b"something to read"
    assert {info.key: info.etag for info in store.list("")} == before
    store.delete(["told"])


@pytest.mark.s3
def test_a_bucket_that_retains_what_is_in_it_gets_sums(s3_server) -> None:
    """As AWS, moto takes nothing without a sum into such a bucket, though it looks at none."""
    server = s3_server("moto")
    bucket = "retaining"
    admin = S3Store(S3Settings(bucket, "", server.endpoint)).admin()
    admin.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
    admin.put_object_lock_configuration(
        Bucket=bucket, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
    )
    url = f"s3://{bucket}/x?endpoint={server.endpoint}"
    seen = probe(open_store(url))
    assert seen.needs_sums and seen.conditional_put and not seen.checks_sha256
    store = open_store(url, capabilities=seen)
    large = os.urandom(1024 * 1024) * 17
    assert not store.put("data/large", iter([large]), len(large)).verified
    assert store.get("data/large") == large
    written = store.put_if("volume", b"1", None)
    store.put_if("volume", b"2", written.etag)
    store.delete(["data/large"])
    assert [(info.key, info.size) for info in store.list("")] == [("volume", 1)]
    store.close()


@pytest.mark.s3
@pytest.mark.rgw
def test_a_versioned_bucket_of_a_rados_gateway_keeps_no_conditions(s3_server) -> None:
    """Of many writers at once each is told that it was alone."""
    server = s3_server("rgw")
    admin = S3Store(S3Settings("versioned", "", server.endpoint)).admin()
    admin.create_bucket(Bucket="versioned")
    admin.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    seen = probe(open_store(f"s3://versioned/x?endpoint={server.endpoint}"))
    assert (seen.client, seen.conditional_put) == ("obstore", False)
