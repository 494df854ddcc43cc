"""What people do in a home directory, repeatably: run it in two places and the same files stand in both."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import sqlite3
import stat
import subprocess
import sys
import sysconfig
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FILES = 5_200
LARGEST = 256 << 10  # bytes of a source file; larger ones would make the archive slow without showing more
MIB = 1 << 20
BIG = 100 * MIB
DATE = "2024-05-06T07:08:09+0000"
GIT = {
    "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_AUTHOR_DATE": DATE,
    "GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@example.org", "GIT_COMMITTER_DATE": DATE,
    "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull,
}  # fmt: skip


class Entry(NamedTuple):
    """What is compared of a name. `times` are (mtime, ctime) in ns; `content` a digest or a link's target."""

    mode: int
    owner: tuple[int, int]
    size: int
    links: int
    device: int
    attributes: tuple[tuple[str, bytes], ...]
    content: bytes
    times: tuple[int, int]
    inode: int


def make_archive(path: Path) -> int:
    """A tar file of real sources: the standard library, then installed packages. How many files it has."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    chosen: list[tuple[Path, str]] = []
    for number, root in enumerate(roots):
        for at, directories, names in os.walk(root):
            directories[:] = sorted(set(directories) - {"__pycache__", "site-packages", "dist-packages"})
            for name in sorted(names):
                source = Path(at, name)
                if source.is_file() and not source.is_symlink() and source.stat().st_size <= LARGEST:
                    chosen.append((source, f"p{number}/{source.relative_to(root)}"))
    with tarfile.open(path, "w") as archive:
        for number, (source, name) in enumerate(chosen[:FILES]):
            info = tarfile.TarInfo(name)
            content = source.read_bytes()
            info.size, info.mtime = len(content), 1_500_000_000 + number
            info.mode = 0o755 if number % 7 == 0 else 0o644
            archive.addfile(info, io.BytesIO(content))
    return len(chosen[:FILES])


def run(*argv: object, cwd: Path) -> str:
    words, env = [str(arg) for arg in argv], {**os.environ, **GIT}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{argv}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def everything(root: Path, archive: Path) -> None:
    """All steps, in a directory that exists."""
    unpack_and_commit(root, archive)
    build(root)
    database(root / "data.sqlite")
    logs(root / "log.txt")
    edits(root / "documents")
    mapped(root / "mapped")
    big_files(root)
    odds(root / "odds")


def unpack_and_commit(root: Path, archive: Path) -> None:
    source = root / "src"
    source.mkdir()
    run("tar", "-xf", archive, cwd=source)
    (source / ".gitignore").write_text("__pycache__/\n")
    os.utime(source / ".gitignore", (1_500_000_000, 1_500_000_000))
    run("git", "init", "-q", "-b", "main", cwd=source)
    run("git", "-c", "core.fsync=none", "add", "-A", cwd=source)
    run("git", "commit", "-q", "-m", "all of it", cwd=source)
    # Packed with one thread, since several cut deltas differently each time, and with a small window, since the
    # time would go into looking for better ones.
    run("git", "-c", "pack.threads=1", "-c", "pack.window=2", "gc", "-q", cwd=source)
    run("git", "checkout", "-q", "-b", "topic", cwd=source)
    changed = source / ".gitignore"
    changed.write_text("__pycache__/\n*.o\n")
    os.utime(changed, (1_600_000_000, 1_600_000_000))
    run("git", "commit", "-q", "-a", "-m", "objects too", cwd=source)
    assert run("git", "status", "--porcelain", cwd=source) == ""


def build(root: Path) -> None:
    place = root / "build"
    place.mkdir()
    for number in range(12):
        (place / f"part{number}.c").write_text(f"int part{number}(int x) {{ return x * {number} + 1; }}\n")
        run("gcc", "-O1", "-c", f"part{number}.c", cwd=place)
    calls = "+".join(f"part{number}(3)" for number in range(12))
    declared = "".join(f"int part{number}(int);" for number in range(12))
    (place / "main.c").write_text(f'#include <stdio.h>\n{declared}\nint main(){{printf("%d\\n", {calls});}}\n')
    run("gcc", "-o", "program", "main.c", *sorted(path.name for path in place.glob("*.o")), cwd=place)
    assert run("./program", cwd=place) == f"{sum(3 * number + 1 for number in range(12))}\n"
    python = ("-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash")
    run(sys.executable, *python, root / "src" / "p0" / "json", root / "src" / "p0" / "email", cwd=root)


def database(path: Path) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    assert db.execute("pragma journal_mode=wal").fetchone() == ("wal",)
    db.execute("create table item (id integer primary key, body blob)")
    places = random.Random(5)
    for start in range(0, 3000, 300):
        db.execute("begin")
        for number in range(start, start + 300):
            db.execute("insert into item values (?, ?)", (number, places.randbytes(places.randrange(2000))))
        db.execute("commit")
    db.execute("delete from item where id % 7 = 0")
    db.execute("update item set body = ? where id % 11 = 0", (b"updated",))
    db.close()


def dump(path: Path) -> str:
    """A digest of all that a database holds."""
    db = sqlite3.connect(path)
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    digest = hashlib.sha256("\n".join(db.iterdump()).encode()).hexdigest()
    db.close()
    return digest


def logs(path: Path) -> None:
    for number in range(400):
        with open(path, "a") as out:
            out.write(f"{number:06} something happened\n")


def edits(place: Path) -> None:
    """As editors save: a new file, synced, put over the old one."""
    place.mkdir()
    for turn in range(3):
        for number in range(30):
            new = place / f".document{number}.new"
            with open(new, "wb") as out:
                out.write(random.Random(turn * 100 + number).randbytes(6000 + number))
                out.flush()
                if number % 10 == 0:
                    os.fsync(out.fileno())
            new.replace(place / f"document{number}")


def mapped(path: Path) -> None:
    path.write_bytes(bytes(MIB))
    # In a process of its own: a page fault that hangs must not hold this interpreter's lock.
    script = """if True:
        import mmap, sys
        with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            for place in range(0, len(view), 8192):
                view[place : place + 8] = place.to_bytes(8, "little")
            view.flush()
        """
    run(sys.executable, "-c", script, path, cwd=path.parent)


@functools.cache
def _megabyte() -> bytes:
    return random.Random(7).randbytes(MIB)


def big_files(root: Path) -> None:
    for number in range(2):
        with open(root / f"big{number}", "wb") as out:
            for part in range(BIG // MIB + number):
                out.write(bytes((part & 255, number)) + _megabyte()[2:])
            out.write(b"odd end" * number)
    with open(root / "sparse", "wb") as out:
        out.truncate(BIG + 4097)
        out.seek(BIG // 2)
        out.write(_megabyte())


def odds(place: Path) -> None:
    """Links, attributes, owners, modes and names that backups get wrong."""
    place.mkdir()
    for number, name in enumerate((b"new\nline", b"\xff\xfe", b" space ", "ünï".encode(), b"-rf", b"plain")):
        path = os.path.join(os.fsencode(place), name)
        with open(path, "wb") as out:
            out.write(name * 3000)
        os.setxattr(path, "user.number", str(number).encode())
        os.chmod(path, 0o400 + number)
        os.utime(path, ns=(1, 1_111_111_111_222_333_444 + number))
        if os.geteuid() == 0:
            os.chown(path, 1000 + number, 2000 + number)
            os.chmod(path, 0o4700 + number)
    plain = place / "plain"
    os.link(plain, place / "linked")
    (place / "symbolic").symlink_to("plain")
    (place / "dangling").symlink_to("nowhere/at all")
    os.mkfifo(place / "fifo", 0o640)
    run("setfacl", "-m", "u:12345:rw,g:54321:r", plain, cwd=place)
    (place / "deep" / "er").mkdir(parents=True)
    run("setfacl", "-d", "-m", "u:12345:rwx", place / "deep", cwd=place)
    (place / "deep" / "inherits").write_text("an ACL")
    (place / "empty").touch()


def survey(root: Path) -> dict[str, Entry]:
    """Every name below `root`, with all that is compared; reads all content."""
    paths: list[str] = []
    for at, directories, names in os.walk(root):
        paths += [os.path.join(at, name) for name in directories + names]
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(_entry, paths))
    return {os.path.relpath(path, root): entry for path, entry in zip(paths, entries)}


def _entry(path: str) -> Entry:
    found = os.lstat(path)
    content = b""
    if stat.S_ISLNK(found.st_mode):
        content = os.readlink(os.fsencode(path))
    elif stat.S_ISREG(found.st_mode):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
    names = sorted(os.listxattr(path, follow_symlinks=False))
    attributes = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return Entry(
        found.st_mode, (found.st_uid, found.st_gid), size, found.st_nlink, found.st_rdev, attributes, content,
        (found.st_mtime_ns, found.st_ctime_ns), found.st_ino,
    )  # fmt: skip


def groups(entries: dict[str, Entry]) -> set[frozenset[str]]:
    """Which names are the same file."""
    found: dict[int, set[str]] = {}
    for name, entry in entries.items():
        found.setdefault(entry.inode, set()).add(name)
    return {frozenset(names) for names in found.values() if len(names) > 1}


BUSY = """
import mmap, os, sqlite3, sys, time
place = sys.argv[1]
os.mkdir(place)
db = sqlite3.connect(place + "/busy.sqlite", isolation_level=None)
db.execute("pragma journal_mode=wal")
db.execute("create table turn (n integer)")
log = open(place + "/log", "a", buffering=1)
with open(place + "/mapped", "wb") as out:
    out.truncate(65536)
view = mmap.mmap(os.open(place + "/mapped", os.O_RDWR), 0)
os.set_blocking(0, False)
turn = 0
while True:
    turn += 1
    db.execute("insert into turn values (?)", (turn,))
    log.write(f"{turn}\\n")
    view[:8] = turn.to_bytes(8, "little")
    with open(place + "/saved.new", "w") as out:
        out.write(str(turn))
    os.replace(place + "/saved.new", place + "/saved")
    if turn == 1:
        print("busy", flush=True)
    if os.read(0, 1) if __import__("select").select([0], [], [], 0.01)[0] else b"":
        break
db.close()
print(turn)
"""


def check_busy(place: Path, turns: int) -> None:
    """All that the busy program did is there."""
    assert (place / "log").read_text() == "".join(f"{turn}\n" for turn in range(1, turns + 1))
    assert (place / "saved").read_text() == str(turns)
    assert int.from_bytes((place / "mapped").read_bytes()[:8], "little") == turns
    db = sqlite3.connect(place / "busy.sqlite")
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    assert db.execute("select count(*), max(n) from turn").fetchone() == (turns, turns)
    db.close()
