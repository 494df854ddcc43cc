"""The S3 data path through boto3, for servers that obstore cannot read: ten times the CPU, fewer demands.

Receives its client from s3.py.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from tierfs.errors import ObjectCorruptError, StoreUnavailableError
from tierfs.store.base import Body, Capabilities, ObjectInfo, Part, Put
from tierfs.store.keys import exactly, too_short, whole, wrong_size
from tierfs.store.s3_errors import UndeletedError
from tierfs.store.s3_obstore import ONE_REQUEST, PIECE, part_size

log = logging.getLogger("store")

_PARTS_AT_ONCE = 4
_UNANSWERED = frozenset({"ReadTimeoutError", "ConnectionClosedError", "ResponseParserError"})  # of botocore
_NO_PARTS = frozenset({"InvalidPart", "InvalidPartOrder", "InvalidRequest", "EntityTooSmall", "BadDigest"})
_DELETES_A_REQUEST = 1000  # the limit of S3


class BotoData:
    """`dogged`: a client that tries again, on slow lines too; `copier`: one that copies parts."""

    def __init__(
        self, client: Any, dogged: Any, copier: Any, bucket: str, capabilities: Capabilities
    ) -> None:
        self._client = client
        self._dogged = dogged
        self._copier = copier
        self._bucket = bucket
        self._bulk_delete = capabilities.bulk_delete
        self._verified = capabilities.checks_sha256
        self._sums = capabilities.checks_sha256 or capabilities.needs_sums

    def put(self, key: str, body: bytes | Iterable[bytes], size: int, storage_class: str) -> Put:
        extra = {"StorageClass": storage_class} if storage_class else {}
        if size > ONE_REQUEST:
            bodies = regrouped(exactly(key, body, size), part_size(size))
            return self._put_parts(key, (Part(each) for each in bodies), extra)
        return self._put_one(key, whole(key, body, size), extra)

    def put_parts(self, key: str, parts: Iterable[Part], size: int, storage_class: str) -> Put:
        extra = {"StorageClass": storage_class} if storage_class else {}
        return self._put_parts(key, all_of(key, parts, size), extra)

    def put_if(self, key: str, body: bytes, etag: str | None) -> Put:
        return self._put_one(key, body, {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag})

    def _put_one(self, key: str, body: bytes, extra: dict[str, str]) -> Put:
        if self._sums:
            extra = {**extra, "ChecksumAlgorithm": "SHA256"}
        answer = self._client.put_object(
            Bucket=self._bucket, Key=key, Body=body, **extra, **self._checksum(body)
        )
        return Put(_field(answer, "ETag"), self._verified)

    def _checksum(self, body: bytes) -> dict[str, str]:
        return {"ChecksumSHA256": sha256_base64(body)} if self._sums else {}

    def _put_parts(self, key: str, parts: Iterator[Part], extra: dict[str, str]) -> Put:
        if self._sums:
            extra = {**extra, "ChecksumAlgorithm": "SHA256"}
        # Nothing is lost where it fails: whether the server is there is found out soon.
        upload = self._client.create_multipart_upload(Bucket=self._bucket, Key=key, **extra)
        target = {"Bucket": self._bucket, "Key": key, "UploadId": upload["UploadId"]}
        copier = _PartCopier(self._copier, self._bucket)
        try:
            sent = self._send_parts(target, parts, copier)
            with copier.blamed():
                answer = self._dogged.complete_multipart_upload(**target, MultipartUpload={"Parts": sent})
        except BaseException:
            # Once only: the network may be what is wrong, and a collection removes what is left.
            with contextlib.suppress(Exception):
                self._client.abort_multipart_upload(**target)
            raise
        return Put(_field(answer, "ETag"), self._verified, sum(copier.taken))

    def _send_parts(
        self, target: dict[str, str], parts: Iterator[Part], copier: _PartCopier
    ) -> list[dict[str, Any]]:
        """Upload the parts, some at once; at most that many are in memory."""
        sent: list[dict[str, Any]] = []
        flying: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            for number, part in enumerate(parts, 1):
                flying.append(pool.submit(self._send_part, target, number, part, copier))
                if len(flying) >= _PARTS_AT_ONCE:
                    sent.append(flying.popleft().result())
            sent.extend(future.result() for future in flying)
        return sent

    def _send_part(
        self, target: dict[str, str], number: int, part: Part, copier: _PartCopier
    ) -> dict[str, Any]:
        checksum = self._checksum(part.body)
        etag = copier.copied(target, number, part, checksum) if part.key else ""
        if not etag:
            upload = partial(self._dogged.upload_part, **target, PartNumber=number, Body=part.body)
            etag = _field(upload(**checksum), "ETag")
        return {"PartNumber": number, "ETag": etag, **checksum}

    def get(self, key: str, start: int, length: int | None) -> Body:
        return b"".join(self.stream(key, start, length))

    def pieces(self, key: str, start: int, length: int) -> Iterator[Body]:
        yield self.get(key, start, length)

    def stream(self, key: str, start: int, length: int | None) -> Iterator[bytes]:
        extra = {}
        if start or length is not None:
            extra["Range"] = f"bytes={start}-" + ("" if length is None else str(start + length - 1))
        answer = self._client.get_object(Bucket=self._bucket, Key=key, **extra)
        _field(answer, "ContentLength")  # without it nobody would notice that the body was cut
        with contextlib.closing(answer["Body"]) as body:
            pieces = body.iter_chunks(PIECE)
            if extra and not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
                pieces = _cut(pieces, start, length)
            total = 0
            for piece in pieces:
                total += len(piece)
                yield piece
        if length is not None and total != length:
            raise too_short(key, start, length, total)

    def head(self, key: str) -> ObjectInfo:
        answer = self._client.head_object(Bucket=self._bucket, Key=key)
        modified = _field(answer, "LastModified")
        return ObjectInfo(key, _field(answer, "ContentLength"), _field(answer, "ETag"), modified.timestamp())

    def delete(self, keys: Sequence[str]) -> None:
        if self._bulk_delete:
            self._delete_many(keys)
            return
        for key in keys:
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def _delete_many(self, keys: Sequence[str]) -> None:
        for first in range(0, len(keys), _DELETES_A_REQUEST):
            batch = [{"Key": key} for key in keys[first : first + _DELETES_A_REQUEST]]
            answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True})
            for error in answer.get("Errors", ()):
                if error.get("Code") != "NoSuchKey":
                    raise UndeletedError(error.get("Code", "Unknown"))


class _PartCopier:
    """Takes parts of one upload from other objects, as long as the server does so; `taken`: their sizes."""

    def __init__(self, client: Any, bucket: str) -> None:
        self.taken: list[int] = []
        self._client = client
        self._bucket = bucket
        self._refused = False

    def copied(self, target: dict[str, str], number: int, part: Part, checksum: dict[str, str]) -> str:
        """The etag of the part as the server has taken it from another object; "": its bytes are to be sent.
        Where sums are checked at all the server has named that of these bytes. Raises ObjectCorruptError where
        what the server has made is no part of anything."""
        if self._refused:
            return ""
        source = {"Bucket": self._bucket, "Key": part.key}
        wanted = f"bytes={part.start}-{part.start + len(part.body) - 1}"
        try:
            answer = self._client.upload_part_copy(
                **target, PartNumber=number, CopySource=source, CopySourceRange=wanted
            )
        except self._client.exceptions.ClientError as exc:
            # 501, no right to read, an object that is not there or in an archive: what was to be sent anyhow.
            return self._refuse(_code(exc))
        except Exception as exc:
            if type(exc).__name__ not in _UNANSWERED:
                raise
            return self._refuse(type(exc).__name__)
        found = answer.get("CopyPartResult") or {}
        if "ETag" not in found:
            # rclone takes the request for an empty part, which it then lets nobody replace.
            raise ObjectCorruptError("the server copies no parts of objects, and does not say so")
        if checksum and found.get("ChecksumSHA256") != checksum["ChecksumSHA256"]:
            return self._refuse("the server names no sum, or another, of what it copied")
        self.taken.append(len(part.body))
        etag: str = found["ETag"]
        return etag

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """At the end of an upload: whether the server takes what it has copied for parts. Raises
        ObjectCorruptError."""
        try:
            yield
        except self._client.exceptions.ClientError as exc:
            if not self.taken or _code(exc) not in _NO_PARTS:
                raise
            why = f"the server does not know the parts that it has copied ({_code(exc)})"
            raise ObjectCorruptError(why) from exc

    def _refuse(self, why: str) -> str:
        if not self._refused:
            log.info("parts that the store has already are sent all the same: %s", why)
        self._refused = True
        return ""


def all_of(key: str, parts: Iterable[Part], size: int) -> Iterator[Part]:
    """The parts; raises ObjectCorruptError before the end if they are not `size` bytes in all."""
    total = 0
    for part in parts:
        total += len(part.body)
        if total <= size:
            yield part
    if total != size:
        raise wrong_size(key, size)


def _code(exc: Any) -> str:
    """What S3 calls the error."""
    code: str = exc.response.get("Error", {}).get("Code", "an error")
    return code


def _field(answer: dict[str, Any], name: str) -> Any:
    """A field that every S3 server sends; boto3 takes an answer with cut headers for a complete one."""
    if name not in answer:
        raise StoreUnavailableError(f"the server's answer makes no sense (no {name})")
    return answer[name]


def sha256_base64(body: bytes) -> str:
    """The digest as S3 headers want it."""
    return base64.b64encode(hashlib.sha256(body).digest()).decode()


def regrouped(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of exactly `size`, but for the last."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def _cut(pieces: Iterable[bytes], start: int, length: int | None) -> Iterator[bytes]:
    """Bytes [start, start + length) of a whole object, for a server that ignores ranges."""
    position, end = 0, None if length is None else start + length
    for piece in pieces:
        low = max(0, start - position)
        part = piece[low : None if end is None else max(0, end - position)]
        position += len(piece)
        if part:
            yield part
