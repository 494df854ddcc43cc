"""How the index is mapped: as large as it may ever become, without a claim on memory; less where less is
allowed, and then a full map stops writing only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import resource
from functools import partial

from test_index import put, record

from tierfs import environment
from tierfs.errors import IndexDamagedError, IndexError_, IndexFullError
from tierfs.heat_index import HeatIndex
from tierfs.index import Index

LITTLE = 256 << 20  # bytes of address space


def mapping_of(file):
    """The lines of smaps about the mapping of a file in this process."""
    lines: list[str] = []
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            words = line.split()
            if len(words) > 5 and "-" in words[0]:
                lines = [] if words[-1] != file else [line]
            elif lines:
                lines.append(line)
                if line.startswith("VmFlags:"):
                    return lines
    raise AssertionError(f"{file} is not mapped")


def test_the_map_is_as_large_as_the_file_can_become(tmp_path):
    index = Index.open(str(tmp_path))
    space = os.statvfs(tmp_path)
    assert index._env.info()["map_size"] >= max(environment.LEAST_MAP, space.f_blocks * space.f_frsize)
    index.close()


def test_the_map_is_no_claim_on_memory(tmp_path):
    """`ac`: the kernel accounts for it as memory that is promised. `sh` without `wr`: pages of the file."""
    index = Index.open(str(tmp_path))
    put(index, *[record(ino) for ino in range(1, 2000)])
    lines = mapping_of(str(tmp_path / "data.mdb"))
    index.close()
    flags = lines[-1].split()[1:]
    assert "rd" in flags and not {"ac", "wr"} & set(flags)
    rss = next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    assert rss < 4096, "kB: what has been touched"


def _leaves(w, number):
    """A value of a mebibyte."""
    w.put(record(number, fid=number.to_bytes(16, "big")))
    w.put_leaves(number.to_bytes(16, "big"), 1, bytes(1 << 20), [])


def _in_little_space(path, pipe):
    """Write until no more fits, and read all of it."""
    resource.setrlimit(resource.RLIMIT_AS, (LITTLE, LITTLE))
    index = Index.open(path)
    told = []
    index.make_room = lambda: told.append(1) or False
    size, written = index._env.info()["map_size"], 0
    while True:
        futures = [index.commit(partial(_leaves, number=written + n)) for n in range(1, 9)]
        errors = [future.exception() for future in futures]
        if any(errors):
            break
        written += len(futures)
    failed = next(error for error in errors if error)
    known = range(1, written + 1)
    whole = all(len(index.get_leaves(n.to_bytes(16, "big"), 1).digests) == 1 << 20 for n in known)
    whole = whole and all(index.get(n) is not None for n in known)
    pipe.send((size, written, type(failed), failed.errno, str(failed), whole, len(told)))
    index.close()


def test_where_address_space_is_limited_the_map_is_smaller_and_a_full_one_is_said(tmp_path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_little_space, args=(str(tmp_path), theirs))
    process.start()
    theirs.close()
    size, written, kind, number, why, whole, told = ours.recv()
    process.join(30)
    assert 32 << 20 <= size < LITTLE
    assert written > 16 and whole
    assert kind is IndexFullError and number == errno.ENOSPC and "ulimit -v" in why and told
    index = Index.open(str(tmp_path))
    put(index, record(written + 100))
    assert index.get(written + 100) and index.get(1), "with more address space it goes on"
    index.close()


def _open_in_no_space(path, pipe):
    resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
    try:
        Index.open(path)
    except IndexError_ as error:
        pipe.send((type(error), str(error)))


def test_no_address_space_is_no_damage(tmp_path):
    """What is damaged is put aside and made anew: that must not happen to a whole one."""
    Index.open(str(tmp_path)).close()
    with open(tmp_path / "data.mdb", "r+b") as file:
        file.truncate(1 << 30)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_open_in_no_space, args=(str(tmp_path), theirs))
    process.start()
    theirs.close()
    kind, said = ours.recv()
    process.join(30)
    assert kind is IndexError_ and "does not open" in said
    assert not issubclass(kind, IndexDamagedError)


def test_a_meta_page_that_cannot_be_written_ends_the_process_not_the_index(tmp_path):
    """LMDB then refuses everything in this process: another one goes on from the last whole commit."""
    index = Index.open(str(tmp_path))
    lost = []
    index.on_lost = lambda reason, damaged: lost.append((reason, damaged))
    put(index, record(1))
    readonly = os.open(tmp_path / "data.mdb", os.O_RDONLY)
    for name in os.listdir("/proc/self/fd"):
        flags = 0
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == str(tmp_path / "data.mdb"):
                flags = fcntl.fcntl(int(name), fcntl.F_GETFL)
        if flags & os.O_DSYNC:
            os.dup2(readonly, int(name))
    os.close(readonly)
    for ino in (2, 3):
        assert isinstance(index.commit(lambda w, n=ino: w.put(record(n))).exception(), IndexError_)
    assert lost and not any(damaged for _, damaged in lost)
    index.close()
    again = Index.open(str(tmp_path))
    assert again.get(1) == record(1) and again.get(2) is None
    put(again, record(2))
    again.close()


def test_what_is_acknowledged_is_synced_and_heat_is_not(tmp_path):
    """A power cut takes nothing that a commit has answered for: neither data nor the page that leads to it."""
    index = Index.open(str(tmp_path / "index"))
    heat = HeatIndex(str(tmp_path / "heat"), capacity=1 << 20)
    durable, quick = index._env.flags(), heat._env.flags()
    heat.close()
    index.close()
    assert durable["sync"] and durable["metasync"]
    assert not quick["sync"]


def test_the_lock_file_is_no_sparse_one(tmp_path):
    """LMDB writes it through a mapping: on a full disk the first touch of a hole would kill the process."""
    file = tmp_path / "lock.mdb"
    for made in range(2):
        Index.open(str(tmp_path)).close()
        status = file.stat()
        assert status.st_blocks * 512 >= status.st_size > 4096, made
        size = status.st_size
        os.truncate(file, 0)  # as another program copies it that keeps holes
        os.truncate(file, size)
