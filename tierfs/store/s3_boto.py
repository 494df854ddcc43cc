"""The S3 data path through boto3, for servers that obstore cannot read: ten times the CPU, fewer demands.

Receives its client from s3.py.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tierfs.errors import StoreUnavailableError
from tierfs.store.base import Body, Capabilities, ObjectInfo, Put
from tierfs.store.keys import exactly, too_short, whole
from tierfs.store.s3_errors import UndeletedError
from tierfs.store.s3_obstore import ONE_REQUEST, PIECE, part_size

_PARTS_AT_ONCE = 4
_DELETES_A_REQUEST = 1000  # the limit of S3


class BotoData:
    """`dogged`: a client that tries again."""

    def __init__(self, client: Any, dogged: Any, bucket: str, capabilities: Capabilities) -> None:
        self._client = client
        self._dogged = dogged
        self._bucket = bucket
        self._bulk_delete = capabilities.bulk_delete
        self._verified = capabilities.checks_sha256
        self._sums = capabilities.checks_sha256 or capabilities.needs_sums

    def put(self, key: str, body: bytes | Iterable[bytes], size: int, storage_class: str) -> Put:
        extra = {"StorageClass": storage_class} if storage_class else {}
        if size > ONE_REQUEST:
            return self._put_parts(key, exactly(key, body, size), part_size(size), extra)
        return self._put_one(key, whole(key, body, size), extra)

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

    def _put_parts(self, key: str, pieces: Iterator[bytes], size: int, extra: dict[str, str]) -> Put:
        if self._sums:
            extra = {**extra, "ChecksumAlgorithm": "SHA256"}
        upload = self._dogged.create_multipart_upload(Bucket=self._bucket, Key=key, **extra)
        target = {"Bucket": self._bucket, "Key": key, "UploadId": upload["UploadId"]}
        try:
            parts = self._send_parts(target, regrouped(pieces, size))
            answer = self._dogged.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})
        except BaseException:
            # Once only: the network may be what is wrong, and a collection removes what is left.
            with contextlib.suppress(Exception):
                self._client.abort_multipart_upload(**target)
            raise
        return Put(_field(answer, "ETag"), self._verified)

    def _send_parts(self, target: dict[str, str], bodies: Iterator[bytes]) -> list[dict[str, Any]]:
        """Upload the parts, some at once; at most that many are in memory."""
        parts: list[dict[str, Any]] = []
        flying: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            for number, body in enumerate(bodies, 1):
                flying.append(pool.submit(self._send_part, target, number, body))
                if len(flying) >= _PARTS_AT_ONCE:
                    parts.append(flying.popleft().result())
            parts.extend(future.result() for future in flying)
        return parts

    def _send_part(self, target: dict[str, str], number: int, body: bytes) -> dict[str, Any]:
        checksum = self._checksum(body)
        answer = self._dogged.upload_part(**target, PartNumber=number, Body=body, **checksum)
        return {"PartNumber": number, "ETag": _field(answer, "ETag"), **checksum}

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
