"""From what S3 clients raise to our errors. Imports no client: it goes by class names, statuses and S3 codes.

Sources: the S3 API's list of error codes; obstore 0.12 (its errors are text with a status, the server's XML and
a kind of transport error); botocore's exceptions. Messages name bucket, key and code, and never a server's own
text, which may hold signatures.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from urllib.request import getproxies

from tierfs.errors import (
    BucketMissingError,
    ObjectArchivedError,
    ObjectCorruptError,
    ObjectMissingError,
    PreconditionError,
    StoreDeniedError,
    StoreError,
    StoreFullError,
    StoreThrottledError,
    StoreUnavailableError,
)

NO_CREDENTIALS = (
    "no AWS credentials found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "or run 'aws configure'"
)
_STATUS = re.compile(r"status code: (\d{3})|status: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_UNDELETED = re.compile(r"DeleteObjects request failed for key .*\(code: (\w+)\)")
_REGION = re.compile(r"<Region>([\w-]+)</Region>")

_THROTTLES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"}
    | {"RequestThrottled", "BandwidthLimitExceeded", "TooManyRequestsException"}
)
_FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "InsufficientCapacity"})
_DAMAGED = frozenset(
    {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
    | {"InvalidRange", "IncompleteBody"}
)
_REDIRECTS = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
_UNKNOWN = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId", "Unauthorized"}
)
_EXPIRED = frozenset({"ExpiredToken", "TokenRefreshRequired", "RequestExpired"})
_RETRYABLE = frozenset({"RequestTimeout", "InternalError", "ServiceUnavailable"})
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError"})
_CREDENTIAL_TROUBLE = frozenset(
    {"CredentialRetrievalError", "TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"}
    | {"ProfileNotFound", "SSOError", "UnauthenticatedError", "LoginRefreshRequired", "ConfigParseError"}
)
_MODULES = ("obstore", "botocore", "boto3", "urllib3")


class UndeletedError(Exception):
    """Of several objects one was not deleted: S3 says so with status 200, and boto3 takes that for success."""

    def __init__(self, code: str) -> None:
        super().__init__(f"DeleteObjects request failed for key (code: {code})")


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is known of a failure: status 0 and code "" where the server did not answer."""

    status: int
    code: str
    name: str
    text: str


class Translated:
    """A context in which a client's errors become ours: `with Translated("s3://bucket", key): ...`

    `origin` says where the credentials come from, "" where that is not known.
    """

    __slots__ = ("_key", "_origin", "_place")

    def __init__(self, place: str, key: str = "", origin: Callable[[], str] = str) -> None:
        self._place = place
        self._key = key
        self._origin = origin

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(exc, Exception) and _from_client(exc):
            raise translate(exc, self._place, self._key, self._origin) from exc


def _from_client(exc: Exception) -> bool:
    """Whether this is trouble of a client, its server or the network; bugs and our own errors are not.

    A body may be read from the local disk while it goes up: an OSError with an errno is the disk's.
    """
    if isinstance(exc, (ConnectionError, TimeoutError, UndeletedError)):
        return True
    if type(exc).__module__.split(".")[0] in _MODULES:
        return True
    return isinstance(exc, FileNotFoundError) and exc.errno is None


def translate(exc: Exception, place: str, key: str = "", origin: Callable[[], str] = str) -> StoreError:
    """Our error for a client's; `place` is the store's URL, `key` the object's where there is one."""
    facts = _facts(exc)
    subject = f"{place}: {key}" if key else place
    return (
        _of_credentials(facts, place)
        or _of_code(facts, place, subject)
        or _of_refusal(facts, place, origin)
        or _of_status(facts, subject)
        or _of_transport(facts, place, subject)
    )


def _facts(exc: Exception) -> _Facts:
    name = type(exc).__name__
    response = getattr(exc, "response", None)
    if isinstance(response, dict):  # botocore's ClientError
        error = response.get("Error", {})
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(error.get("Code", ""))
        if code == str(status):  # what botocore says of an answer without a body
            code = ""
        return _Facts(int(status), code, name, f"<Region>{error.get('Region', '')}</Region>")
    text = str(exc)
    undeleted = _UNDELETED.search(text)
    if undeleted:
        return _Facts(403 if undeleted[1] == "AccessDenied" else 400, undeleted[1], name, "")
    status_found, code_found = _STATUS.search(text), _CODE.search(text)
    status = (status_found[1] or status_found[2]) if status_found else 0
    return _Facts(int(status), code_found[1] if code_found else "", name, text)


def _of_credentials(facts: _Facts, place: str) -> StoreError | None:
    if facts.name in _NO_CREDENTIALS:
        return StoreDeniedError(f"{place}: {NO_CREDENTIALS}")
    if facts.name in _CREDENTIAL_TROUBLE and not facts.status:
        reason = "" if facts.name == "UnauthenticatedError" else f" ({facts.name})"
        return StoreDeniedError(
            f"{place}: the AWS credentials cannot be read or renewed{reason}: "
            "run 'aws sso login' or 'aws configure'"
        )
    return None


def _of_code(facts: _Facts, place: str, subject: str) -> StoreError | None:
    code = facts.code
    if code == "NoSuchBucket":
        return BucketMissingError(f"{place}: no such bucket: create it, or correct the URL")
    if code in _THROTTLES:
        return StoreThrottledError(f"{subject}: the server asks for fewer requests ({code})")
    if code in _FULL:
        return StoreFullError(f"{subject}: the store is full ({code})")
    if code in _DAMAGED:
        return ObjectCorruptError(f"{subject}: the bytes asked for or sent do not match the object ({code})")
    if code in _REDIRECTS:
        region = _REGION.search(facts.text)
        remedy = f"add region={region[1]} to the URL" if region else "add region=... to the URL"
        return StoreDeniedError(f"{place}: the bucket is in another region: {remedy}")
    if code in _EXPIRED:
        return StoreDeniedError(f"{place}: the AWS credentials have expired: renew them (aws sso login)")
    if code == "RequestTimeTooSkewed":
        return StoreDeniedError(f"{place}: this machine's clock is off by more than the server allows: set it")
    if code == "InvalidObjectState":
        return ObjectArchivedError(
            f"{subject}: the provider has archived it: have it restored (`aws s3api restore-object`)"
            " and read again"
        )
    if code in _RETRYABLE and facts.status != 503:
        return StoreUnavailableError(f"{subject}: the server cannot now ({code})")
    return None


def _of_refusal(facts: _Facts, place: str, origin: Callable[[], str]) -> StoreError | None:
    """Of whoever asks, and not of an object: its key would only mislead."""
    if facts.status not in (401, 403) and facts.name != "PermissionDeniedError":
        return None
    where, named = origin(), f"{facts.status} {facts.code}".rstrip()
    credentials = f"the credentials from {where}" if where else "these credentials"
    unknown = f"the server does not accept {credentials} ({named}): correct them, or set AWS_PROFILE to others"
    if facts.status == 401 or facts.code in _UNKNOWN:
        return StoreDeniedError(f"{place}: {unknown}")
    needed = (
        "they need s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject, and a bucket whose objects"
        " are not locked"
    )
    if facts.code:
        return StoreDeniedError(f"{place}: {credentials} may not do this in the bucket ({named}): {needed}")
    return StoreDeniedError(f"{place}: {unknown}; or they may not do this in the bucket: {needed}")


def _of_status(facts: _Facts, subject: str) -> StoreError | None:
    status, named = facts.status, f"{facts.status} {facts.code}".rstrip()
    if facts.name in ("AlreadyExistsError", "PreconditionError") or status in (409, 412):
        return PreconditionError(f"{subject} is not the expected version")
    if status == 404 or facts.name in ("FileNotFoundError", "NotFoundError"):
        return ObjectMissingError(f"{subject}: no such object")
    if status in (429, 503):
        return StoreThrottledError(f"{subject}: the server asks for fewer requests ({named})")
    if status == 416:
        return ObjectCorruptError(f"{subject} is shorter than recorded")
    if status == 507:
        return StoreFullError(f"{subject}: the store is full ({named})")
    if 300 <= status < 400 or "Received redirect" in facts.text:
        return StoreDeniedError(
            f"{subject}: the server redirects ({named}): correct the region or endpoint in the URL"
        )
    if 400 <= status < 500 and status != 408:
        return StoreDeniedError(f"{subject}: the server refuses the request ({named})")
    if status == 501:
        return StoreDeniedError(f"{subject}: the server does not implement this ({named})")
    if status:
        return StoreUnavailableError(f"{subject}: the server failed ({named})")
    return None


def _of_transport(facts: _Facts, place: str, subject: str) -> StoreError:
    text = facts.text
    if "NotPartial" in text:
        return StoreDeniedError(
            f"{subject}: the server answers a range with status 200: it needs boto3 (probe it)"
        )
    if facts.name == "SSLError" or "InvalidCertificate" in text:
        return StoreUnavailableError(
            f"{place}: the server's certificate is not trusted, or it speaks no TLS: add its authority to the"
            " system's, or name it by AWS_CA_BUNDLE"
        )
    if facts.name == "InvalidRegionError":
        return StoreDeniedError(f"{place}: that is the name of no region: correct region=... in the URL")
    if "Timeout" in facts.name or "TimedOut" in text or "kind: Timeout" in text:
        return StoreUnavailableError(f"{subject}: the server did not answer in time")
    if "Connect" in facts.name or "kind: Connect" in text:
        via = " and the proxy that the environment names" if getproxies() else ""
        return StoreUnavailableError(f"{place}: cannot connect to the server: check endpoint and network{via}")
    return StoreUnavailableError(f"{subject}: the connection broke or the answer makes no sense ({facts.name})")
