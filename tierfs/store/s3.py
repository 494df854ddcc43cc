"""The S3 store: credentials, clients, and the one file that imports boto3 and obstore.

Data goes through obstore (or boto3, where the probe said so), administration through boto3. Nothing touches the
network or the credentials before the first call: a volume mounts while its store is away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.exceptions
import botocore.session
import obstore
import obstore.store

from tierfs.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    PreconditionError,
    StoreDeniedError,
    StoreUnavailableError,
)
from tierfs.store.base import PART, Body, Capabilities, ObjectInfo, ObjectStore, Part, Put
from tierfs.store.keys import check_key, check_prefix, check_range, is_key, too_short
from tierfs.store.s3_boto import BotoData, sha256_base64
from tierfs.store.s3_credentials import Credentials
from tierfs.store.s3_errors import NO_CREDENTIALS, Translated
from tierfs.store.s3_obstore import ONE_REQUEST, Data, ObstoreData, part_size
from tierfs.store.s3_proxy import options_of_boto, options_of_obstore, proxy_of
from tierfs.store.s3_ranges import Ranges
from tierfs.store.s3_trust import trusted

COLD_PREFIX = "data/"  # only these keys get the storage class: a journal in Glacier could not restore anything
# In the others a read is paid for, and so is a copy of a part.
_READ_FOR_NOTHING = frozenset({"", "STANDARD", "INTELLIGENT_TIERING"})
_COPIED_FROM = 4 * PART  # bytes: of what is smaller little could be spared
_PAGE = 1000  # keys of a listing that come at once
_SIGNED = timedelta(minutes=5)  # how long the URL of one request is good for
_LOOK_EVERY = 10.0  # seconds between looks whether the credential files have changed
# Of an upload in parts one that fails is sent again: else all would have to be, and with enough of them no
# upload would end on a bad line. Whole requests are tried again by the retry decorator.
_PART_TRIES = 8
_PART_SECONDS = 180
_COPY_TRIES = 3  # then the part is sent


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Where the objects are. Empty text means: as the AWS configuration says."""

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""
    storage_class: str = ""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `read` bounds the silence of a server; `upload` one request that carries a part; `send` how long
    a slow line may take for some of a part, and `copy` a server to copy one."""

    connect: float = 5.0
    read: float = 20.0
    upload: float = 300.0
    send: float = 60.0
    copy: float = 60.0


class S3Store(ObjectStore):
    """A prefix of a bucket. Thread-safe; open it after fork."""

    def __init__(
        self,
        settings: S3Settings,
        capabilities: Capabilities = Capabilities(),  # noqa: B008  (frozen)
        timeouts: Timeouts = Timeouts(),
    ) -> None:
        self.settings = settings
        self.capabilities = capabilities
        self.timeouts = timeouts
        self._root = f"{settings.prefix}/" if settings.prefix else ""
        self._place = describe(settings)
        self._credentials = Credentials(settings.region, _new_session)
        self._lock = threading.Lock()
        self._connected: tuple[Any, Any, Data] | None = None
        self._look_again = 0.0

    def with_capabilities(self, capabilities: Capabilities) -> S3Store:
        """The same place, used as if the server could do this; for probing."""
        return S3Store(self.settings, capabilities, self.timeouts)

    def _translated(self, key: str = "") -> Translated:
        return Translated(self._place, key, self._credentials.origin)

    def use_storage_class(self, name: str) -> None:
        """For new objects, from now on."""
        self.settings = replace(self.settings, storage_class=name)

    def put(self, key: str, body: bytes | Iterable[bytes], size: int) -> Put:
        full = self._full(key)
        storage_class = self.settings.storage_class if key.startswith(COLD_PREFIX) else ""
        with self._translated(key):
            answer = self._data().put(full, body, size, storage_class)
        if size <= ONE_REQUEST and answer.etag:
            return answer
        return self._ended(key, size, answer)

    def _ended(self, key: str, size: int, answer: Put) -> Put:
        """What is known at the end of an upload in parts: a RADOS gateway names no etag there, and rclone one
        that it then forgets."""
        found = self.head(key)
        if found.size != size:
            raise too_short(key, 0, size, found.size)
        return replace(answer, etag=found.etag)

    def part_size(self, size: int) -> int:
        free = self.settings.storage_class in _READ_FOR_NOTHING
        return part_size(size) if free and size >= _COPIED_FROM else 0

    def put_parts(self, key: str, parts: Iterable[Part], size: int) -> Put:
        full = self._full(key)
        storage_class = self.settings.storage_class if key.startswith(COLD_PREFIX) else ""
        named = (replace(part, key=self._full(part.key)) if part.key else part for part in parts)
        with self._translated(key):
            answer = self._data().put_parts(full, named, size, storage_class)
        return self._ended(key, size, answer)

    def put_if(self, key: str, body: bytes, etag: str | None) -> Put:
        full = self._full(key)
        try:
            if not self.capabilities.conditional_put:
                return self._put_after_check(key, body, etag)
            return self._put_if_matching(full, body, etag)
        except ObjectMissingError as exc:
            raise PreconditionError(f"{self._place}: {key} is not the expected version") from exc

    def _put_if_matching(self, full: str, body: bytes, etag: str | None) -> Put:
        """RADOS gateways compare the bare etag: what is refused in quotes is tried once without."""
        try:
            with self._translated(full):
                return self._data().put_if(full, body, etag)
        except PreconditionError:
            if etag is None or not etag.startswith('"'):
                raise
            with self._translated(full):
                return self._data().put_if(full, body, etag.strip('"'))

    def _put_after_check(self, key: str, body: bytes, etag: str | None) -> Put:
        try:
            present: str | None = self.head(key).etag
        except ObjectMissingError:
            present = None
        if present != etag:
            raise PreconditionError(f"{self._place}: {key} is not the expected version")
        return self.put(key, body, len(body))

    def get(self, key: str, start: int = 0, length: int | None = None) -> Body:
        check_range(start, length)
        full = self._full(key)
        if length == 0:
            return self._nothing(key, start, length)
        try:
            with self._translated(key):
                return self._data().get(full, start, length)
        except ObjectCorruptError:
            if length is None and start:  # servers refuse to read from the very end on
                return self._nothing(key, start, length)
            raise

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        check_range(start, length)
        full = self._full(key)
        if length == 0:
            self._nothing(key, start, length)
            return
        begun = False
        try:
            with self._translated(key):
                for piece in self._data().stream(full, start, length):
                    begun = True
                    yield piece
        except ObjectCorruptError:
            if begun or length is not None or not start:
                raise
            self._nothing(key, start, length)

    def pieces(self, key: str, start: int, length: int) -> Iterator[Body]:
        check_range(start, length)
        full = self._full(key)
        with self._translated(key):
            yield from self._data().pieces(full, start, length)

    def _nothing(self, key: str, start: int, length: int | None) -> bytes:
        """No bytes, if the object reaches to `start`."""
        size = self.head(key).size
        if size < start or (length is None and size > start):
            raise too_short(key, start, length, 0)
        return b""

    def head(self, key: str) -> ObjectInfo:
        full = self._full(key)
        try:
            with self._translated(key):
                found = self._data().head(full)
        except ObjectMissingError:
            self.get(key)  # the answer to a HEAD has no body to say whether the object or the bucket is missing
            raise
        return ObjectInfo(key, found.size, found.etag, found.modified)

    def delete(self, keys: Sequence[str]) -> None:
        full = [self._full(key) for key in keys]
        if full:
            with self._translated():
                self._data().delete(full)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Through boto3: its prefixes are text, as ours, where obstore's end at a slash.

        obstore would need a twentieth of the CPU (75 µs a key), but gives up at keys like "a//b", which others
        may have put there, and shows "a/" as "a".
        """
        return self.list_in_pages(prefix, _PAGE)

    def list_in_pages(self, prefix: str, most: int) -> Iterator[ObjectInfo]:
        """As `list`, of so many keys a request at most."""
        check_prefix(prefix)
        wanted = {"Bucket": self.settings.bucket, "Prefix": self._root + prefix}
        with self._translated():
            pages = self.admin().get_paginator("list_objects_v2")
            for page in pages.paginate(**wanted, PaginationConfig={"PageSize": most}):
                if "IsTruncated" not in page:  # boto3 takes nonsense for an empty listing
                    raise StoreUnavailableError(f"{self._place}: the server's listing makes no sense")
                for entry in page.get("Contents", ()):
                    if not entry["Key"].startswith(self._root + prefix):
                        raise StoreDeniedError(
                            f"{self._place}: the server lists what was not asked for: choose a plain prefix, or"
                            " another server"
                        )
                    key = entry["Key"][len(self._root) :]
                    if not is_key(key):
                        continue
                    etag = f'"{entry["ETag"].strip(chr(34))}"'  # rclone leaves out the quotes, in listings only
                    yield ObjectInfo(key, entry["Size"], etag, entry["LastModified"].timestamp())
                if page["IsTruncated"] and not page.get("NextContinuationToken"):  # boto3 ends there
                    raise StoreDeniedError(
                        f"{self._place}: the server lists {_PAGE} objects at most (it knows no ListObjectsV2):"
                        " use another"
                    )

    def abort_uploads(self, prefix: str, before: float, keep: Collection[str]) -> int:
        check_prefix(prefix)
        count = 0
        bucket, root = self.settings.bucket, self._root
        with self._translated():
            pages = self.admin().get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=bucket, Prefix=root + prefix):
                for upload in page.get("Uploads", ()):
                    key = upload["Key"][len(root) :]
                    # The server may not have looked at the prefix.
                    ours = upload["Key"].startswith(root + prefix) and key not in keep
                    if ours and upload["Initiated"].timestamp() < before:
                        target = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                        self.admin().abort_multipart_upload(**target)
                        count += 1
        return count

    def describe(self) -> str:
        return self._place

    def close(self) -> None:
        with self._lock:
            connected, self._connected = self._connected, None
        if connected:
            connected[1].close()

    def admin(self) -> Any:
        """The boto3 client: listing, bucket and lifecycle administration, restores from an archive."""
        return self._connect()[1]

    def accepts_sum(self, key: str, body: bytes, summed: bytes) -> bool:
        """Whether the server takes `body` with the SHA-256 of `summed`; for probing."""
        sent = {"Bucket": self.settings.bucket, "Key": self._full(key), "Body": body}
        return self._accepted(lambda: self.admin().put_object(**sent, ChecksumSHA256=sha256_base64(summed)))

    def accepts_part_sum(self, key: str, body: bytes, summed: bytes) -> bool:
        """As `accepts_sum`, of a part of an upload that is given up afterwards."""
        target = {"Bucket": self.settings.bucket, "Key": self._full(key)}
        with self._translated(key):
            upload = self.admin().create_multipart_upload(**target, ChecksumAlgorithm="SHA256")
        target["UploadId"] = upload["UploadId"]
        part = {"PartNumber": 1, "Body": body, "ChecksumSHA256": sha256_base64(summed)}
        try:
            return self._accepted(lambda: self.admin().upload_part(**target, **part))
        finally:
            with self._translated(key):
                self.admin().abort_multipart_upload(**target)

    def _accepted(self, send: Callable[[], Any]) -> bool:
        try:
            with self._translated():
                send()
        except (ObjectCorruptError, StoreDeniedError):
            return False
        return True

    def _data(self) -> Data:
        return self._connect()[2]

    def _full(self, key: str) -> str:
        check_key(key)
        return self._root + key

    def _connect(self) -> tuple[Any, Any, Data]:
        """Session, boto3 client and data client; new ones when the credential files have changed."""
        connected = self._connected
        if connected and connected[0] is self._credentials.latest and time.monotonic() < self._look_again:
            return connected
        with self._lock:
            session = self._credentials.session()
            self._look_again = time.monotonic() + _LOOK_EVERY
            if self._connected is None or self._connected[0] is not session:
                admin = self._make_admin(session)
                self._connected = (session, admin, self._make_data(session, admin))
            return self._connected

    def _make_admin(self, session: Any, tries: int = 1, timeouts: Timeouts | None = None) -> Any:
        if session.get_credentials() is None:
            raise StoreDeniedError(f"{self._place}: {NO_CREDENTIALS}")
        config = botocore.config.Config(
            connect_timeout=(timeouts or self.timeouts).connect,
            read_timeout=(timeouts or self.timeouts).read,
            retries={"mode": "standard", "total_max_attempts": tries},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=32,
            s3={"addressing_style": "path" if self.settings.endpoint else "auto"},
        )
        def client(config: Any) -> Any:
            endpoint = self.settings.endpoint or None
            made = session.client("s3", endpoint_url=endpoint, config=config, verify=trusted(session))
            made.meta.events.register("before-call.s3.HeadBucket", _stay_there)
            return made

        try:
            made = client(config)
        except botocore.exceptions.BotoCoreError:
            raise
        except ValueError as exc:
            raise StoreDeniedError(
                f"{self._place}: AWS_ENDPOINT_URL, or endpoint_url in the AWS configuration, is no endpoint:"
                " write https://host or http://host:port"
            ) from exc
        proxies = options_of_boto(made.meta.endpoint_url)
        return client(config.merge(botocore.config.Config(**proxies))) if proxies else made

    def _make_data(self, session: Any, admin: Any) -> Data:
        @cache
        def by_parts() -> BotoData:
            # What is sent goes out under the timeout for connecting, in urllib3.
            times = self.timeouts
            slow = replace(times, connect=times.send, read=times.upload)
            dogged = self._make_admin(session, _PART_TRIES, slow)
            copier = self._make_admin(session, _COPY_TRIES, replace(times, read=times.copy))
            return BotoData(admin, dogged, copier, self.settings.bucket, self.capabilities)

        if self.capabilities.client == "boto3":
            return by_parts()
        quick = self._make_obstore(admin, self.timeouts.read)
        patient = self._make_obstore(admin, self.timeouts.upload)
        dogged = self._make_obstore(admin, self.timeouts.upload, _PART_TRIES)
        verified = self.capabilities.checks_sha256
        return ObstoreData(quick, patient, dogged, verified, by_parts, self._make_ranges(admin, quick))

    def _make_ranges(self, admin: Any, store: Any) -> Ranges | None:
        """Over TLS, and by way of a proxy, obstore serves as well."""
        endpoint: str = admin.meta.endpoint_url
        if not endpoint.startswith("http://") or proxy_of(endpoint):
            return None
        sign = partial(obstore.sign, store, "GET", expires_in=_SIGNED)
        return Ranges(sign, self.timeouts.connect, self.timeouts.read)

    def _make_obstore(self, admin: Any, read_timeout: float, tries: int = 1) -> Any:
        endpoint: str = admin.meta.endpoint_url
        own_server = not str(urlsplit(endpoint).hostname).endswith((".amazonaws.com", ".amazonaws.com.cn"))
        config: dict[str, Any] = {
            "region": admin.meta.region_name,
            "virtual_hosted_style_request": not own_server and "." not in self.settings.bucket,
        }
        if own_server:
            config["endpoint"] = endpoint
        if not self.capabilities.bulk_delete:
            config["disable_bulk_delete"] = True
        if self.capabilities.checks_sha256 or self.capabilities.needs_sums:
            config["checksum_algorithm"] = "sha256"
        return obstore.store.S3Store(
            self.settings.bucket,
            config=config,  # type: ignore[arg-type]
            client_options={  # type: ignore[arg-type]
                **options_of_obstore(endpoint),
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=self.timeouts.connect),
                "read_timeout": timedelta(seconds=read_timeout),
                "timeout": timedelta(
                    days=1
                ),  # of a whole request; a stream takes as long as its object is large
            },
            retry_config={"max_retries": tries - 1, "retry_timeout": timedelta(seconds=_PART_SECONDS)},
            credential_provider=self._credentials,
        )


def _new_session(**settings: str) -> Any:
    core = botocore.session.get_session()
    core.register_component("data_loader", _models())
    return boto3.Session(botocore_session=core, **settings)


def _stay_there(context: dict[str, Any], **_: Any) -> None:
    """Have what is asked about a bucket redirected nowhere: botocore asks to find out where it is redirected,
    and where that is redirected too it would ask again, a hundred times, until there is no stack any more."""
    context.get("s3_redirect", {})["redirected"] = True


@cache
def _models() -> Any:
    """What botocore knows of S3, as it has read it: megabytes of JSON, which each session would read anew."""
    return botocore.session.get_session().get_component("data_loader")


def describe(settings: S3Settings) -> str:
    """The URL, without a name or password that somebody may have put into the endpoint."""
    path = f"/{settings.prefix}" if settings.prefix else ""
    if not settings.endpoint:
        return f"s3://{settings.bucket}{path}"
    parts = urlsplit(settings.endpoint)
    return f"s3://{settings.bucket}{path}?endpoint={parts.scheme}://{parts.netloc.rpartition('@')[2]}"
