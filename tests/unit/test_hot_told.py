"""What the kernel was told lately is left out of listings; that a name is absent it believes for a moment."""

import errno
import os

import pytest
from hottwins import listed_of

from tierfs import lasting, syscalls, told
from tierfs.fuse import protocol as p
from tierfs.vfs import ROOT

ENTRY, ATTR = 2, 3  # for how long, in a fuse_entry_out


def listed(side, nodeid=ROOT):
    """The nodes that a listing tells of, by name; 0: what the kernel knows is left out."""
    number, body = side.ask(p.Op.READDIRPLUS, nodeid, p.READ_IN.pack(0, 0, 1 << 15, 0, 0, 0, 0))
    assert number == 0
    found, at = {}, 0
    for _, name, *_ in listed_of(body, True):
        found[name] = p.ENTRY_OUT.unpack_from(body, at)[0]
        at += p.ENTRY_OUT.size + p.DIRENT.size + (len(name) + 7 & ~7)
    del found[b"."], found[b".."]
    return found


def lookups(side):
    """How often the kernel has to forget each node."""
    return {node.id: side.vfs.ledger.lookups(node.id) for node in side.vfs.nodes.all()}


def setattr_of(**fields):
    names = ("valid", "", "fh", "size", "", "atime", "mtime", "", "atime_ns", "mtime_ns", "", "mode", "", "uid",
             "gid", "")  # fmt: skip
    return p.SETATTR_IN.pack(*(fields.get(name, 0) for name in names))


def settle(side, *names):
    """They are at rest, so that what is told of them lasts at once."""
    for name in names:
        (side.path / name).write_bytes(b"content")
    side.gate.lasting.unproven.clear()


def test_names_that_were_looked_up_are_left_out(side):
    settle(side, "one", "two", "three")
    one = side.lookup(ROOT, b"one")
    assert one[ATTR] > told.LEFT or side.lookup(ROOT, b"one")[ATTR] > told.LEFT
    before = lookups(side)
    found = listed(side)
    assert found.pop(b"one") == 0 and all(found.values()) and len(found) == 2
    assert lookups(side) == {**before, **dict.fromkeys(found.values(), 1)}
    assert set(listed(side).values()) == {0}  # and so are those of which a listing has told


def test_what_was_told_for_a_moment_only_is_told_again(side):
    settle(side, "file", "both")
    os.link(side.path / "both", side.path / "second")  # of several names the kernel believes none for long
    for name in (b"file", b"both", b"second"):
        side.lookup(ROOT, name)
    found = listed(side)
    assert found.pop(b"file") >= 0 and all(found.values())
    node = side.lookup(ROOT, b"file")[0]
    assert listed(side)[b"file"] == 0
    number, body = side.ask(p.Op.SETATTR, node, setattr_of(valid=p.SET_MODE, mode=0o600))
    assert number == 0 and p.ATTR_OUT.unpack(body)[0] < told.LEFT
    assert listed(side)[b"file"] == node


@pytest.mark.parametrize("exchanged", [False, True])
def test_what_was_renamed_is_told_again(side, exchanged):
    settle(side, "file", "other", "third")
    listed(side)
    assert set(listed(side).values()) == {0}
    if exchanged:
        how = p.RENAME2_IN.pack(ROOT, syscalls.RENAME_EXCHANGE, 0)
        assert side.ask(p.Op.RENAME2, ROOT, how + b"file\0other\0")[0] == 0
    else:
        assert side.ask(p.Op.RENAME, ROOT, p.U64.pack(ROOT) + b"file\0moved\0")[0] == 0
    found = listed(side)
    assert found.pop(b"third") == 0
    assert all(found.values()) if exchanged else found.pop(b"moved") and set(found.values()) == {0}


def test_another_file_of_the_name_and_another_name_of_the_file_are_told(side):
    settle(side, "file", "other")
    (side.path / "dir").mkdir()
    below = side.lookup(ROOT, b"dir")[0]
    found = listed(side)
    assert found[b"file"] and found[b"other"] and found[b"dir"] == 0
    with open(side.path / "file"):  # its number is not used again
        os.rename(side.path / "other", side.path / "file")  # behind the mount
        os.rename(side.path / "file", side.path / "dir" / "moved")
        (side.path / "file").write_bytes(b"new")
        assert all(listed(side, below).values())
        assert listed(side)[b"file"]
    assert side.lookup(ROOT, b"file")[0] == side.vfs.nodes.known(os.stat(side.path / "file").st_ino).id


def test_a_forgotten_node_is_told_and_so_is_one_with_its_number(side):
    settle(side, "file")
    listed(side)
    node = side.vfs.nodes.known(os.stat(side.path / "file").st_ino).id
    assert listed(side)[b"file"] == 0
    side.send(p.Op.FORGET, node, p.U64.pack(1))
    assert side.session.serve(1) == 1
    assert side.vfs.nodes.known(os.stat(side.path / "file").st_ino) is None
    again = listed(side)[b"file"]
    assert again and again != node


def test_the_hint_ends(side, monkeypatch):
    settle(side, "file")
    listed(side)
    node = side.vfs.nodes.known(os.stat(side.path / "file").st_ino).id
    side.vfs.told.note(node, told.LEFT + 1)
    assert listed(side)[b"file"] == 0
    side.vfs.told.note(node, told.LEFT - 1)
    assert listed(side)[b"file"] == node


def test_what_is_listed_first_is_proven_at_once_and_what_is_looked_up_soon(side):
    for name in ("listed", "looked"):
        (side.path / name).write_bytes(b"content")  # a moment ago
    assert side.lookup(ROOT, b"looked")[ATTR] > lasting.FRESH // 2
    number, body = side.ask(p.Op.READDIRPLUS, ROOT, p.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0))
    seconds = {name: entry[0][ATTR] for _, name, _, _, entry in listed_of(body, True)}
    assert number == 0 and seconds[b"listed"] > lasting.FRESH // 2
    assert seconds[b"looked"] == 0  # the kernel knows it
    assert list(side.gate.lasting.believed) == [(side.path / "looked").stat().st_ino]


def test_a_file_that_somebody_writes_behind_the_mount_is_not_proven_by_a_listing(side):
    with open(side.path / "file", "wb") as file:
        file.write(b"content")
        file.flush()
        number, body = side.ask(p.Op.READDIRPLUS, ROOT, p.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0))
        (seconds,) = (entry[0][ATTR] for _, name, _, _, entry in listed_of(body, True) if name == b"file")
        assert (number, seconds) == (0, p.ATTR_SECONDS)
        assert listed(side)[b"file"]  # told again, since that holds for a moment only


def test_that_a_name_is_absent_holds_for_a_moment(side):
    number, body = side.ask(p.Op.LOOKUP, ROOT, b"absent\0")
    entry = p.ENTRY_OUT.unpack(body)
    assert number == 0 and entry[0] == 0 and entry[ENTRY] == p.ENTRY_SECONDS and not any(entry[ATTR:])
    (side.path / "absent").write_bytes(b"content")
    assert side.lookup(ROOT, b"absent")[0]
    assert side.ask(p.Op.UNLINK, ROOT, b"nothing\0")[0] == errno.ENOENT
