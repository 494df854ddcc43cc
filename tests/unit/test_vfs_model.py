"""Random operations through the vfs and on a plain directory: same answers, same errors, same tree."""

import os
import random
import stat

import pytest
from test_vfs_names import ME, World

from tierfs import syscalls
from tierfs.vfs import ROOT

NAMES = [b"a", b"b", b"c", b"d\n", b"e\xff"]
WEIGHTS = {"create": 3, "rename": 2, "link": 2, "open": 2, "write": 2} | dict.fromkeys(
    ["mkdir", "symlink", "unlink", "rmdir", "stat", "close", "read", "fstat", "chmod", "truncate"], 1
)
FLAGS = [0, 0, 0, syscalls.RENAME_NOREPLACE, syscalls.RENAME_EXCHANGE]


class ThroughVfs:
    """Paths are tuples of names, resolved as the kernel does: a lookup a component, forgotten later."""

    def __init__(self, world):
        self.vfs = world.vfs
        self.held = []

    def node(self, path):
        node = ROOT
        for name in path:
            node, _ = self.vfs.lookup(node, name)
            self.held.append(node)
        return node

    def forget_all(self):
        for node in reversed(self.held):
            self.vfs.forget(node, 1)
        self.held.clear()

    def keep(self, made):
        self.held.append(made[0])
        return made

    def create(self, path):
        _, _, fh, _ = self.keep(
            self.vfs.create(self.node(path[:-1]), path[-1], os.O_RDWR | os.O_EXCL, 0o644, ME)
        )
        return fh

    def open(self, path):
        return self.vfs.open(self.node(path), os.O_RDWR, ME)[0]

    def mkdir(self, path):
        self.keep(self.vfs.mkdir(self.node(path[:-1]), path[-1], 0o755, ME))

    def symlink(self, path):
        self.keep(self.vfs.symlink(self.node(path[:-1]), path[-1], b"target", ME))

    def unlink(self, path):
        self.vfs.unlink(self.node(path[:-1]), path[-1])

    def rmdir(self, path):
        self.vfs.rmdir(self.node(path[:-1]), path[-1])

    def rename(self, old, new, flags):
        self.vfs.rename(self.node(old[:-1]), old[-1], self.node(new[:-1]), new[-1], flags)

    def link(self, old, new):
        self.keep(self.vfs.link(self.node(old), self.node(new[:-1]), new[-1]))

    def chmod(self, path, mode):
        self.vfs.setattr(self.node(path), mode=mode)

    def truncate(self, path, size):
        self.vfs.setattr(self.node(path), size=size)

    def write(self, fh, offset, data):
        return self.vfs.write(fh, offset, data)

    def read(self, fh):
        return self.vfs.read(fh, 0, 1 << 20)

    def stat(self, path):
        return self.vfs.getattr(self.node(path))

    def fstat(self, fh):
        return self.vfs.getattr(ROOT, fh)

    def close(self, fh):
        self.vfs.release(fh)


class Plain:
    """The same on a directory."""

    def __init__(self, top):
        self.top = os.fsencode(top)

    def at(self, path):
        return b"/".join([self.top, *path])

    def create(self, path):
        return os.open(self.at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)

    def open(self, path):
        return os.open(self.at(path), os.O_RDWR | os.O_NOFOLLOW)

    def mkdir(self, path):
        os.mkdir(self.at(path), 0o755)

    def symlink(self, path):
        os.symlink(b"target", self.at(path))

    def unlink(self, path):
        os.unlink(self.at(path))

    def rmdir(self, path):
        os.rmdir(self.at(path))

    def rename(self, old, new, flags):
        syscalls.renameat2(syscalls.AT_FDCWD, self.at(old), syscalls.AT_FDCWD, self.at(new), flags)

    def link(self, old, new):
        os.link(self.at(old), self.at(new), follow_symlinks=False)

    def chmod(self, path, mode):
        os.chmod(self.at(path), mode)

    def truncate(self, path, size):
        os.truncate(self.at(path), size)

    def write(self, fd, offset, data):
        return os.pwrite(fd, data, offset)

    def read(self, fd):
        return os.pread(fd, 1 << 20, 0)

    def stat(self, path):
        return os.lstat(self.at(path))

    def fstat(self, fd):
        return os.fstat(fd)

    def close(self, fd):
        os.close(fd)


def outcome(call, *args):
    try:
        return call(*args)
    except OSError as error:
        return error


def paths(top):
    """All paths below `top`, as tuples of names, with the type of each."""
    found = []
    for base, dirs, files in os.walk(os.fsencode(top)):
        inner = (
            tuple(base[len(os.fsencode(top)) + 1 :].split(b"/")) if len(base) > len(os.fsencode(top)) else ()
        )
        found += [((*inner, name), os.lstat(base + b"/" + name)) for name in dirs + files]
    return found


def shape(top):
    """What of a tree must agree; hard links by the first of their names."""
    first, result = {}, {}
    for path, st in sorted(paths(top)):
        name = first.setdefault(st.st_ino, path)
        size = 0 if stat.S_ISDIR(st.st_mode) else st.st_size
        result[path] = st.st_mode, size, st.st_nlink, name
    return result


def step(chance, plain_top, plain, vfs, open_files):
    """One random operation on both; their outcomes."""
    every = paths(plain_top)
    kind_of = dict(every)
    dirs = [(), *(p for p, st in every if stat.S_ISDIR(st.st_mode) and len(p) < 4)]

    def some_path():
        known = [p for p, _ in every]
        return (
            chance.choice(known)
            if known and chance.random() < 0.7
            else (*chance.choice(dirs), chance.choice(NAMES))
        )

    path = some_path()
    regular = path in kind_of and stat.S_ISREG(kind_of[path].st_mode)
    action = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if action in ("write", "read", "fstat", "close"):
        if not open_files:
            return None
        both = chance.choice(open_files)
        if action == "close":
            open_files.remove(both)
        args = [chance.randrange(9000), os.urandom(chance.randrange(1, 3000))] if action == "write" else []
        return (
            action,
            outcome(getattr(plain, action), both[0], *args),
            outcome(getattr(vfs, action), both[1], *args),
        )
    if action in ("open", "truncate", "chmod") and not regular:
        return None
    args = {
        "rename": lambda: [some_path(), chance.choice(FLAGS)],
        "link": lambda: [some_path()],
        "chmod": lambda: [chance.choice([0o600, 0o755, 0o640])],
        "truncate": lambda: [chance.randrange(9000)],
    }.get(action, list)()
    results = outcome(getattr(plain, action), path, *args), outcome(getattr(vfs, action), path, *args)
    if action in ("create", "open") and not isinstance(results[0], OSError):
        open_files.append(results)
        return action, None, None
    return action, *results


@pytest.mark.parametrize("seed", range(6))
def test_the_vfs_and_a_plain_directory_agree(tmp_path, seed):
    chance = random.Random(seed)
    world = World(tmp_path, directory_fds=2 if seed % 2 else 64)
    plain_top = tmp_path / "plain"
    plain_top.mkdir()
    plain, vfs = Plain(plain_top), ThroughVfs(world)
    open_files, counts = [], {}
    for number in range(1000):
        found = step(chance, plain_top, plain, vfs, open_files)
        if chance.random() < 0.3:
            vfs.forget_all()
        if found is None:
            continue
        action, expected, got = found
        counts[action] = counts.get(action, 0) + 1
        if isinstance(expected, OSError) or isinstance(got, OSError):
            assert getattr(got, "errno", got) == getattr(expected, "errno", expected), (number, action)
        elif isinstance(expected, os.stat_result):
            assert (got.st_mode, got.st_nlink) == (expected.st_mode, expected.st_nlink), (number, action)
            assert stat.S_ISDIR(got.st_mode) or got.st_size == expected.st_size, (number, action)
        else:
            assert got == expected, (number, action)
        if number % 20 == 0:
            assert shape(world.path) == shape(plain_top), (number, action)
    assert shape(world.path) == shape(plain_top)
    assert min(counts.values()) >= 3
    for both in open_files:
        os.close(both[0])
        world.vfs.release(both[1])
    vfs.forget_all()
    assert len(world.vfs.nodes) == 1
    world.close()
