"""What every store promises (tierfs/store/base.py), tried on every store there is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from kinds import KINDS

from tierfs.errors import ObjectCorruptError, ObjectMissingError, PreconditionError, UsageError
from tierfs.store.base import PART, ObjectStore, Part
from tierfs.store.s3_obstore import ONE_REQUEST

SMALL = os.urandom(32 * 1024)
LARGE = os.urandom(1024 * 1024) * 17 + b"tail"
assert len(LARGE) > ONE_REQUEST


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, stores) -> ObjectStore:
    return stores(request.param)


def keys(store: ObjectStore, prefix: str) -> list[str]:
    return sorted(info.key for info in store.list(prefix))


def uneven(data: bytes) -> Iterator[bytes]:
    """Pieces of many sizes, one of them empty."""
    position, size = 0, 1
    while position < len(data):
        yield data[position : position + size]
        position += size
        size = min(size * 3, 3_000_001)
        if size == 9:
            yield b""


@pytest.mark.parametrize("size", [0, 1, 4096, len(SMALL)])
def test_what_was_put_is_read(store: ObjectStore, base: str, size: int) -> None:
    answer = store.put(f"{base}a", SMALL[:size], size)
    assert store.get(f"{base}a") == SMALL[:size]
    assert b"".join(store.stream(f"{base}a")) == SMALL[:size]
    info = store.head(f"{base}a")
    assert (info.key, info.size, info.etag) == (f"{base}a", size, answer.etag)
    assert answer.etag and abs(info.modified - time.time()) < 3600


def test_verified_is_what_the_probe_saw(store: ObjectStore, base: str) -> None:
    assert store.put(f"{base}a", SMALL, len(SMALL)).verified == store.capabilities.checks_sha256


def test_body_in_pieces(store: ObjectStore, base: str) -> None:
    store.put(f"{base}iterator", uneven(SMALL), len(SMALL))
    store.put(f"{base}list", [SMALL[:5], SMALL[5:]], len(SMALL))
    assert store.get(f"{base}iterator") == store.get(f"{base}list") == SMALL


def test_large_object(store: ObjectStore, base: str) -> None:
    answer = store.put(f"{base}a", uneven(LARGE), len(LARGE))
    assert answer.verified == store.capabilities.checks_sha256
    assert b"".join(store.stream(f"{base}a")) == LARGE
    assert store.get(f"{base}a", len(LARGE) - 4) == b"tail"
    assert store.head(f"{base}a").etag == answer.etag
    store.put(f"{base}b", LARGE, len(LARGE))
    middle = 9 * 1024 * 1024 - 7
    assert b"".join(store.stream(f"{base}b", middle, 5_000_000)) == LARGE[middle : middle + 5_000_000]


def test_parts_that_another_object_has(store: ObjectStore, base: str) -> None:
    """Whatever of it is taken from there: the object has the bytes of its parts, or nobody says that it was
    verified, or there is none."""
    size = store.part_size(4 * PART + 5) or PART
    former = os.urandom(1 << 20) * 32 + b"tail"
    wanted = former[:size] + b"x" * size + former[2 * size : 3 * size] + b"y" * size + b"tail!"
    store.put(f"{base}former", former, len(former))
    places = [("former", 0), ("", 0), ("former", 2 * size), ("missing", 3 * size), ("", 0)]
    bodies = [wanted[at : at + size] for at in range(0, len(wanted), size)]
    parts = [Part(body, base + key if key else "", at) for body, (key, at) in zip(bodies, places, strict=True)]
    try:
        answer = store.put_parts(f"{base}a", iter(parts), len(wanted))
    except ObjectCorruptError:
        assert store.capabilities.client == "boto3" and keys(store, f"{base}a") == []
        return
    assert answer.verified == store.capabilities.checks_sha256 and answer.copied in (0, size, 2 * size)
    assert store.head(f"{base}a").etag == answer.etag
    assert b"".join(store.stream(f"{base}a")) == wanted
    wrong = [replace(part, key=f"{base}former", start=0) for part in parts]
    answer = store.put_parts(f"{base}b", iter(wrong), len(wanted))
    assert not answer.verified or b"".join(store.stream(f"{base}b")) == wanted
    with pytest.raises(ObjectCorruptError):
        store.put_parts(f"{base}c", iter(parts[:4]), len(wanted))
    assert keys(store, f"{base}c") == []


def test_a_body_of_another_size_is_refused_and_leaves_nothing(store: ObjectStore, base: str) -> None:
    for size in (len(SMALL) - 1, len(SMALL) + 1):
        for body in (SMALL, uneven(SMALL)):
            with pytest.raises(ObjectCorruptError):
                store.put(f"{base}a", body, size)
    for size in (len(LARGE) - 1, len(LARGE) + 1):
        with pytest.raises(ObjectCorruptError):
            store.put(f"{base}a", uneven(LARGE), size)
    with pytest.raises(ObjectMissingError):
        store.head(f"{base}a")
    assert keys(store, base) == []


@pytest.mark.parametrize("size", [len(SMALL), len(LARGE)])
def test_a_body_that_fails_leaves_nothing(store: ObjectStore, base: str, size: int) -> None:
    class Broken(Exception):
        pass

    def body() -> Iterator[bytes]:
        yield LARGE[: size // 2]
        assert keys(store, base) == []  # nor is it visible on the way
        raise Broken

    with pytest.raises(Broken):
        store.put(f"{base}a", body(), size)
    assert keys(store, base) == []


def test_an_error_of_the_local_disk_is_not_the_stores(store: ObjectStore, base: str) -> None:
    def body() -> Iterator[bytes]:
        yield SMALL[:10]
        raise OSError(5, "local disk")

    with pytest.raises(OSError, match="local disk"):
        store.put(f"{base}a", body(), len(SMALL))


@pytest.mark.parametrize(
    ("start", "length"),
    [
        (0, 1),
        (0, 100),
        (100, 200),
        (32 * 1024 - 1, 1),
        (5, None),
        (0, 0),
        (77, 0),
        (32 * 1024, 0),
        (32 * 1024, None),
    ],
)
def test_ranges(store: ObjectStore, base: str, start: int, length: int | None) -> None:
    store.put(f"{base}a", SMALL, len(SMALL))
    expected = SMALL[start:] if length is None else SMALL[start : start + length]
    assert store.get(f"{base}a", start, length) == expected
    assert b"".join(store.stream(f"{base}a", start, length)) == expected


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 32 * 1024 + 1), (32 * 1024 - 1, 2), (32 * 1024, 1), (32 * 1024 + 1, 0), (99_999, None)],
)
def test_a_range_beyond_the_end_is_never_short_data(
    store: ObjectStore, base: str, start: int, length: int | None
) -> None:
    store.put(f"{base}a", SMALL, len(SMALL))
    with pytest.raises(ObjectCorruptError):
        store.get(f"{base}a", start, length)
    with pytest.raises(ObjectCorruptError):
        list(store.stream(f"{base}a", start, length))


def test_missing_objects(store: ObjectStore, base: str) -> None:
    store.put(f"{base}a/b", b"x", 1)
    for key in (f"{base}nothing", f"{base}a", f"{base}a/b/c", f"{base}no/such/place"):
        for read in (store.get, store.head, lambda key: list(store.stream(key))):
            with pytest.raises(ObjectMissingError):
                read(key)
        for length in (0, 10):
            with pytest.raises(ObjectMissingError):
                store.get(key, 0, length)


def test_put_replaces(store: ObjectStore, base: str) -> None:
    first = store.put(f"{base}a", b"first", 5)
    second = store.put(f"{base}a", b"second!", 7)
    assert store.get(f"{base}a") == b"second!"
    assert first.etag != second.etag


def test_put_if(store: ObjectStore, base: str) -> None:
    key = f"{base}volume.json"
    with pytest.raises(PreconditionError):
        store.put_if(key, b"zero", '"0123456789abcdef0123456789abcdef"')
    first = store.put_if(key, b"one", None)
    with pytest.raises(PreconditionError):
        store.put_if(key, b"other", None)
    second = store.put_if(key, b"two", first.etag)
    with pytest.raises(PreconditionError):
        store.put_if(key, b"three", first.etag)
    assert store.get(key) == b"two"
    assert store.head(key).etag == second.etag


def test_of_many_writers_on_a_condition_one_wins(store: ObjectStore, base: str) -> None:
    if not store.capabilities.conditional_put:
        pytest.skip("this store has no conditional writes")

    def write(number: int) -> bool:
        try:
            store.put_if(f"{base}a", b"%d" % number, None)
        except PreconditionError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(write, range(6)))
    assert won.count(True) == 1
    assert store.get(f"{base}a") == b"%d" % won.index(True)


def test_delete(store: ObjectStore, base: str) -> None:
    for name in ("a", "b/c", "b/d"):
        store.put(base + name, b"x", 1)
    store.delete([f"{base}a", f"{base}b/c", f"{base}never-was", f"{base}no/such/place"])
    store.delete([])
    assert keys(store, base) == [f"{base}b/d"]
    store.delete([f"{base}b/d"])
    assert keys(store, base) == []
    store.put(f"{base}b/d", b"y", 1)
    assert store.get(f"{base}b/d") == b"y"


def test_list_by_text_prefix(store: ObjectStore, base: str) -> None:
    names = ["data/ab/1", "data/ab/12", "data/ac/1/2", "meta/x", "data.txt"]
    for name in names:
        store.put(base + name, name.encode(), len(name))

    def found(prefix: str) -> list[str]:
        return [key.removeprefix(base) for key in keys(store, base + prefix)]

    assert found("") == sorted(names)
    assert found("data/") == ["data/ab/1", "data/ab/12", "data/ac/1/2"]
    assert found("data/ab/1") == ["data/ab/1", "data/ab/12"]
    assert found("data/a") == ["data/ab/1", "data/ab/12", "data/ac/1/2"]
    assert found("dat") == ["data.txt", "data/ab/1", "data/ab/12", "data/ac/1/2"]
    assert found("nothing") == found("no/such/place") == []
    for info in store.list(base):
        head = store.head(info.key)
        assert (info.size, info.etag) == (head.size, head.etag)


@pytest.mark.parametrize(
    "name",
    ["a b", "a+b", "50%", "%41", "ü/ß", "x=y&z", "a#b?c", "it's", "~tilde", "-v", "..x", ".hidden", "a\\b"],
)
def test_odd_keys(request: pytest.FixtureRequest, store: ObjectStore, base: str, name: str) -> None:
    if "\\" in name and "seaweedfs" in request.node.callspec.id:
        pytest.skip("SeaweedFS takes a backslash for a slash; no key of a volume has one")
    store.put(base + name, name.encode(), len(name.encode()))
    assert store.get(base + name) == name.encode()
    assert keys(store, base) == [base + name]
    store.delete([base + name])
    assert keys(store, base) == []


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/", ".", "a\0b", "a\nb", "x" * 300, "x/" * 600 + "x"],
)
def test_bad_keys_are_refused_everywhere(store: ObjectStore, key: str) -> None:
    for call in (
        lambda: store.put(key, b"x", 1),
        lambda: store.put_if(key, b"x", None),
        lambda: store.get(key),
        lambda: list(store.stream(key)),
        lambda: store.head(key),
        lambda: store.delete([key]),
        lambda: list(store.list(key + "/")),
    ):
        with pytest.raises(UsageError):
            call()


def test_bad_ranges_are_refused(store: ObjectStore, base: str) -> None:
    store.put(f"{base}a", b"x", 1)
    for start, length in ((-1, None), (0, -1)):
        with pytest.raises(UsageError):
            store.get(f"{base}a", start, length)


def test_many_threads(store: ObjectStore, base: str) -> None:
    def work(number: int) -> bool:
        body = SMALL[number:]
        store.put(f"{base}{number % 3}/{number}", body, len(body))
        return store.get(f"{base}{number % 3}/{number}") == body

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40)))
    assert len(keys(store, base)) == 40


def test_an_abandoned_stream_holds_nothing(store: ObjectStore, base: str) -> None:
    store.put(f"{base}a", LARGE, len(LARGE))
    for _ in range(6):  # more than the wrapped store has places
        stream = store.stream(f"{base}a")
        next(stream)
        stream.close()
    assert store.get(f"{base}a", 0, 5) == LARGE[:5]


def test_the_description_has_no_secret(store: ObjectStore) -> None:
    assert "secret" not in store.describe()
    assert store.describe().split(":")[0] in ("memory", "file", "s3")
