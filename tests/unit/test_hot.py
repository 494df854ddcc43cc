"""How requests come in, in both forms: the pure one and the compiled one answer alike and count alike."""

import contextlib
import errno
import logging
import os
import socket
import threading
import time

import pytest
from hotside import FORMS, Side
from hottwins import listed_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierfs import lasting
from tierfs.fuse import compiled, hot, kernel
from tierfs.fuse import protocol as p
from tierfs.handles import Inode, ShownTimes
from tierfs.marks import Mark, MarkReader
from tierfs.vfs import ROOT

SIZE, MODE, LINKS = 4, 12, 13  # where these are in a fuse_attr_out


@pytest.fixture(params=FORMS)
def side(request, tmp_path, monkeypatch):
    (tmp_path / "tree").mkdir()
    built = request.getfixturevalue("built") if request.param == "compiled" else None
    made = Side(tmp_path / "side", request.param, monkeypatch, built)
    yield made
    made.close()


def attributes(found, st, *, entry=True):
    """What is packed of a stat, beside what was found."""
    times = (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)
    split = [divmod(each, 10**9) for each in times]
    wanted = (
        st.st_ino, st.st_size, st.st_blocks, *(s for s, _ in split), *(ns for _, ns in split),
        st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev, st.st_blksize, 0,
    )  # fmt: skip
    return found[6 if entry else 3 :], wanted


def test_names_and_attributes_are_those_of_the_tree(side):
    (side.path / "file").write_bytes(b"content")
    (side.path / "dir").mkdir()
    (side.path / "dir" / "link").symlink_to("nowhere")
    os.mkfifo(side.path / "fifo")
    os.utime(side.path / "file", ns=(-1, -1_500_000_000))
    for name in (b"file", b"dir", b"fifo"):
        found = side.lookup(ROOT, name)
        got, wanted = attributes(found, os.lstat(side.path / os.fsdecode(name)))
        assert got == wanted and found[1:6] == (0, p.ENTRY_SECONDS, p.ATTR_SECONDS, 0, 0)
        again = side.getattr(found[0])
        got, wanted = attributes(again, os.lstat(side.path / os.fsdecode(name)), entry=False)
        assert got == wanted and again[0] == p.ATTR_SECONDS
    above = side.lookup(ROOT, b"dir")[0]
    got, wanted = attributes(side.lookup(above, b"link"), os.lstat(side.path / "dir" / "link"))
    assert got == wanted
    got, wanted = attributes(side.getattr(ROOT), os.stat(side.path), entry=False)
    assert got == wanted


def test_each_lookup_counts_once_also_for_a_successor(side):
    (side.path / "file").write_bytes(b"content")
    nodeid = side.lookup(ROOT, b"file")[0]
    for wanted in (2, 3):
        assert side.lookup(ROOT, b"file")[0] == nodeid
        assert side.vfs.ledger.lookups(nodeid) == wanted
        kept = {number: side.vfs.ledger.lookups(number) for number, *_ in side.vfs.ledger.load_nodes()}
        assert kept[nodeid] == wanted
    side.send(p.Op.FORGET, nodeid, p.U64.pack(3))
    side.session.serve(1)
    assert side.getattr(nodeid) == errno.ESTALE


@pytest.mark.parametrize("name", [b"absent", b"", b"x" * 300, b"a/b", b"file/below"])
def test_what_is_not_there_is_an_error(side, name):
    (side.path / "file").touch()
    wanted = errno.ENAMETOOLONG if len(name) > 255 else errno.ENOENT
    assert side.lookup(ROOT, name) == (errno.ENOTDIR if b"file/" in name else wanted)
    assert side.lookup(77, b"file") == errno.ESTALE


@pytest.mark.parametrize("side", ["compiled"], indirect=True)
def test_the_compiled_form_answers_what_is_plain_itself_and_leaves_the_rest(side, monkeypatch):
    asked = []
    for op in (p.Op.LOOKUP, p.Op.GETATTR):
        ask = side.session._table[op]
        side.session._table[op] = lambda *request, ask=ask: (asked.append(request[1]), ask(*request))[1]
    (side.path / "file").write_bytes(b"content")
    nodeid = side.lookup(ROOT, b"file")[0]
    side.getattr(nodeid)
    side.getattr(ROOT)
    assert side.lookup(ROOT, b"absent") == errno.ENOENT and asked == []
    side.getattr(nodeid, p.GETATTR_FH, 5)
    assert asked == []
    os.link(side.path / "file", side.path / "second")
    assert side.lookup(ROOT, b"second")[0] == nodeid and asked == []
    side.vfs.nodes.anchor(side.vfs.nodes.get(nodeid), os.open(side.path / "second", os.O_PATH))
    assert side.lookup(ROOT, b"second")[0] == nodeid and asked == [ROOT]


def test_a_name_that_means_another_file_is_stale(side):
    (side.path / "file").write_bytes(b"content")
    (side.path / "other").write_bytes(b"more")
    nodeid = side.lookup(ROOT, b"file")[0]
    os.rename(side.path / "other", side.path / "file")
    assert side.getattr(nodeid) == errno.ESTALE
    assert side.lookup(ROOT, b"file")[0] != nodeid


def test_a_node_follows_the_name_that_was_looked_up_last(side):
    (side.path / "file").write_bytes(b"content")
    os.link(side.path / "file", side.path / "second")
    nodeid = side.lookup(ROOT, b"file")[0]
    assert side.lookup(ROOT, b"second")[0] == nodeid
    assert side.vfs.nodes.name(side.vfs.nodes.get(nodeid)) == b"second"
    os.unlink(side.path / "file")
    assert side.getattr(nodeid)[MODE] == os.stat(side.path / "second").st_mode


def test_shown_times_and_open_writers_are_respected(side):
    (side.path / "file").write_bytes(b"content")
    ino = os.stat(side.path / "file").st_ino
    nodeid = side.lookup(ROOT, b"file")[0]
    inode = Inode(ino, ROOT, b"file")
    side.gate.states.inodes[ino] = inode
    inode.shown = ShownTimes(5, 6_000_000_007, 123)
    side.gate.appearance.moving(ino)
    found = side.getattr(nodeid)
    # Blocks, and seconds and nanoseconds of mtime and ctime.
    assert (found[5], found[7], found[10], found[8], found[11]) == (123, 0, 5, 6, 7)
    for passthrough in (True, False):
        inode.shown, inode.writers, inode.passthrough = None, 1, passthrough
        assert side.getattr(nodeid)[0] == 0
        assert side.lookup(ROOT, b"file")[3] == 0
    inode.writers = 0
    assert side.getattr(nodeid)[0] == p.ATTR_SECONDS
    del side.gate.states.inodes[ino]


def test_a_file_without_a_name_shows_its_last_attributes(side):
    (side.path / "file").write_bytes(b"content")
    nodeid = side.lookup(ROOT, b"file")[0]
    assert side.ask(p.Op.UNLINK, ROOT, b"file\0") == (0, b"")
    found = side.getattr(nodeid)
    assert found[SIZE] == 7 and found[LINKS] == 0
    (side.path / "file").write_bytes(b"new")
    assert side.getattr(nodeid)[LINKS] == 0
    assert side.lookup(ROOT, b"file")[0] != nodeid


def test_a_request_that_is_sent_again_passes_through_the_ledger(side, monkeypatch):
    (side.path / "file").write_bytes(b"content")
    seen = []
    monkeypatch.setattr(side.vfs, "again", seen.append)
    number, body = side.ask(p.Op.LOOKUP, ROOT, b"file\0", flag=1 << 63)
    assert number == 0 and p.ENTRY_OUT.unpack(body)[0] and seen == [2]


def test_no_more_are_answered_at_once_than_was_said(side):
    (side.path / "file").write_bytes(b"content")
    side.lookup(ROOT, b"file")
    for _ in range(5):
        side.send(p.Op.LOOKUP, ROOT, b"file\0")
    assert side.session.serve(3) == 3
    assert side.session.serve(3) == 2
    assert side.session.serve(3) == 0


def test_it_sleeps_for_the_next_request_but_not_for_the_first(side):
    (side.path / "file").write_bytes(b"content")
    far = time.monotonic() + 60
    assert side.session.serve(4, far) == 0  # returns at once
    side.send(p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
    timer = threading.Timer(0.05, lambda: [side.send(p.Op.LOOKUP, ROOT, b"file\0") for _ in range(3)])
    timer.start()
    assert side.session.serve(4, far) == 4
    timer.join()


def test_what_else_comes_ends_its_sleep_and_so_does_the_clock(side):
    ours, theirs = os.pipe()
    try:
        side.send(p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
        timer = threading.Timer(0.05, os.write, (theirs, b"x"))
        timer.start()
        assert side.session.serve(4, time.monotonic() + 60, ours) == 1
        timer.join()
        side.send(p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
        assert side.session.serve(4, time.monotonic() + 60, ours) == 1  # it can still be read
    finally:
        os.close(ours)
        os.close(theirs)
    side.send(p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
    assert side.session.serve(4, time.monotonic() + 0.02) == 1


def test_listings_carry_entries_and_count_them(side):
    for name in ("a", "b"):
        (side.path / name).write_bytes(b"content")
    known = side.lookup(ROOT, b"a")[0]
    fh = side.vfs.opendir(ROOT)
    number, body = side.ask(p.Op.READDIRPLUS, ROOT, p.READ_IN.pack(fh, 0, 4096, 0, 0, 0, 0))
    assert number == 0
    found = {}
    while body:
        entry, (_, _, length, _) = p.ENTRY_OUT.unpack_from(body), p.DIRENT.unpack_from(body, p.ENTRY_OUT.size)
        found[body[p.DIRENT_PLUS_SIZE :][:length]] = entry
        body = body[p.DIRENT_PLUS_SIZE + (length + 7 & ~7) :]
    assert found[b"."][0] == 0 and found[b"a"][0] == known and found[b"b"][0] not in (0, known)
    got, wanted = attributes(found[b"b"], os.stat(side.path / "b"))
    assert got == wanted
    assert side.vfs.ledger.lookups(known) == 2 and side.vfs.ledger.lookups(found[b"b"][0]) == 1
    side.vfs.releasedir(fh)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_listing_tells_lasts_as_long_as_what_a_lookup_tells(request, tmp_path, monkeypatch, form):
    (tmp_path / "tree" / "below").mkdir(parents=True)
    for name in ("a", "late", "both"):
        (tmp_path / "tree" / name).write_bytes(b"content")
        os.utime(tmp_path / "tree" / name, (1, 1))
    os.link(tmp_path / "tree" / "both", tmp_path / "tree" / "second")
    built = request.getfixturevalue("built") if form == "compiled" else None
    side = Side(tmp_path / "side", form, monkeypatch, built, watched=True)
    late = os.stat(tmp_path / "tree" / "late").st_ino
    side.gate.appearance.late[late] = ShownTimes(1, 2, 3), 1e12  # Python says what it shows
    number, body = side.ask(p.Op.READDIRPLUS, ROOT, p.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0))
    told = {name: entry[0][2:4] for _, name, _, _, entry in listed_of(body, True)}
    assert number == 0 and len(told) == 7
    for name in (b"a", b"late", b"both", b"second", b"below"):
        assert told[name] == side.lookup(ROOT, name)[2:4], name
    assert told[b"below"] == (lasting.LONG,) * 2 and told[b"late"] == (lasting.LONG, p.ATTR_SECONDS)
    side.close()


@pytest.mark.parametrize("kind, opened", [("ext4", False), ("xfs", False), ("overlay", True), ("", True)])
def test_directories_are_opened_where_their_offsets_need_it(tmp_path, monkeypatch, kind, opened):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").touch()
    monkeypatch.setattr(kernel, "filesystem_of", lambda device: kind)
    side = Side(tmp_path / "side", "pure", monkeypatch, None)
    number, body = side.ask(p.Op.OPENDIR, ROOT, p.OPEN_IN.pack(0, 0))
    assert number == (0 if opened else errno.ENOSYS)
    fh = p.OPEN_OUT.unpack(body)[0] if opened else 0
    assert bool(fh) == opened == bool(len(side.vfs.dirs))
    number, body = side.ask(p.Op.READDIR, ROOT, p.READ_IN.pack(fh, 0, 4096, 0, 0, 0, 0))
    assert (number, b"file" in body) == (0, True)
    if opened:
        assert side.ask(p.Op.RELEASEDIR, ROOT, p.RELEASE_IN.pack(fh, 0, 0, 0)) == (0, b"")
    # Who goes on with a session in which directories were not opened gets no numbers, on whatever filesystem.
    number, body = side.ask(p.Op.READDIR, ROOT, p.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0))
    assert (number, b"file" in body) == (0, True)
    side.close()


def test_a_reply_that_is_refused_is_told(side, caplog):
    side.send(p.Op.GETATTR, ROOT, p.GETATTR_IN.pack(0, 0, 0))
    side.sock.shutdown(socket.SHUT_RD)
    with caplog.at_level(logging.ERROR, "fuse"):
        side.session.serve(1)
    assert "refused a reply (request 2)" in caplog.text


# --- both, side by side ------------------------------------------------------------------------------------

LONG = b"n" * 35  # the ledger keeps it elsewhere
NAMES = st.sampled_from([LONG, b"a", b"b", b"c", b"d/a", b"d/b", b"d/e/a", b"d", b"d/e"])
NODES = st.integers(0, 12)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["lookup"]), NODES, st.sampled_from([b"a", b"b", b"c", b"d", b"e", LONG])),
    st.tuples(st.sampled_from(["getattr", "open"]), NODES),
    st.tuples(st.just("forget"), NODES, st.integers(1, 3)),
    st.tuples(st.sampled_from(["file", "empty", "dir", "fifo", "symlink", "remove", "chmod"]), NAMES),
    st.tuples(st.sampled_from(["rename", "link"]), NAMES, NAMES),
    st.tuples(st.just("date"), NAMES, st.integers(-(1 << 40), 1 << 60)),
    st.tuples(st.just("shown"), NAMES, st.booleans()),
)


def change(path, action, name, *more):
    """Behind the mount: it need not succeed."""
    where = path / os.fsdecode(name)
    with contextlib.suppress(OSError):
        match action:
            case "file" | "empty":
                # A pipe in that place has no reader, and would be waited for.
                fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK)
                os.write(fd, b"content" if action == "file" else b"")
                os.close(fd)
            case "dir":
                where.mkdir()
            case "fifo":
                os.mkfifo(where)
            case "symlink":
                where.symlink_to("target")
            case "remove":
                where.rmdir() if where.is_dir() and not where.is_symlink() else where.unlink()
            case "chmod":
                where.chmod(0o604 if where.stat().st_mode & 0o40 else 0o640)
            case "rename":
                os.rename(where, path / os.fsdecode(more[0]))
            case "link":
                os.link(where, path / os.fsdecode(more[0]))
            case "date":
                os.utime(where, ns=(more[0], more[0]), follow_symlinks=False)


def shown(sides, path, name, on):
    with contextlib.suppress(OSError):
        ino = os.lstat(path / os.fsdecode(name)).st_ino
        for side in sides:
            side.gate.states.inodes.pop(ino, None)
            side.gate.appearance.moving(ino)
            if on:
                side.gate.states.inodes[ino] = inode = Inode(ino, ROOT, b"")
                inode.shown = ShownTimes(1, 2, 3)


def both(sides, nodes, step):
    """The answers of both to a request."""
    action, which, *more = step
    nodeid = nodes[which % len(nodes)]
    match action:
        case "lookup":
            request = p.Op.LOOKUP, nodeid, more[0] + b"\0"
        case "getattr":
            request = p.Op.GETATTR, nodeid, p.GETATTR_IN.pack(0, 0, 0)
        case "open":
            request = p.Op.GETATTR, nodeid, p.GETATTR_IN.pack(p.GETATTR_FH, 0, 99)
        case _:
            for side in sides:
                side.send(p.Op.FORGET, nodeid, p.U64.pack(more[0]))
                side.session.serve(1)
            return None
    first, second = (side.ask(*request) for side in sides)
    assert first == second, (step, nodeid)
    return p.ENTRY_OUT.unpack(first[1])[0] if action == "lookup" and not first[0] else None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=60))
def test_both_forms_answer_alike_whatever_the_tree(tmp_path_factory, monkeypatch, built, steps):
    base = tmp_path_factory.mktemp("both")
    (base / "tree").mkdir()
    sides = [Side(base / form, form, monkeypatch, built) for form in FORMS]
    nodes = [ROOT]
    try:
        for step in steps:
            if step[0] in ("lookup", "getattr", "open", "forget"):
                found = both(sides, nodes, step)
                if found is not None and found not in nodes:
                    nodes.append(found)
            elif step[0] == "shown":
                shown(sides, base / "tree", *step[1:])
            else:
                change(base / "tree", *step)
            assert sides[0].table() == sides[1].table(), step
    finally:
        for side in sides:
            side.gate.states.inodes.clear()
            side.close()


# --- which form is used ------------------------------------------------------------------------------------


class FakeModule:
    SOURCES = "others"


def test_what_was_built_from_other_sources_is_not_used(monkeypatch, caplog, tmp_path):
    monkeypatch.delenv(compiled.PURE, raising=False)
    monkeypatch.setattr(compiled.importlib, "import_module", lambda name: FakeModule)
    module, why = compiled.find()
    assert module is None and "make setup" in why
    with caplog.at_level(logging.WARNING, "fuse"), open(tmp_path / "f", "w+b") as file:
        assert isinstance(hot.receiver(file.fileno(), bytearray(1), None, print, print), hot.Pure)
    assert len(caplog.records) == 1 and "make setup" in caplog.text


def test_what_was_built_from_these_sources_is_used_unless_pure_is_wanted(monkeypatch, built):
    monkeypatch.delenv(compiled.PURE, raising=False)
    monkeypatch.setattr(compiled.importlib, "import_module", lambda name: built)
    assert compiled.find() == (built, "")
    monkeypatch.setenv(compiled.PURE, "1")
    assert compiled.find() == (None, "")


def test_without_a_compiled_part_nothing_is_said(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.delenv(compiled.PURE, raising=False)
    monkeypatch.setattr(compiled.importlib, "import_module", missing)
    assert compiled.find() == (None, "")


def test_every_source_counts(tmp_path):
    for name in compiled.SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    seen = {compiled.fingerprint(str(tmp_path))}
    for name in compiled.SOURCES:
        (tmp_path / name).write_text("y")
        seen.add(compiled.fingerprint(str(tmp_path)))
    assert len(seen) == len(compiled.SOURCES) + 1


def refused(_number):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("op", [p.Op.SETXATTR, p.Op.REMOVEXATTR])
def test_an_attribute_is_marked_if_it_changes_whatever_becomes_of_the_registration(side, monkeypatch, op):
    """The registration of a closed file ends with it, which the kernel may refuse."""
    path = side.path / "a"
    path.write_bytes(b"content")
    os.setxattr(path, "user.x", b"old")
    node = side.lookup(ROOT, b"a")[0]
    number, body = side.ask(p.Op.OPEN, node, p.OPEN_IN.pack(os.O_RDONLY, 0))
    fh = p.OPEN_OUT.unpack(body)[0]
    assert number == 0 and side.ask(p.Op.RELEASE, node, p.RELEASE_IN.pack(fh, 0, 0, 0)) == (0, b"")
    assert side.backing.live
    monkeypatch.setattr(side.backing, "close", refused)
    how = p.SETXATTR_IN.pack(3, 0, 0, 0) if op == p.Op.SETXATTR else b""
    value = b"new" if op == p.Op.SETXATTR else b""
    assert side.ask(op, node, how + b"user.x\0" + value) == (errno.EIO, b"")
    changed = "user.x" not in os.listxattr(path) or os.getxattr(path, "user.x") != b"old"
    marked = [entry.kind for entry in MarkReader(side._marks_fd, 0).read()].count(Mark.ATTR)
    assert marked == int(changed)


def test_directories_stay_in_the_order_of_their_use(side):
    """However many requests are answered at once: one that is in use must not be the next to be closed."""
    used = []
    for name in ("a", "b", "c"):
        (side.path / name / "sub").mkdir(parents=True)
        used.append(side.lookup(ROOT, os.fsencode(name))[0])
    first = used[0]
    for asked in ([0, 1, 0, 1], [0, 0, 1, 1, 2], [2, 2, 0], [1, 2], [2]):
        nodes = sorted(used)
        for each in asked:
            side.send(p.Op.LOOKUP, nodes[each], b"sub\0")
            used = [node for node in used if node != nodes[each]] + [nodes[each]]
        assert side.session.serve(len(asked)) == len(asked)
        for _ in asked:
            side.sock.recv(1 << 16)
        opened = list(side.vfs.nodes._dirs)
        assert opened == used[-len(opened) :]
        side.vfs.nodes.dirfd(side.vfs.nodes.get(first))  # as others do, in Python
        used = [node for node in used if node != first] + [first]
