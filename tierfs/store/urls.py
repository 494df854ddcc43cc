"""From a store's URL to a store, ready to use.

    file:///mnt/nas/tierfs
    s3://bucket/prefix
    s3://bucket/prefix?endpoint=http://host:port&region=eu-central-1&storage_class=STANDARD_IA

Nothing here opens the store or imports an S3 client before it must.
"""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import parse_qsl, unquote, urlsplit

from tierfs.errors import UsageError
from tierfs.store.base import Capabilities, ObjectStore
from tierfs.store.decorators import Decorator
from tierfs.store.directory import DirectoryStore
from tierfs.store.keys import check_key
from tierfs.store.retry import BACKGROUND, FOREGROUND, RetryingStore, RetryPolicy
from tierfs.store.throttle import ThrottledStore

_BUCKET = re.compile(r"[a-z0-9A-Z][a-z0-9A-Z._-]{1,254}")
_S3_OPTIONS = {"endpoint": "endpoint", "region": "region", "storage_class": "storage_class"}


def open_store(
    url: str,
    *,
    capabilities: Capabilities | None = None,
    create: bool = False,
    foreground: RetryPolicy = FOREGROUND,
    background: RetryPolicy = BACKGROUND,
    concurrency: int = 32,
) -> ObjectStore:
    """The store at `url`, with retry and throttle around it. Contacts nothing: the first call does.

    `capabilities` are those probed when the volume was created; None for a store not probed yet. `create`: make
    the directory of a `file:` store (never its parents) when it is first used; for new volumes only.
    Raises UsageError for a URL that makes no sense.
    """
    inner = _bare(url, capabilities, create)
    return RetryingStore(ThrottledStore(inner, concurrency), foreground, background)


def adapt(store: ObjectStore, url: str, foreground: RetryPolicy, concurrency: int, storage_class: str) -> None:
    """Have an open store go on with these. A storage class that its URL names stays."""
    while isinstance(store, Decorator):
        if isinstance(store, RetryingStore):
            store.use(foreground)
        elif isinstance(store, ThrottledStore):
            store.gate.resize(concurrency)
        store = store.inner
    if url.startswith("s3:") and not names_storage_class(url):
        from tierfs.store.s3 import S3Store

        if isinstance(store, S3Store):
            store.use_storage_class(storage_class)


def names_storage_class(url: str) -> bool:
    """Whether an S3 store's URL says which storage class new objects get."""
    return any(name == "storage_class" for name, _ in parse_qsl(urlsplit(url).query))


def check_url(url: str) -> None:
    """Raises UsageError, one line that names the remedy, unless `open_store` takes this URL."""
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in url):
        raise UsageError(f"not a store: {_shown(url)!r}: write %XX for what is no text")
    scheme = url.split(":", 1)[0]
    if scheme == "file":
        _directory(url)
    elif scheme == "s3":
        _s3(url)
    else:
        raise UsageError(f"not a store: {_shown(url)!r}: write s3://bucket/prefix or file:///path")


def _bare(url: str, capabilities: Capabilities | None, create: bool) -> ObjectStore:
    check_url(url)
    if url.startswith("file:"):
        return DirectoryStore(_directory(url), create)
    from tierfs.store.s3 import S3Settings, S3Store

    return S3Store(S3Settings(**_s3(url)), capabilities or Capabilities())


def _directory(url: str) -> str:
    parts = urlsplit(url)
    path = unquote(parts.path, errors="surrogateescape")
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or parts.query or parts.fragment:
        raise UsageError(f"not a directory: {url!r}: write file:///absolute/path (three slashes)")
    if "\0" in path or path.strip("/") == "":
        raise UsageError(f"not a directory for a store: {url!r}: name a directory of its own")
    return path


def _s3(url: str) -> dict[str, str]:
    """The fields of S3Settings."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise UsageError(f"no credentials in a URL: {_shown(url)!r}: use AWS_PROFILE or 'aws configure'")
    if not _BUCKET.fullmatch(parts.netloc):
        raise UsageError(f"not a bucket: {parts.netloc!r} in {_shown(url)!r}: write s3://bucket/prefix")
    if parts.fragment:
        raise UsageError(f"'#' in {_shown(url)!r}: write it as %23")
    prefix = unquote(parts.path).strip("/")
    try:
        check_key(f"{prefix}/x" if prefix else "x")
    except UsageError as exc:
        raise UsageError(f"not a prefix: {prefix!r} in {_shown(url)!r}: write s3://bucket/plain/path") from exc
    options = _options(url, parts.query)
    _check_endpoint(url, options.get("endpoint", ""))
    return {"bucket": parts.netloc, "prefix": prefix, **options}


def _options(url: str, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _S3_OPTIONS:
            raise UsageError(f"unknown option {name!r} in {_shown(url)!r}: there are {', '.join(_S3_OPTIONS)}")
        if name in options or not value:
            raise UsageError(f"option {name!r} in {_shown(url)!r} is empty or given twice: give it once")
        options[name] = value
    return options


def _check_endpoint(url: str, endpoint: str) -> None:
    if not endpoint:
        return
    parts = urlsplit(endpoint)
    try:
        sound = parts.scheme in ("http", "https") and parts.hostname and not parts.query and parts.port != 0
    except ValueError:
        sound = False
    if not sound or parts.username or parts.path.strip("/"):
        raise UsageError(f"not an endpoint in {_shown(url)!r}: write endpoint=https://host or http://host:port")


def _shown(url: str) -> str:
    """The URL without what may be a password."""
    return re.sub(r"//[^/@]*@", "//...@", url)
