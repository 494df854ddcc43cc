"""Requests that no kernel sends: cut, lengthened, of odd numbers. Both forms bear them, and say the same."""

import errno
import os
import random
import select
import stat
import struct

import pytest
from hotside import build, load
from hottwins import ENTRIES, Both, same

from tierfs.fuse import protocol as p
from tierfs.vfs import ROOT

REQUESTS = 250  # of each seed: a second or two
COMPARED = 10  # after so many the whole state is
NAMES = [b"a", b"b", b"c", b"dir", b"sub", b"link", b"new", b"", b"\xff\xfe"]
NAMES += [b"n" * 60, b"l" * 255, b"t" * 256, b"m" * 1000]
XATTRS = [b"user.one", b"user.two", b"user.tierfs.pin", b"security.capability", b"trusted.tierfs", b"", b"odd"]
NUMBERS = [0, 1, 2, 40, 255, 256, 4096, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
           (1 << 33) + 5, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1]  # fmt: skip
SMALL = (1 << 20) - 1
# What a disk has to bear, and numbers that the kernel bounds: opcode -> (place, format, bits that are left, and
# that are set).
BOUNDS = {
    p.Op.SETATTR: [(16, "Q", SMALL, 0)],
    p.Op.MKNOD: [(0, "I", 0o777, stat.S_IFREG), (4, "I", 0, 0), (8, "I", 0o777, 0)],
    p.Op.MKDIR: [(4, "I", 0o777, 0)],
    p.Op.CREATE: [(8, "I", 0o777, 0)],
    p.Op.TMPFILE: [(8, "I", 0o777, 0)],
    p.Op.READ: [(8, "Q", SMALL, 0), (16, "I", 0x7FFF, 0)],  # what is more is spliced, which a socket cuts
    p.Op.WRITE: [(8, "Q", SMALL, 0), (16, "I", SMALL, 0)],
    p.Op.FALLOCATE: [(8, "Q", SMALL, 0), (16, "Q", SMALL, 0)],
    p.Op.COPY_FILE_RANGE: [(32, "Q", SMALL, 0)],
    p.Op.COPY_FILE_RANGE_64: [(32, "Q", SMALL, 0)],
}
FLAGS = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_APPEND]
SILENT = (p.Op.FORGET, p.Op.BATCH_FORGET, p.Op.INTERRUPT)


class Fuzz:
    """What is made up, and what has been learnt by it."""

    def __init__(self, both, seed):
        self.both = both
        self.chance = random.Random(seed)
        self.nodes, self.files, self.unique = [ROOT], [], 0

    def name(self):
        return self.chance.choice(NAMES) + b"\0"

    def body(self, op):
        """That of a request of this kind as the kernel may send it."""
        chance, name, files = self.chance, self.name(), self.files or [0]
        flags = chance.choice(FLAGS)
        mode, node = chance.choice([0o644, 0o755, 0o4755, 0o1777]), chance.choice(self.nodes)
        size, valid = chance.choice([0, 100, 1000, 70000]), chance.randrange(1 << 12)
        file, other, xattr = chance.choice(files), chance.choice(files), chance.choice(XATTRS) + b"\0"
        return {
            p.Op.LOOKUP: name,
            p.Op.FORGET: p.U64.pack(1),
            p.Op.GETATTR: p.GETATTR_IN.pack(chance.randrange(2), 0, file),
            p.Op.SETATTR: p.SETATTR_IN.pack(valid, 0, file, size, 0, 5, 5, 0, 5, 5, 0, mode, 0, 0, 0, 0),
            p.Op.SYMLINK: name + b"target\0",
            p.Op.MKNOD: p.MKNOD_IN.pack(stat.S_IFREG | 0o644, 0, 0o22, 0) + name,
            p.Op.MKDIR: p.MKDIR_IN.pack(mode, 0o22) + name,
            p.Op.UNLINK: name,
            p.Op.RMDIR: name,
            p.Op.RENAME: p.U64.pack(node) + name + self.name(),
            p.Op.LINK: p.U64.pack(node) + name,
            p.Op.OPEN: p.OPEN_IN.pack(flags, 0),
            p.Op.READ: p.READ_IN.pack(file, 0, size, 0, 0, 0, 0),
            p.Op.WRITE: p.READ_IN.pack(file, 0, 3, 0, 0, 0, 0) + b"abc",
            p.Op.RELEASE: p.RELEASE_IN.pack(file, 0, 0, 0),
            p.Op.FSYNC: p.FSYNC_IN.pack(file, 1, 0),
            p.Op.SETXATTR: p.SETXATTR_IN.pack(3, 0, 0, 0) + xattr + b"abc",
            p.Op.GETXATTR: p.GETXATTR_IN.pack(size, 0) + xattr,
            p.Op.LISTXATTR: p.GETXATTR_IN.pack(size, 0),
            p.Op.REMOVEXATTR: xattr,
            p.Op.FLUSH: p.RELEASE_IN.pack(file, 0, 0, 0),
            p.Op.INIT: p.INIT_IN.pack(7, 45, 0, 0, 0),
            p.Op.READDIR: p.READ_IN.pack(0, 0, size, 0, 0, 0, 0),
            p.Op.FSYNCDIR: p.FSYNC_IN.pack(0, 0, 0),
            p.Op.CREATE: p.CREATE_IN.pack(flags | os.O_CREAT, mode, 0o22, 0) + name,
            p.Op.INTERRUPT: p.U64.pack(2),
            p.Op.BATCH_FORGET: p.COUNT_IN.pack(2, 0) + 2 * p.FORGET_ONE.pack(node, 1),
            p.Op.FALLOCATE: p.FALLOCATE_IN.pack(file, 0, size, 0, 0),
            p.Op.READDIRPLUS: p.READ_IN.pack(0, 0, size, 0, 0, 0, 0),
            p.Op.RENAME2: p.RENAME2_IN.pack(node, chance.randrange(3), 0) + name + self.name(),
            p.Op.LSEEK: p.LSEEK_IN.pack(file, 0, 3, 0),
            p.Op.COPY_FILE_RANGE: p.COPY_IN.pack(file, 0, node, other, 0, size, 0),
            p.Op.COPY_FILE_RANGE_64: p.COPY_IN.pack(file, 0, node, other, 0, size, 0),
            p.Op.TMPFILE: p.CREATE_IN.pack(flags, 0o600, 0o22, 0) + name,
            p.Op.STATX: p.STATX_IN.pack(chance.randrange(2), 0, file, 0, 0x7FF),
        }.get(op, b"")  # fmt: skip

    def request(self):
        """One, as a rule with something wrong."""
        chance, op = self.chance, self.chance.choice(list(p.Op))
        body = self.bounded(op, self.mutated(self.body(op)))
        self.unique += 2
        extensions = chance.choice([0] * 20 + [1, 2, 40, 65535])
        size = chance.choice([p.IN + len(body)] * 20 + [0, 40, p.IN + len(body) + 8, (1 << 32) - 1])
        unique = self.unique | chance.choice([0] * 20 + [1 << 63])
        node = chance.choice([*self.nodes * 3, *(self.nodes[-1:] * 5), *NUMBERS])
        caller = [chance.choice([0, 0, 0, 1000, (1 << 32) - 1]) for _ in range(3)]
        number = chance.choice([op] * 40 + [64, 65, (1 << 32) - 1])
        head = p.HEAD.pack(size, number, unique, node) + p.CALLER.pack(*caller, extensions) + bytes(2)
        return number, head + body

    def mutated(self, body):
        """Nothing, or a few things, are wrong with it."""
        chance, body = self.chance, bytearray(body)
        for _ in range(chance.choice([0, 1, 1, 2, 3])):
            at = chance.randrange(len(body) + 1)
            how = chance.randrange(6)
            if how == 0:
                del body[at:]
            elif how == 1:
                body += chance.randbytes(chance.randrange(1, 40))
            elif how == 2:
                body[at : at + 1] = chance.randbytes(1)
            elif how == 3:
                body[at:at] = bytes(chance.randrange(1, 4))
            else:
                words = struct.Struct(chance.choice(["<I", "<Q"]))
                at -= at % words.size
                body[at : at + words.size] = words.pack(chance.choice(NUMBERS) % (1 << 8 * words.size))
        return bytes(body)

    def bounded(self, op, body):
        """Nothing leaves the tree, fills the disk or is a device."""
        for at, kind, kept, set_ in BOUNDS.get(op, ()):
            size = struct.calcsize(kind)
            if len(body) >= at + size:
                (number,) = struct.unpack_from("<" + kind, body, at)
                body = body[:at] + struct.pack("<" + kind, number & kept | set_) + body[at + size :]
        return body.replace(b"/", b"_").replace(b"..", b"_")

    def ask(self):
        number, message = self.request()
        one, other = (self.answer(side, number, message) for side in self.both.sides)
        assert same(one, other, {}), (number, message, one, other)
        if one and not one[0]:
            self.learn(number, one)

    def learn(self, number, answer):
        if number in ENTRIES and answer[1][0][0]:
            self.nodes.append(answer[1][0][0])
            self.both.hold()
        if number in (p.Op.CREATE, p.Op.TMPFILE, p.Op.OPEN):
            self.files.append(p.OPEN_OUT.unpack(answer[-1])[0])
        if number == p.Op.TMPFILE:  # by no name is its number held
            self.both.hold_open(self.files[-1])
        if number in (p.Op.LOOKUP, p.Op.GETATTR) and len(self.nodes) > 20:
            del self.nodes[1]

    def answer(self, side, number, message):
        """What this side says; None: nothing."""
        side.sock.send(message)
        assert side.session.serve(1) == 1
        assert not side.session._parked
        if number in SILENT and not select.select([side.sock], [], [], 0)[0]:
            return None
        return side.said(number, side.sock.recv(1 << 17))


@pytest.fixture
def both(tmp_path, monkeypatch, built):
    made = Both(tmp_path, monkeypatch, built)
    made.behind(lambda path: [(path / name).write_bytes(b"content" * 100) for name in ("a", "b", "c")])
    made.behind(lambda path: (path / "dir" / "sub").mkdir(parents=True))
    made.behind(lambda path: (path / "link").symlink_to("a"))
    made.hold()
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(4))
def test_odd_requests_harm_neither_form_and_are_answered_alike(both, seed):
    fuzz = Fuzz(both, seed)
    for each in range(REQUESTS):
        fuzz.ask()
        if not each % COMPARED:
            both.compare()
    both.compare()


def test_nothing_is_noted_of_a_node_that_is_not(both):
    fh = both.opened(both.lookup(ROOT, b"a"), os.O_RDONLY)
    for nodeid in ((1 << 32) - 2, 1 << 31):
        assert both.ask(p.Op.GETATTR, nodeid, p.GETATTR_IN.pack(p.GETATTR_FH, 0, fh))[0]


@pytest.mark.parametrize(
    ("op", "name"), [(p.Op.UNLINK, b"a"), (p.Op.RMDIR, b"empty"), (p.Op.REMOVEXATTR, b"user.one")]
)
def test_a_name_with_something_behind_it_is_refused(both, op, name):
    both.behind(lambda path: (path / "empty").mkdir())
    both.behind(lambda path: os.setxattr(path / "a", "user.one", b"1"))
    both.hold()
    nodeid = both.lookup(ROOT, b"a") if op == p.Op.REMOVEXATTR else ROOT
    assert both.ask(op, nodeid, name + b"\0b\0")[0]
    for side in both.sides:
        assert (side.path / "empty").exists() and os.listxattr(side.path / "a") == ["user.one"]
    assert not both.ask(op, nodeid, name + b"\0")[0]


@pytest.mark.parametrize("op", [p.Op.READDIRPLUS, p.Op.RELEASE])
def test_what_is_cut_short_is_refused(both, op):
    fh = both.opened(both.lookup(ROOT, b"a"), os.O_RDONLY)
    body = p.RELEASE_IN.pack(fh, 0, 0, 0) if op == p.Op.RELEASE else p.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0)
    assert both.ask(op, ROOT, body[:-1])[0]
    assert not both.ask(op, ROOT, body)[0]


def test_the_name_of_a_directory_that_was_forgotten_is_stale(both):
    """The kernel may know a file by another of its names, and forget the directory of the last it asked for."""
    long = b"d" * 100
    both.behind(lambda path: (path / os.fsdecode(long)).mkdir())
    both.behind(lambda path: os.link(path / "a", path / os.fsdecode(long) / "a"))
    both.hold()
    directory, node = both.lookup(ROOT, long), both.lookup(ROOT, b"a")
    assert both.lookup(directory, b"a") == node
    assert both.ask(p.Op.FORGET, directory, p.U64.pack(1)) is None
    assert both.ask(p.Op.GETATTR, node, p.GETATTR_IN.pack(0, 0, 0))[0] == -errno.ESTALE
    assert both.lookup(ROOT, b"a") == node


# A filesystem that has names of more than 255 bytes: by the first of them.
CUT = """
#define _GNU_SOURCE 1
#include <stdio.h>
#include <sys/stat.h>
static inline int first_of(int fd, const char *name, struct stat *st, int flags)
{
    char first[256];
    snprintf(first, sizeof first, "%s", name);
    return fstatat(fd, first, st, flags);
}
#define fstatat first_of
"""


def test_a_name_that_no_record_can_hold_is_too_long(tmp_path, monkeypatch):
    (tmp_path / "cut.h").write_text(CUT)
    built = load(build(tmp_path / "_hot.so", "-Wno-format-truncation", "-include", str(tmp_path / "cut.h")))
    both, whole = Both(tmp_path, monkeypatch, built), os.stat
    both.behind(lambda path: (path / ("n" * 255)).write_bytes(b""))
    both.hold()
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, **how: whole(path[:255] if type(path) is bytes else path, **how))
        assert both.lookup(ROOT, b"n" * 300) == errno.ENAMETOOLONG
        assert both.lookup(ROOT, b"n" * 1000) == errno.ENAMETOOLONG
    assert both.lookup(ROOT, b"n" * 255) > 0
    both.close()


def test_a_receiver_that_cannot_be_made_leaves_no_descriptor(built):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(TypeError):
        built.Hot(fd=0)
    assert os.listdir("/proc/self/fd") == before


def test_the_want_of_memory_is_called_that(both):
    def wants(_message, _nodeid):
        raise MemoryError

    for side in both.sides:
        side.session._table[p.Op.STATFS] = wants
    assert both.ask(p.Op.STATFS, ROOT, b"")[0] == -errno.ENOMEM
