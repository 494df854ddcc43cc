"""The namespace journal: what it tells is what is there, whatever was done, and it costs what has changed."""

from __future__ import annotations

import calendar
import contextlib
import errno
import os
import stat
import tempfile
import time
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journals import ROOT, VOLUME, Journalled, as_told
from tierfsd.journalling import JournalKeeper

from tierfs import journal as journal_module
from tierfs import looking, manifest, namespace
from tierfs import snapshots as snapshots_module
from tierfs.errors import ObjectArchivedError, ObjectCorruptError, StoreUnavailableError, VolumeError
from tierfs.namespace import Chronicle
from tierfs.store.faults import Fault, FaultyStore, Kind
from tierfs.store.memory import MemoryStore


@pytest.fixture
def home(tmp_path):
    made = Journalled(tmp_path)
    yield made
    made.close()


@pytest.fixture
def begun(home):
    home.snapshots.take()
    return home


def test_every_kind_of_thing_is_told(begun):
    begun.mkdir("dir", 0o2750)
    begun.write("dir/file", b"some bytes", 0o4711)
    begun.run("link", begun.node("dir/file"), *begun.above("other name"))
    begun.run("symlink", *begun.above("dir/link"), b"../\xff not text", ROOT)
    begun.run("mknod", *begun.above("pipe"), stat.S_IFIFO | 0o600, 0, ROOT)
    begun.run("mknod", *begun.above("device"), stat.S_IFCHR | 0o600, os.makedev(1, 3), ROOT)
    begun.write(b"\xfe\xff".decode(errors="surrogateescape"), b"a name that is no text")
    begun.run("setattr", begun.node("dir/file"), uid=12, gid=34, mtime_ns=-5_000_000_001)
    begun.run("setxattr", begun.node("dir"), b"user.colour", b"\0\xff")
    begun.run("setattr", begun.node("dir/link"), uid=7)
    begun.run("setattr", begun.node("pipe"), mode=0o640)
    begun.journal.flush()
    assert begun.told() == begun.there()
    assert begun.read_journal().find(b"device").rdev == os.makedev(1, 3)


@pytest.mark.parametrize("by_handle", [errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("by_name", [0, errno.ENFILE, errno.EIO])
def test_no_directory_is_left_out_of_a_snapshot_unnoticed(begun, monkeypatch, by_handle, by_name):
    """By its handle what cannot be read is gone to the kernel; a restore would lack what is in it."""
    begun.mkdir("dir")
    begun.write("dir/file", b"some bytes")
    begun.journal.flush()
    tree, before = begun.volume.tree, begun.there()
    usual, opened = os.open, tree.open_handle

    def refuse_handle(handle, flags):
        if handle == tree.handle_at(tree.rootfd, b"dir"):
            raise OSError(by_handle, os.strerror(by_handle))
        return opened(handle, flags)

    def refuse(path, flags, *more, **named):
        if by_name and path == b"dir" and flags & os.O_DIRECTORY:
            raise OSError(by_name, os.strerror(by_name))
        return usual(path, flags, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(tree, "open_handle", refuse_handle)
        patch.setattr(os, "open", refuse)
        if errno.EMFILE in (by_handle, by_name) or by_name == errno.ENFILE:
            with pytest.raises(OSError, match=r"[Tt]oo many open files"):
                begun.snapshots.take()
        else:
            assert begun.snapshots.take()
    told = [trouble.what for trouble in begun.volume.tier.kit.troubles.list()]
    noticed = (by_handle, by_name) == (errno.ESTALE, errno.EIO)
    assert any("'dir' cannot be read" in what for what in told) == noticed
    assert begun.snapshots.take() and begun.told() == before


def test_a_directory_that_may_not_be_searched_holds_up_nothing_and_is_told_when_it_may(begun, monkeypatch):
    """As of mode 0600, to a daemon that is not root's; `chmod -R 600` makes many."""
    begun.mkdir("dir")
    begun.write("dir/file", b"some bytes")
    place, usual = os.stat(begun.volume.path("dir")).st_ino, os.open

    def refuse(name, flags, *more, dir_fd=None, **named):
        if dir_fd is not None and os.fstat(dir_fd).st_ino == place and name not in (b"..", ".."):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return usual(name, flags, *more, dir_fd=dir_fd, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        begun.write("other", b"other bytes")
        begun.journal.flush()
        assert {b"dir", b"other"} <= set(begun.told()) and b"dir/file" not in begun.told()
        assert not begun.volume.index.notes() and not begun.snapshots.due
        assert begun.snapshots.take()
        begun.write("third", b"other bytes")
        begun.journal.flush()
        assert not begun.snapshots.due
        assert "may not be searched" in begun.volume.tier.kit.troubles.list()[-1].what
    begun.write("fourth", b"other bytes")
    begun.journal.flush()
    assert begun.snapshots.due and begun.snapshots.take()
    assert begun.told() == begun.there()


def test_a_snapshot_tells_the_same_as_the_segments(begun):
    begun.mkdir("a")
    begun.mkdir("a/b")
    begun.write("a/b/c", b"1")
    begun.journal.flush()
    before = begun.told()
    begun.snapshots.take()
    for key in [info.key for info in begun.volume.store.list("meta/") if ".segment." in info.key]:
        begun.volume.store.delete([key])
    assert begun.told() == before == begun.there()


def test_a_copy_is_told_with_all_that_finds_it(begun):
    begun.write("f", b"x" * 5000)
    begun.journal.flush()
    file = begun.read_journal().find(b"f")
    assert file.dirty and file.since and file.copy is None
    assert begun.volume.demote("f")[0].demoted
    begun.journal.flush()
    file = begun.read_journal().find(b"f")
    record = begun.volume.record("f")
    assert not file.dirty and not file.since
    assert file.copy.copy() == journal_copy(record) and bytes.fromhex(file.fid) == record.fid
    begun.volume.server.write(begun.volume.path("f"), b"new")
    begun.journal.flush()
    file = begun.read_journal().find(b"f")
    assert file.dirty and file.since, "its older copy is told beside"
    assert file.copy.copy() == journal_copy(record)


def journal_copy(record):
    return manifest.CopyLine.of(record.copy).copy()


def test_times_that_our_own_work_moves_are_not_told(begun):
    """In the midst of a punch or a fetch: the shown ones are told, and it is looked at again."""
    begun.write("f", b"x" * 5000)
    begun.run("setattr", begun.node("f"), mtime_ns=1_000_000_007)
    assert begun.volume.demote("f")[0].demoted
    begun.journal.flush()
    index, path = begun.volume.index, begun.volume.path("f")
    record = begun.volume.record("f")
    index.commit(lambda w: (w.put_pending(record.ino), w.note(record.ino))).result()
    os.utime(path, ns=(0, 99))
    begun.journal.flush()
    assert begun.read_journal().find(b"f").mtime == 1_000_000_007
    assert begun.read_journal().find(b"f").ctime == record.copy.ctime
    assert index.note_count() == 1, "it is looked at again"
    begun.snapshots.take()
    assert begun.read_journal().find(b"f").mtime == 1_000_000_007
    assert index.note_count() == 1
    os.utime(path, ns=(0, 1_000_000_007))
    index.commit(lambda w: w.drop_pending(record.ino)).result()
    begun.journal.flush()
    assert index.note_count() == 0
    assert begun.told() == begun.there()


def test_holes_are_told(begun):
    path = begun.volume.path("sparse")
    begun.write("sparse", b"a" * 4096)
    os.truncate(path, 1 << 20)
    begun.volume.server.write(path, b"end", (1 << 20) - 3)
    assert begun.volume.demote("sparse")[0].demoted
    begun.journal.flush()
    extents = begun.read_journal().find(b"sparse").extents
    assert extents[0] == (0, 4096) and extents[-1][1] == 1 << 20 and len(extents) == 2


def test_a_change_costs_what_has_changed_not_what_there_is(tmp_path):
    home = Journalled(tmp_path)
    try:
        for number in range(20):
            os.mkdir(home.volume.path(f"d{number}"))
            for name in range(1000):
                os.mknod(home.volume.path(f"d{number}/{name}"))
        home.snapshots.take()
        before = home.bytes_written()
        home.write("d7/new", b"x")
        home.run("unlink", *home.above("d3/5"))
        assert home.journal.flush()
        assert home.bytes_written() - before < 2000
        assert not home.snapshots.due, "and no new snapshot for it"
        assert not home.journal.flush(), "nothing has changed: nothing is written"
    finally:
        home.close()


NAMES = st.sampled_from(["a", "b", "c", "d/a", "d/b", "e/a", "e/f/a", "d", "e", "e/f"])
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["write", "mkdir", "rename", "exchange", "unlink", "rmdir", "link", "symlink", "chmod", "flush",
             "snapshot", "demote", "restart", "crash", "times", "xattr"]
        ),
        NAMES,
        NAMES,
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(OPERATIONS)
def test_whatever_is_done_the_journal_tells_what_is_there(operations):
    with tempfile.TemporaryDirectory(prefix="tierfs-journal-") as base:
        home = Journalled(base)
        try:
            home.snapshots.take()
            for action, one, two in operations:
                with contextlib.suppress(OSError):
                    act(home, action, one, two)
            if home.snapshots.due:
                home.snapshots.take()
            while home.journal.flush():
                pass
            assert home.told() == home.there()
        finally:
            home.close()


def act(home, action, one, two):
    match action:
        case "write":
            home.write(one, two.encode())
        case "mkdir":
            home.mkdir(one)
        case "rename":
            home.run("rename", *home.above(one), *home.above(two))
        case "exchange":
            home.run("rename", *home.above(one), *home.above(two), 2)
        case "unlink" | "rmdir":
            home.run(action, *home.above(one))
        case "link":
            home.run("link", home.node(one), *home.above(two))
        case "symlink":
            home.run("symlink", *home.above(one), two.encode(), ROOT)
        case "chmod":
            home.run("setattr", home.node(one), mode=0o700 + len(two))
        case "times":
            home.run("setattr", home.node(one), mtime_ns=len(two))
        case "xattr":
            home.run("setxattr", home.node(one), b"user.x", two.encode())
        case "flush":
            home.journal.flush()
        case "snapshot":
            home.snapshots.take()
        case "demote":
            home.volume.demote(one)
        case "restart":
            home.restart()
        case "crash":
            home.restart(clean=False)


def test_after_a_session_that_ended_without_order_the_tree_is_walked(begun):
    assert not begun.snapshots.due
    begun.restart()
    assert not begun.snapshots.due
    begun.restart(clean=False)
    begun.write("while it is not yet walked", b"x")
    os.mkdir(begun.volume.path("made behind the mount"))
    assert begun.snapshots.due
    begun.snapshots.take()
    assert not begun.snapshots.due
    assert begun.told() == begun.there()


def test_a_directory_that_is_being_renamed_is_waited_for_however_many_names_in_it_have_changed(
    begun, monkeypatch
):
    begun.mkdir("d")
    begun.mkdir("removed")
    for number in range(3 * journal_module._PATIENCE):
        begun.write(f"d/{number}", b"x")
        begun.write(f"removed/{number}", b"x")
    root, opened = begun.volume.tree.root_ino, begun.journal._open_directory
    with monkeypatch.context() as patched:
        patched.setattr(begun.journal, "_open_directory", lambda ino: opened(ino) if ino == root else -1)
        begun.journal.flush()
    assert not begun.journal.lost_track and len(begun.journal._nowhere) == 2
    for number in range(3 * journal_module._PATIENCE):
        begun.run("unlink", *begun.above(f"removed/{number}"))
    begun.run("rmdir", *begun.above("removed"))
    begun.journal.flush()
    assert not begun.journal.lost_track and not begun.journal._nowhere
    assert begun.told() == begun.there()


def test_for_a_directory_that_stays_away_the_tree_is_walked(begun):
    """Moved behind the mount; with it, not one note is kept for ever."""
    begun.mkdir("d")
    begun.write("d/file", b"x")
    begun.volume.tier.drain()
    os.rename(begun.volume.path("d"), begun.volume.path("moved"))
    for _ in range(journal_module._PATIENCE):
        begun.journal.flush()
        assert not begun.journal.lost_track
    begun.journal.flush()
    assert begun.journal.lost_track and begun.snapshots.due and not begun.journal._nowhere
    begun.snapshots.take()
    assert not begun.snapshots.due and begun.told() == begun.there()


def test_until_there_is_a_snapshot_the_store_is_behind(begun):
    """Segments alone tell of no file that was there before: nobody may believe that all is in the store."""
    begun.restart(clean=False)
    keeper = JournalKeeper(begun.volume.tier, VOLUME, lambda _alive: None)
    walk, seen = keeper.snapshots._walk, []

    def watched():
        for line in walk():
            seen.append((keeper.snapshots.due, keeper.behind > 0))
            yield line

    keeper.snapshots._walk = watched
    assert keeper.behind > 0
    keeper._work(False)
    assert seen and set(seen) == {(True, True)}
    assert keeper.behind == 0 and not keeper.snapshots.due


def test_after_the_store_was_another_machines_the_tree_is_walked(begun):
    index, epoch = begun.volume.index, begun.volume.session.epoch
    index.end_session()
    index.begin_session("boot", epoch)
    assert not begun.snapshots.due
    index.end_session()
    index.begin_session("boot", epoch + 7)
    assert begun.snapshots.due


def test_what_changes_during_a_snapshot_is_not_lost(begun):
    """A directory moves from where the walk has not been to where it has, and its files with it."""
    begun.mkdir("a")
    begun.mkdir("b")
    for number in range(5):
        begun.mkdir(f"a/d{number}")
        begun.write(f"a/d{number}/f", b"x")
    walk = begun.snapshots._walk()
    seen = []
    begun.snapshots._walk = lambda: disturbed(walk)

    def disturbed(lines):
        for line in lines:
            seen.append(line)
            if len(seen) == 4:
                for number in range(5):
                    begun.run("rename", *begun.above(f"a/d{number}"), *begun.above(f"b/d{number}"))
                begun.run("rmdir", *begun.above("a"))
            yield line

    assert begun.snapshots.take()
    assert begun.told() == begun.there()


def test_notes_outlive_an_outage_and_are_bounded(tmp_path, monkeypatch):
    faults = FaultyStore(MemoryStore())
    home = Journalled(tmp_path, faults)
    try:
        home.snapshots.take()
        store_is_down(faults, True)
        for number in range(50):
            home.write(f"f{number}", b"x")
        with pytest.raises(StoreUnavailableError):
            home.journal.flush()
        assert home.journal.behind > 0
        home.restart()
        store_is_down(faults, False)
        assert home.journal.flush()
        assert home.journal.behind == 0
        assert home.told() == home.there()

        monkeypatch.setattr(journal_module, "MOST_NOTES", 20)
        store_is_down(faults, True)
        for number in range(50):
            home.run("unlink", *home.above(f"f{number}"))
        home.volume.tier.drain()
        home.journal.trim()
        assert home.volume.index.note_count() == 0 and home.snapshots.due
        store_is_down(faults, False)
        home.snapshots.take()
        assert home.told() == home.there()
    finally:
        home.close()


def store_is_down(faults, on):
    faults.disarm()
    if on:
        faults.arm(Fault(Kind.ERROR, times=float("inf")))


def test_a_rename_under_way_is_not_missed(begun):
    """Between the look at the old name and the end of the segment the file moves on."""
    begun.write("x", b"1")
    begun.journal.flush()
    begun.run("setattr", begun.node("x"), mode=0o600)
    look, moved = begun.journal._look_at, []

    def disturbed(segment, notes, final):
        if not moved:
            moved.append(True)
            begun.run("rename", *begun.above("x"), *begun.above("y"))
        look(segment, notes, final)

    begun.journal._look_at = disturbed
    begun.journal.flush()
    assert b"y" in begun.told()
    begun.journal.flush()
    assert begun.told() == begun.there()


# --- reading -----------------------------------------------------------------------------------------------


def segments(home):
    return sorted(info.key for info in home.volume.store.list("meta/") if ".segment." in info.key)


def many_segments(home, count=4):
    for number in range(count):
        home.write(f"f{number}", b"x")
        home.journal.flush()


def test_a_missing_segment_is_noticed_and_the_later_ones_count(begun):
    many_segments(begun)
    begun.volume.store.delete([segments(begun)[1]])
    journal = Chronicle(begun.volume.store)
    names = {path for path, _ in journal.read().walk()}
    assert names == {b"", b"f0", b"f2", b"f3"}
    assert journal.missing == 1 and "segment 2" in journal.troubles[-1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "renamed"])
def test_a_damaged_segment_is_passed_over(begun, damage):
    many_segments(begun)
    store, key = begun.volume.store, segments(begun)[2]
    raw = store.get(key)
    if damage == "foreign":
        opened = manifest.unpack(manifest.Key.parse(key), raw)
        head = {name: getattr(opened.head, name) for name in opened.head.__struct_fields__}
        raw = manifest.Packer(manifest.Head(**{**head, "volume": "cd" * 16})).finish(0)
    elif damage == "renamed":
        raw = store.get(segments(begun)[0])
    else:
        middle = len(raw) // 2
        flipped = raw[:middle] + bytes([raw[middle] ^ 4]) + raw[middle + 1 :]
        raw = {"cut": raw[:-40], "empty": b"", "flipped": flipped}[damage]
    store.put(key, raw, len(raw))
    journal = Chronicle(store)
    assert {path for path, _ in journal.read().walk()} == {b"", b"f0", b"f1", b"f3"}
    assert journal.troubles and journal.missing == 1


def test_a_broken_snapshot_gives_way_to_the_one_before(begun, monkeypatch):
    many_segments(begun)
    begun.snapshots.take()
    begun.write("last", b"x")
    begun.journal.flush()
    newest = sorted(info.key for info in begun.volume.store.list("meta/") if ".snapshot" in info.key)[-1]
    begun.volume.store.delete([newest])
    assert begun.told() == begun.there()


def test_a_snapshot_without_its_end_is_none(begun):
    many_segments(begun)
    lines = list(begun.snapshots._walk())
    begun.snapshots._walk = lambda: (begun.stopping.set() or line for line in lines)
    assert not begun.snapshots.take()
    assert begun.told() == begun.there()


def test_a_tree_of_the_past(begun):
    begun.write("f", b"x")
    begun.journal.flush()
    then = time.time_ns()
    begun.run("rename", *begun.above("f"), *begun.above("g"))
    begun.journal.flush()
    begun.snapshots.take()
    assert set(begun.told()) == {b"", b"g"}
    assert {path for path, _ in begun.read_journal(then).walk()} == {b"", b"f"}


def test_two_attempts_at_one_segment(begun):
    """Killed between the store and the index: the second attempt is the one that counts."""
    begun.write("f", b"x")
    begun.journal.flush()
    commit = begun.volume.index.commit
    begun.write("g", b"x")
    begun.volume.tier.drain()
    begun.volume.index.commit = lambda run: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        begun.journal.flush()
    begun.volume.index.commit = commit
    assert len(segments(begun)) == 2
    begun.run("unlink", *begun.above("g"))
    begun.journal.flush()
    assert len(segments(begun)) == 3
    assert begun.told() == begun.there()
    begun.write("h", b"x")
    begun.journal.flush()
    assert begun.told() == begun.there()


@pytest.mark.parametrize("first", [0, 255])
def test_of_two_snapshots_from_one_place_the_later_one_counts(begun, monkeypatch, first):
    """The first lacks what could not be read just then; their names tell nothing of which it is."""
    begun.mkdir("dir")
    begun.write("dir/file", b"x")
    begun.journal.flush()
    for number in (first, 255 - first):
        with monkeypatch.context() as patch:
            patch.setattr(os, "urandom", lambda count, number=number: bytes([number]) * count)
            if number == first:
                patch.setattr(snapshots_module.Snapshots, "_child", without(b"dir"))
            assert begun.snapshots.take()
    assert begun.told() == begun.there()


def without(left_out, usual=snapshots_module.Snapshots._child):
    def child(self, dirfd, ident, name):
        return None if name == left_out else usual(self, dirfd, ident, name)

    return child


def test_no_journal_is_said_clearly():
    with pytest.raises(VolumeError, match="no whole snapshot"):
        Chronicle(MemoryStore()).read()


@settings(max_examples=50)
@given(st.binary(min_size=1, max_size=255))
def test_any_name_survives(name):
    told = manifest.text(name)
    assert manifest.raw(told) == name
    assert (namespace.name_of(told) == name) == (name not in (b".", b"..") and not set(name) & {0, 47})


@pytest.mark.parametrize("how", ["segment", "snapshot"])
def test_nothing_is_written_that_a_reader_would_refuse_for_its_size(begun, monkeypatch, how):
    """As by a user with very many attributes: a restore would lack all that is in the same object."""
    monkeypatch.setattr(manifest, "_MOST_BYTES", 40_000)
    monkeypatch.setattr(manifest, "MOST_RAW", 20_000, raising=False)
    for number in range(100):
        begun.write(f"file{number}")
        begun.run("setxattr", begun.node(f"file{number}"), b"user.much", b"\0" * 1000)
    if how == "snapshot":
        begun.journal._give_up("this is a test")
        begun.snapshots.take()
    begun.journal.flush()
    assert not begun.volume.index.notes()
    assert not Chronicle(begun.volume.store).troubles and begun.told() == begun.there()


def test_attributes_that_would_make_a_line_too_long_are_left_out(begun, monkeypatch):
    begun.write("file", b"some bytes")
    begun.run("setxattr", begun.node("file"), b"user.colour", b"blue")
    names, value = [f"user.{number}" for number in range(300)], bytes(1 << 16)
    real_names, real_value = os.listxattr, os.getxattr
    with monkeypatch.context() as patch:
        patch.setattr(os, "listxattr", lambda path: real_names(path) + names)
        patch.setattr(os, "getxattr", lambda path, name: value if name in names else real_value(path, name))
        begun.journal.flush()
    told = begun.read_journal().find(b"file")
    assert begun.told()[b"file"][0] == "file" and 0 < len(told.xattrs) < len(names)
    assert "attributes" in begun.volume.tier.kit.troubles.list()[-1].what


@pytest.mark.parametrize("former", [False, True])
@pytest.mark.parametrize("year", [1905, 2150, 2400])
@pytest.mark.parametrize("how", ["segment", "snapshot"])
def test_whatever_time_a_file_has_all_can_be_restored(begun, monkeypatch, former, year, how):
    """`touch -d 2150-01-01` by anybody: one line that no reader took kept all others from being restored."""
    when = calendar.timegm((year, 1, 1, 0, 0, 0)) * 10**9
    for name in ("before", "odd", "after"):
        begun.write(name, b"some bytes")
    begun.run("setattr", begun.node("odd"), mtime_ns=when)
    if former:
        monkeypatch.setattr(looking, "clamped", lambda value: value)
    (begun.snapshots.take if how == "snapshot" else begun.journal.flush)()
    told = begun.read_journal()
    assert set(begun.told()) == set(begun.there()) and not Chronicle(begun.volume.store).troubles
    assert told.find(b"odd").mtime == min(when, (1 << 63) - 1)


def test_a_line_that_makes_no_sense_is_left_out_and_named(begun):
    begun.write("before", b"some bytes")
    begun.journal.flush()
    line = manifest.Gone("no such directory", "")  # a name has a byte at least
    packed = manifest.Packer.finish

    def finish(packer, at, **more):
        packer.add(line)
        packer.add(line)
        return packed(packer, at, **more)

    begun.write("after", b"some bytes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest.Packer, "finish", finish)
        begun.journal.flush()
    chronicle = Chronicle(begun.volume.store)
    assert as_told(chronicle.read()) == begun.there()
    assert len(chronicle.troubles) == 1 and "2 of its lines make no sense" in chronicle.troubles[0]


def test_what_unpacks_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(manifest, "_MOST_BYTES", 1 << 20)
    import zstandard

    with pytest.raises(ObjectCorruptError, match="unpacks"):
        manifest.unpack(manifest.Key(1, 1, "ab" * 8), zstandard.compress(bytes(8 << 20)))


def test_a_journal_that_somebody_removed_is_written_anew(begun):
    many_segments(begun)
    store = begun.volume.store
    assert not begun.snapshots.is_lost()
    store.delete([segments(begun)[2]])
    assert begun.snapshots.is_lost()
    begun.snapshots.take()
    assert not begun.snapshots.is_lost()
    begun.write("another", b"x")
    begun.journal.flush()
    assert not begun.snapshots.is_lost()
    store.delete([info.key for info in store.list("meta/")])
    assert begun.snapshots.is_lost()
    begun.snapshots.take()
    assert not begun.snapshots.is_lost()
    assert begun.told() == begun.there()


@pytest.mark.parametrize("whose", ["store", "machine"])
def test_one_clock_that_jumps_makes_no_snapshot_old(begun, monkeypatch, whose):
    """A NAS that lost its clock dates one object years ahead: the past is kept all the same."""
    for number in range(4):
        begun.write(f"f{number}", b"x")
        begun.snapshots.take()
    store = begun.volume.store
    before = {info.key for info in store.list("meta/")}
    ahead = 40 * 86400
    if whose == "store":
        dated = list(store.list("meta/"))
        dated[-1] = replace(dated[-1], modified=dated[-1].modified + ahead)
        monkeypatch.setattr(store, "list", lambda prefix: iter(dated))
    else:
        monkeypatch.setattr(snapshots_module, "time", SimpleNamespace(time=lambda: time.time() + ahead))
    assert begun.snapshots.prune() == 0
    monkeypatch.undo()
    assert {info.key for info in store.list("meta/")} == before


def test_a_journal_in_an_archive_is_begun_anew_and_is_in_nobodys_way(begun, monkeypatch):
    """A rule of the bucket moves all that is old, and not only content."""
    store, get = begun.volume.store, begun.volume.store.get
    many_segments(begun, 1)
    begun.snapshots.take()
    archived = {info.key for info in store.list("meta/")}
    assert not begun.snapshots.is_lost()

    def read(key, start=0, length=None):
        if key in archived:
            raise ObjectArchivedError(f"{key}: the provider has archived it")
        return get(key, start, length)

    monkeypatch.setattr(store, "get", read)
    assert begun.snapshots.is_lost()
    for _ in range(3):
        begun.run("unlink", *begun.above("f0"))
        many_segments(begun, 1)
        begun.snapshots.take()
    kit = begun.volume.tier.kit
    kit.config = msgspec.structs.replace(kit.config, keep_versions=0.0, grace=0.0)
    assert begun.snapshots.prune() > 0
    assert not archived & {info.key for info in store.list("meta/")}
    assert begun.told() == begun.there()


def test_old_snapshots_go(begun):
    for number in range(4):
        many_segments(begun, 1)
        begun.run("unlink", *begun.above("f0"))
        begun.snapshots.take()
        if number == 1:
            assert begun.snapshots.prune() == 0, "nothing is old"
    before = time.time_ns()
    kit = begun.volume.tier.kit
    kit.config = msgspec.structs.replace(kit.config, keep_versions=0.0, grace=0.0)
    assert begun.snapshots.prune() > 0
    whole = [info.key for info in begun.volume.store.list("meta/") if ".snapshot" in info.key]
    assert len(whole) == 2
    assert begun.told() == begun.there()
    assert as_told(begun.read_journal(before)) == begun.there()
