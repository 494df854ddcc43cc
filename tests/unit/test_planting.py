"""A journal is data from the store: whatever it says, nothing outside of the new tree is touched."""

from __future__ import annotations

import base64
import os
import stat
import tempfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierfs import manifest, restoring
from tierfs.errors import PathError, VolumeError
from tierfs.index import Index
from tierfs.namespace import Tree as Namespace
from tierfs.planting import Planter, run_on
from tierfs.tree import open_tree

EPOCH = 3
COPY_REST = "ab" * 8, "cd" * 32, 5000, 7, 8, 22
COPY = manifest.CopyLine((2 << 28) + 5, *COPY_REST)
COMMON = {"mode": 0o640, "uid": os.geteuid(), "gid": os.getegid(), "mtime": 11, "ctime": 12}
FID = "ef" * 16


def root(**more):
    return manifest.Directory("root", **{**COMMON, "mode": 0o755, **more}, root=True)


def file(ident, name, directory="root", **more):
    known = {"size": 5000, "fid": FID, "generation": COPY.generation, "copy": COPY, **COMMON, **more}
    return manifest.File(ident, dir=directory, name=name, **known)


def directory(ident, name, above="root", **more):
    return manifest.Directory(ident, **{**COMMON, **more}, dir=above, name=name)


def plant(base, lines, special=True, names=None, epoch=EPOCH):
    """(outcome, what was kept) of a tree made at base/tree."""
    names = names or Namespace()
    for line in lines:
        names.apply(line)
    (Path(base) / "tree").mkdir()
    tree = open_tree(str(Path(base) / "tree"))
    try:
        planter = Planter(tree, names, epoch, special)
        kept = []
        places = planter.directories()
        for place in places:
            planter.fill(place, kept.append)
        planter.link(places, kept.append)
        planter.finish(places)
        return planter.outcome, kept
    finally:
        tree.close()


def listing(path):
    """Everything below a path, with what could be changed by mistake."""
    found = {}
    for at, directories, names in os.walk(path):
        for name in [*directories, *names, "."]:
            full = os.path.join(at, name)
            st_ = os.lstat(full)
            content = b""
            if stat.S_ISREG(st_.st_mode):
                with open(full, "rb") as file:
                    content = file.read(65536)  # a planted stub may be a hole of a tebibyte
            found[full] = (st_.st_mode, st_.st_uid, st_.st_mtime_ns, st_.st_size, st_.st_nlink, content)
    return found


def test_of_a_part_nothing_else_is_made_not_even_of_a_journal_that_lies(tmp_path):
    names = Namespace()
    for line in (
        root(),
        directory("docs", "docs", mode=0o750),
        directory("below", "below", above="docs"),
        directory("docs", "itself", above="below", mode=0o750),
        directory("beside", "beside"),
        file("1", "note", "below"),
        file("2", "both", "docs", fid="aa" * 16),
        file("2", "outside", "beside", fid="aa" * 16),
        file("3", "elsewhere", fid="bb" * 16),
    ):
        names.apply(line)
    for path in (b"docs/below/note", b"nowhere", b"docs/..", b"docs//below"):
        with pytest.raises(PathError):
            names.beneath(path)
    part = names.beneath(b"docs")
    assert set(part.inodes) == {"docs", "below", "1", "2"}
    outcome, _ = plant(tmp_path, [], names=part)
    made = {os.path.relpath(path, tmp_path / "tree") for path in listing(tmp_path / "tree")}
    assert made == {".", "both", "below", "below/note"}
    assert (outcome.files, outcome.directories) == (2, 2)
    assert [path for path, _ in outcome.refused] == [b"below/itself"]
    assert stat.S_IMODE(os.stat(tmp_path / "tree").st_mode) == 0o750


@pytest.mark.parametrize("batch", [1, 10])
def test_of_two_files_that_say_to_be_one_the_first_is_known(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(restoring, "_BATCH", batch)
    lines = [root(), *(file(name, name, pinned=True) for name in "ab"), file("c", "c", fid="aa" * 16)]
    _, kept = plant(tmp_path, lines)
    index = Index.open(str(tmp_path / "index"))
    (tmp_path / "marks").mkdir()
    try:
        keeper = restoring._Keeper(index, SimpleNamespace(path=lambda name: str(tmp_path / name)))
        for planted in kept:
            keeper.keep(planted)
        keeper.close()
        assert {record.name for record in index.records()} == {b"a", b"c"}
        assert [name for _, _, name, _ in keeper._pins] == [b"a"]
    finally:
        index.close()


def test_a_tree_keeps_few_bytes_of_each_file():
    """Lines as they are used would take two kilobytes."""
    names, copies = Namespace(), [msgspec.structs.replace(COPY, tag=f"{number:016}") for number in range(2000)]
    tracemalloc.start()
    names.apply(root())
    for number, copy in enumerate(copies):
        names.apply(file(f"{number:024}", f"a file, the {number}th", fid=f"{number:032}", copy=copy))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 700 * len(copies)
    found = names.find(b"a file, the 7th")
    assert found == file(f"{7:024}", "", "", fid=f"{7:032}", copy=copies[7])
    assert names.inodes["root"] == root() and len(names.inodes) == len(list(names.walk())) == 1 + len(copies)
    del names.inodes["root"]
    assert "root" not in names.inodes and names.find(b"nothing") is None


def test_generations_that_have_run_on_into_later_epochs_are_restored(tmp_path):
    """Of a machine that had given more in one session than an epoch has."""
    late, lies = (manifest.CopyLine((EPOCH + n << 28) + 5, *COPY_REST) for n in (2, 100_000))
    names = Namespace()
    for line in (
        root(),
        file("1", "late", copy=late, generation=late.generation),
        file("2", "lies", copy=lies, generation=lies.generation, fid="aa" * 16),
    ):
        names.apply(line)
    assert run_on(Namespace(), EPOCH) == EPOCH
    assert run_on(names, EPOCH) == EPOCH + 2
    outcome, _ = plant(tmp_path, [], names=names, epoch=EPOCH + 2)
    assert [path for path, _ in outcome.refused] == [b"lies"]


NAMES = st.one_of(
    st.sampled_from(
        ["..", ".", "", "/etc", "a/b", "../outside/file", "a", "b", "c", "\0", "\0Li4=", "\0Lw==", "\0%%",
         "x" * 256, "\0" + base64.b64encode(b"a\0b").decode(), "ü" * 128]
    ),
    st.text(max_size=8),
)  # fmt: skip
IDS = st.sampled_from(["root", "one", "two", "three", "four"])
MODES = st.integers(0, 0o7777)
XATTRS = st.dictionaries(
    st.sampled_from(["user.a", "trusted.tierfs", "trusted.tierfs_pin", "user.tierfs.pin", "security.capability",
                     "nonsense", "user." + "x" * 300, "\0\xff", "system.posix_acl_access"]),
    st.sampled_from(["", "AAAA", "no base64!", base64.b64encode(bytes(70_000)).decode()]),
    max_size=2,
)  # fmt: skip
TARGETS = st.sampled_from(["/", "..", "../outside", "/tmp", "", "a", "x" * 5000, "\0Lw==", "a\0b"])


@st.composite
def lines(draw):
    base = {
        "id": draw(IDS), "mode": draw(MODES), "uid": draw(st.sampled_from([0, 1000, (1 << 32) - 2])),
        "gid": 0, "mtime": draw(st.integers(-(1 << 62), (1 << 62) - 1)), "ctime": 0, "dir": draw(IDS),
        "name": draw(NAMES), "xattrs": draw(XATTRS),
    }  # fmt: skip
    kind = draw(st.sampled_from(["file", "dir", "link", "special", "gone"]))
    if kind == "file":
        size = draw(st.sampled_from([0, 1, 5000, 1 << 40, (1 << 62) - 1]))
        generation = draw(st.sampled_from([0, COPY.generation, (1 << 48) - 1]))
        copy = manifest.CopyLine(
            generation, draw(st.sampled_from(["ab" * 8, "zz", ""])), "cd" * 32, size, 0, 0, 22
        )
        return manifest.File(
            **base, size=draw(st.sampled_from([size, 5000])),
            blocks=draw(st.sampled_from([0, 8, (1 << 62) - 1])),
            fid=draw(st.sampled_from([FID, "12" * 16, "", "xy"])),
            generation=draw(st.sampled_from([generation, 1])),
            copy=draw(st.sampled_from([copy, None])), pinned=draw(st.booleans()),
            extents=draw(st.sampled_from([None, [], [(0, 1)], [(9, 3)], [(0, 1 << 61)]])),
        )  # fmt: skip
    if kind == "dir":
        return manifest.Directory(**base)
    if kind == "link":
        return manifest.Symlink(**base, target=draw(TARGETS))
    if kind == "special":
        of = draw(st.sampled_from(["fifo", "socket", "char", "block", "door"]))
        return manifest.Special(**base, kind=of, rdev=draw(st.sampled_from([0, 259, (1 << 62) - 1])))
    return manifest.Gone(base["dir"], base["name"] or "x")


@pytest.mark.parametrize(
    "name", ["../new", "../outside/new", "\0Li4vbmV3", "", ".", "..", "d/below", "a\0b", "x" * 256]
)
def test_a_name_that_is_none_makes_nothing(tmp_path, name):
    """A file, a directory, a link, a fifo, and a second name of a file that is there."""
    (tmp_path / "outside").mkdir()
    told = [
        root(),
        directory("d", "d"),
        file("f", "good"),
        file("1", name),
        directory("2", name),
        manifest.Symlink("3", **COMMON, dir="root", name=name, target="good"),
        manifest.Special("4", **COMMON, dir="root", name=name, kind="fifo"),
        file("f", name),
        file("5", "below", "2"),
    ]
    outcome, kept = plant(tmp_path, told)
    assert sorted(os.listdir(tmp_path)) == ["outside", "tree"] and os.listdir(tmp_path / "outside") == []
    made = {os.path.relpath(path, tmp_path / "tree") for path in listing(tmp_path / "tree")}
    assert made == {".", "d", "good"}
    assert len(kept) == 1 and outcome.directories == 2


def line_id(line):
    return getattr(line, "id", "")


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(lines(), max_size=14), st.booleans())
def test_nothing_outside_is_touched(told, special):
    with tempfile.TemporaryDirectory(prefix="tierfs-plant-") as base:
        outside = Path(base) / "outside"
        outside.mkdir()
        (outside / "file").write_bytes(b"precious")
        os.chmod(outside / "file", 0o604)
        before = listing(outside)
        told = [line for line in told if isinstance(line, manifest.Directory) or line_id(line) != "root"]
        outcome, kept = plant(base, [root(), *told], special)
        assert listing(outside) == before
        assert sorted(os.listdir(base)) == ["outside", "tree"]
        made = listing(os.path.join(base, "tree"))
        assert outcome.files == len({planted.record.ino for planted in kept})
        if not special:
            modes = [mode for mode, *_ in made.values() if not stat.S_ISDIR(mode)]
            assert not any(stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or mode & 0o6000 for mode in modes)


@settings(max_examples=100, deadline=None)
@given(st.lists(lines(), max_size=6))
def test_lines_survive_their_way_through_an_object(told):
    key = manifest.Key(1, 2, "ab" * 8)
    packer = manifest.Packer(manifest.Head(1, "segment", "v", 1, 2, "chain", "", 5))
    for line in told:
        packer.add(line)
    assert list(manifest.unpack(key, packer.finish(6)).lines(pytest.fail)) == told


def test_a_root_that_is_none_is_refused(tmp_path):
    with pytest.raises(VolumeError, match="root"):
        plant(tmp_path, [root(), file("root", "x")])


def test_a_cycle_of_directories_ends(tmp_path):
    told = [root(), directory("a", "a"), directory("b", "b", "a"), directory("a", "again", "b")]
    told.append(file("f", "f", "b"))
    outcome, _ = plant(tmp_path, told)
    tree = tmp_path / "tree"
    assert {os.path.relpath(path, tree) for path in map(str, tree.rglob("*"))} == {"a", "a/b", "a/b/f"}
    assert outcome.directories == 3


def test_what_cannot_be_is_named_and_the_rest_goes_on(tmp_path):
    future = manifest.CopyLine(9 << 28, "ab" * 8, "cd" * 32, 5000, 7, 8, 22)
    told = [
        root(),
        file("1", "good"),
        file("2", "from the future", generation=9 << 28, copy=future),
        file("3", "of another size", size=4999),
        file("4", "no id", fid="12"),
        directory("d", "d"),
        directory("d", "the same again"),
        manifest.Symlink("s", **COMMON, dir="root", name="nowhere", target=""),
    ]
    outcome, kept = plant(tmp_path, told)
    assert [planted.record.name for planted in kept] == [b"good"]
    refused = {path for path, _ in outcome.refused}
    assert refused == {b"from the future", b"of another size", b"no id", b"nowhere", b"the same again"}
    assert sorted(os.listdir(tmp_path / "tree")) == ["d", "good"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_special_files_on_demand_only(tmp_path):
    told = [
        root(),
        manifest.Special("x", **COMMON, dir="root", name="null", kind="char", rdev=os.makedev(1, 3)),
        file("f", "f", **{**COMMON, "mode": 0o4755}),
    ]
    (tmp_path / "with").mkdir()
    outcome, _ = plant(tmp_path / "with", told)
    assert not outcome.refused
    assert os.lstat(tmp_path / "with" / "tree" / "null").st_rdev == os.makedev(1, 3)
    assert os.lstat(tmp_path / "with" / "tree" / "f").st_mode & 0o7777 == 0o4755
    outcome, _ = plant(tmp_path, told, special=False)
    assert {path for path, _ in outcome.refused} == {b"null", b"f"}
    assert os.lstat(tmp_path / "tree" / "f").st_mode & 0o7777 == 0o755


def test_long_paths(tmp_path):
    """Deeper than any one path may be."""
    told, above = [root()], "root"
    for depth in range(60):
        told.append(directory(f"d{depth}", "n" * 200, above))
        above = f"d{depth}"
    told += [file("f", "first", above), file("f", "second", "d20"), file("f", "third", "d0")]
    outcome, kept = plant(tmp_path, told)
    assert not outcome.refused and outcome.files == 1
    ino = kept[0].record.ino
    names = "n" * 200
    assert os.lstat(tmp_path / "tree" / names / "third").st_ino == ino
    assert os.lstat(tmp_path / "tree" / names / "third").st_nlink == 3
    # The test's own cleaning up has to go down step by step as well.
    fds = [os.open(tmp_path / "tree", os.O_RDONLY)]
    for _ in range(60):
        fds.append(os.open(names, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fds[-1]))
    for where, name in ((60, "first"), (21, "second"), (1, "third")):
        os.unlink(name, dir_fd=fds[where])
    for depth in range(59, -1, -1):
        os.rmdir(names, dir_fd=fds[depth])
    for fd in fds:
        os.close(fd)


def test_a_stub_has_all_that_finds_its_content(tmp_path):
    outcome, kept = plant(tmp_path, [root(), file("f", "f", mtime=-5_000_000_001, ctime=77)])
    path = tmp_path / "tree" / "f"
    found = os.lstat(path)
    assert (found.st_size, found.st_blocks, found.st_mtime_ns) == (5000, 0, -5_000_000_001)
    record = kept[0].record
    assert record.copy.ctime == 77 and record.left_ctime == found.st_ctime_ns
    assert outcome.content == 5000
    tree = open_tree(str(tmp_path / "tree"))
    fd = os.open(path, os.O_PATH)
    assert tree.read_stub(fd).fid.hex() == FID
    assert tree.handle_of(fd) == record.handle
    os.close(fd)
    tree.close()
