"""What can this server do? Asked once, when a volume is created, by doing it; then kept in its configuration.

Most servers accept a wrong SHA-256, some ignore conditions, one answers ranges in a way that obstore refuses:
documentation does not tell, only trying does.
"""

from __future__ import annotations

import itertools
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from tierfs.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    PreconditionError,
    StoreDeniedError,
    StoreError,
    StoreUnavailableError,
    TierError,
    UsageError,
)
from tierfs.model import ARCHIVES
from tierfs.store.base import Capabilities, ObjectStore
from tierfs.store.decorators import innermost

if TYPE_CHECKING:
    from tierfs.store.s3 import S3Store

_BODY = bytes(range(256)) * 16
_LISTED_AFTER = (0.0, 0.2, 0.5, 1.0, 2.0)  # seconds: some list a little later what they have taken
_PAGES = ("page-1", "page-2")
_RACES = ("race-1", "race-2")
_RACERS = 4


def probe(store: ObjectStore) -> Capabilities:
    """What the store's server was seen to do. Writes and removes a few small objects under `probe/`.

    Raises the store's errors: a server that does not answer, or lets nobody write, is not probed at all; and
    UsageError where new objects were to go into an archive.
    """
    inner = innermost(store)
    if not hasattr(inner, "with_capabilities"):
        return inner.capabilities
    return _probe_s3(inner)  # type: ignore[arg-type]


def look(store: ObjectStore, key: str) -> Capabilities:
    """What can be told of a store without writing to it, by reading an object that is there: the client to use.

    Raises the store's errors.
    """
    inner = innermost(store)
    if not hasattr(inner, "with_capabilities"):
        return inner.capabilities
    whole = store.get(key)
    for client in ("obstore", "boto3"):
        trial: S3Store = inner.with_capabilities(Capabilities(client=client))
        try:
            if trial.get(key, 1, len(whole) - 2) == whole[1:-1]:
                return Capabilities(partial_content=client == "obstore", client=client)
        except (StoreDeniedError, ObjectCorruptError):
            if client == "boto3":
                raise
        finally:
            trial.close()
    raise StoreUnavailableError(f"{store.describe()}: the server does not read what is asked for")


def _probe_s3(store: S3Store) -> Capabilities:
    storage_class = store.settings.storage_class
    if storage_class in ARCHIVES:
        raise UsageError(
            f"{storage_class} is an archive: what is in it cannot be read back: leave storage_class out of the"
            " URL, or write GLACIER_IR"
        )
    key = f"probe/{secrets.token_hex(8)}"
    seen = _what_reads_ranges(store, key)
    conditional = store.with_capabilities(replace(seen, conditional_put=True))
    try:
        _lists_in_pages(store, seen, key)
        seen = replace(
            seen,
            conditional_put=_keeps_conditions(conditional, key),
            checks_sha256=_checks_sha256(store, key),
        )
    finally:
        bulk_delete = _deletes_many(
            store, seen, [key, *(f"{key}-{name}" for name in ("condition", "sum", "part", *_PAGES, *_RACES))]
        )
    return replace(seen, bulk_delete=bulk_delete)


def _what_reads_ranges(store: S3Store, key: str) -> Capabilities:
    """The cheaper client that gets the right bytes; with a sum in each request only where no other is taken."""
    refusal: TierError | None = None
    for needs_sums, client in itertools.product((False, True), ("obstore", "boto3")):
        partial = client == "obstore"
        seen = Capabilities(partial_content=partial, client=client, needs_sums=needs_sums)
        trial = store.with_capabilities(seen)
        try:
            trial.put(key, _BODY, len(_BODY))
            if trial.get(key, 300, 100) == _BODY[300:400] and trial.get(key) == _BODY:
                return seen
        except (StoreDeniedError, ObjectCorruptError) as exc:
            refusal = refusal if needs_sums else exc
        finally:
            trial.close()
    raise refusal or StoreUnavailableError(
        f"{store.describe()}: the server does not give back what it got: use another"
    )


def _lists_in_pages(store: S3Store, seen: Capabilities, key: str) -> None:
    """Raises StoreDeniedError for a server that cannot list more than a page.

    The prefix is no object's key: asked for one key MinIO would name that object and look no further.
    """
    trial = store.with_capabilities(seen)
    try:
        for name in _PAGES:
            trial.put(f"{key}-{name}", _BODY, len(_BODY))
        for wait in _LISTED_AFTER:
            time.sleep(wait)
            listed = [info.key for info in trial.list_in_pages(f"{key}-page-", 1)]
            if sorted(listed) == [f"{key}-{name}" for name in _PAGES]:
                return
    finally:
        trial.close()
    raise StoreDeniedError(f"{store.describe()}: the server does not list what is in it: use another")


def _deletes_many(store: S3Store, seen: Capabilities, keys: list[str]) -> bool:
    """Whether one request removes all of these; they are gone afterwards."""
    for bulk_delete in (True, False):
        trial = store.with_capabilities(replace(seen, bulk_delete=bulk_delete))
        try:
            trial.delete(keys)
            if not _is_there(trial, keys[0]):
                return bulk_delete
        except StoreError:  # 501, an answer that names nothing, and whatever else servers make of it
            if not bulk_delete:
                raise
        finally:
            trial.close()
    raise StoreUnavailableError(f"{store.describe()}: the server does not remove what it is told: use another")


def _is_there(store: S3Store, key: str) -> bool:
    try:
        store.head(key)
    except ObjectMissingError:
        return False
    return True


def _keeps_conditions(store: S3Store, probed: str) -> bool:
    """Whether a write on a false condition is refused, and one on a true condition is not."""
    key = f"{probed}-condition"
    try:
        first = store.put_if(key, b"first", None)
        if not (_refused(store, key, None) and _refused(store, key, '"0123456789abcdef0123456789abcdef"')):
            return False
        store.put_if(key, b"second", first.etag)
        return store.get(key) == b"second" and all(_one_wins(store, probed, race) for race in _RACES)
    except (StoreDeniedError, PreconditionError):  # 501, or a condition that is never true
        return False


def _one_wins(store: S3Store, key: str, race: str) -> bool:
    """Whether of several that write at once, each on the condition that nothing is there, at most one does.

    s3proxy on a directory looks first and writes then: of six, five have been told that they were alone.
    """
    with ThreadPoolExecutor(_RACERS) as pool:
        refusals = pool.map(lambda _: _refused(store, f"{key}-{race}", None), range(_RACERS))
    return sum(refusals) >= _RACERS - 1


def _refused(store: S3Store, key: str, etag: str | None) -> bool:
    try:
        store.put_if(key, b"must not be written", etag)
    except PreconditionError:
        return True
    return False


def _checks_sha256(store: S3Store, key: str) -> bool:
    """Whether a wrong sum is refused for a whole object and for a part, and a right one accepted for both."""
    return (
        store.accepts_sum(f"{key}-sum", _BODY, _BODY)
        and not store.accepts_sum(f"{key}-sum", _BODY, b"other bytes")
        and store.accepts_part_sum(f"{key}-part", _BODY, _BODY)
        and not store.accepts_part_sum(f"{key}-part", _BODY, b"other bytes")
    )
