"""The compiled look into the index says what Index says, whatever is written meanwhile, or leaves it to it."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import damaging
import pytest

from tierfs.index import Index
from tierfs.model import Residency

INODES = 3000
CTIMES = (5, -7, 1_700_000_000_000_000_000)


def look(built, index):
    """The file of an open index, as the server maps it."""
    path, lock, size, page = index.file
    with open(path, "rb") as data, open(lock, "rb") as locks:
        return built.Records(data.fileno(), locks.fileno(), size, page)


def a_record(ino, rng):
    residency = rng.choice((Residency.RESIDENT, Residency.STUB))
    changes = {"left_ctime": rng.choice((0, *CTIMES)), "name": b"n" * rng.randrange(1, 60)}
    return replace(damaging.a_record(ino), residency=residency, **changes)


def make(path, seed):
    rng = random.Random(seed)
    index = Index.open(str(path))
    index.begin_session("boot")
    for _ in range(3):
        with index.write() as writer:
            for ino in rng.sample(range(1, INODES), INODES // 3):
                writer.put(a_record(ino, rng))
            for ino in rng.sample(range(1, INODES), INODES // 9):
                writer.delete(ino)
    return index


@pytest.mark.parametrize("seed", range(3))
def test_it_says_what_the_index_says(tmp_path, built, seed):
    index = make(tmp_path, seed)
    records, found = look(built, index), {True: 0, False: 0, None: 0}
    for ino in range(INODES):
        known = index.get(ino) is not None
        for ctime in CTIMES:
            said = records.plain(ino, ctime)
            assert said is ((index.is_plain(ino, ctime) or None) if known else False)
            found[said] += 1
    index.close()
    assert all(count > INODES // 9 for count in found.values())


def test_a_program_that_is_begun_does_not_have_the_file(tmp_path, built):
    index = Index.open(str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    records = look(built, index)
    (more,) = (fd for fd in set(os.listdir("/proc/self/fd")) - before if os.path.exists(f"/proc/self/fd/{fd}"))
    assert not os.get_inheritable(int(more)) and records.plain(1, 1) is False
    index.close()


def test_what_is_committed_is_seen_at_once(tmp_path, built):
    index = Index.open(str(tmp_path))
    index.begin_session("boot")
    records = look(built, index)
    assert records.plain(7, 1) is False
    for turn in range(20):
        residency = Residency.STUB if turn % 2 else Residency.RESIDENT
        with index.write() as writer:
            writer.put(replace(damaging.a_record(7), residency=residency))
        assert records.plain(7, 1) is (None if turn % 2 else True)
    index.close()


WRITER = """
import random, sys
sys.path.insert(0, sys.argv[2])
from dataclasses import replace
import damaging
from tierfs.index import Index
index, rng = Index.open(sys.argv[1]), random.Random(1)
print("begun", flush=True)
for turn in range(400):
    with index.write() as writer:
        for ino in rng.sample(range(2, 4000, 2), 60):  # odd ones stay as they are
            writer.put(replace(damaging.a_record(ino), name=b"x" * rng.randrange(1, 200)))
        for ino in rng.sample(range(2, 4000, 2), 20):
            writer.delete(ino)
index.close()
"""


def test_while_another_process_writes_nothing_wrong_is_said(tmp_path, built):
    """Records that nobody touches stay what they are, wherever the writer moves them."""
    index = Index.open(str(tmp_path))
    index.begin_session("boot")
    with index.write() as writer:
        for ino in range(1, 4000, 4):
            writer.put(replace(damaging.a_record(ino), residency=Residency.RESIDENT))
    index.close()
    index = Index.open(str(tmp_path), readonly=True)
    records = look(built, index)
    argv = [sys.executable, "-c", WRITER, str(tmp_path), str(Path(damaging.__file__).parent)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "begun\n"
        looks, left = 0, 0
        while writer.poll() is None:
            for ino in range(1, 4000, 2):
                said = records.plain(ino, 1)
                assert said in ((True, None) if ino % 4 == 1 else (False, None))
                looks, left = looks + 1, left + (said is None)
        assert writer.returncode == 0
    index.close()
    assert looks > 10_000 and left < looks / 2


def test_whatever_bytes_are_changed_it_ends_and_makes_no_stub_plain(tmp_path, built):
    """Damage is found by others; here it must neither crash nor be believed. All of these are stubs."""
    damaging.make(tmp_path / "whole")
    file = (tmp_path / "whole" / "data.mdb").read_bytes()
    rng = random.Random(6)
    found = {False: 0, None: 0}
    for _ in range(150):
        data = bytearray(file)
        for _ in range(rng.choice((1, 4, 200, 5000))):
            data[rng.randrange(8192, len(data))] = rng.randrange(256)
        (tmp_path / "damaged").write_bytes(data)
        with open(tmp_path / "damaged", "rb") as opened, open(tmp_path / "whole" / "lock.mdb", "rb") as locks:
            records = built.Records(opened.fileno(), locks.fileno(), 64 << 30, 4096)
        for ino in range(0, 2000, 7):
            found[records.plain(ino, 3)] += 1
    assert all(found.values())


def test_what_is_no_index_is_left_to_others(tmp_path, built):
    (tmp_path / "nothing").write_bytes(bytes(8192))
    index = Index.open(str(tmp_path / "index"))
    path, lock, size, page = index.file
    with open(tmp_path / "nothing", "rb") as nothing, open(path, "rb") as data, open(lock, "rb") as locks:
        assert built.Records(data.fileno(), locks.fileno(), size, page).plain(1, 1) is False
        for *files, wrong in ((data, nothing, page), (nothing, locks, page), (data, locks, 1000)):
            with pytest.raises(ValueError, match="no "):
                built.Records(*(file.fileno() for file in files), size, wrong)
    index.close()
