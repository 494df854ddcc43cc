"""Edits behind the mount, in the backing tree, show in the mount within two seconds."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from acting import BOB, denied
from places import Place

WITHIN = 2.0  # seconds; what a loaded machine adds comes on top
SLACK = 8.0
CONTENT = b"the old content " * 500


@pytest.fixture
def pair(place: Place) -> tuple[Path, Path]:
    """A directory that the kernel has just learnt all about, and the same one in the backing tree."""
    shown = place / "d"
    (shown / "sub").mkdir(parents=True)
    (shown / "file").write_bytes(CONTENT)
    behind = Path(place.volume.backing(shown)) if place.volume else shown
    for name in (".", "file", "sub"):
        os.stat(shown / name)
    os.listdir(shown)
    assert (shown / "file").read_bytes() == CONTENT
    assert not (shown / "new").exists() and not (shown / "moved").exists()
    return shown, behind


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(b"replaced")
    os.rename(path.with_name("new"), path)


def extend(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def patch(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"THE NEW")


def another(path: Path) -> None:
    os.rename(path, path.with_name("old"))
    path.mkdir()
    (path / "new").touch()


EDITS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], bool]]] = {
    "mode": (lambda d: (d / "file").chmod(0o600), lambda d: (d / "file").stat().st_mode & 0o777 == 0o600),
    "mode of a directory": (lambda d: d.chmod(0o700), lambda d: d.stat().st_mode & 0o777 == 0o700),
    "times": (lambda d: os.utime(d / "file", ns=(1, 2)), lambda d: (d / "file").stat().st_mtime_ns == 2),
    "size": (lambda d: extend(d / "file"), lambda d: (d / "file").stat().st_size == len(CONTENT) + 4),
    "content": (lambda d: patch(d / "file"), lambda d: (d / "file").read_bytes()[:7] == b"THE NEW"),
    "xattr": (lambda d: os.setxattr(d / "file", "user.a", b"b"),
              lambda d: os.getxattr(d / "file", "user.a") == b"b"),
    "new name": (lambda d: (d / "new").touch(), lambda d: (d / "new").exists()),
    "new name in the listing": (lambda d: (d / "new").touch(), lambda d: "new" in os.listdir(d)),
    "new link": (lambda d: os.link(d / "file", d / "new"), lambda d: (d / "file").stat().st_nlink == 2),
    "removed": (lambda d: (d / "file").unlink(), lambda d: not (d / "file").exists()),
    "removed from the listing": (lambda d: (d / "file").unlink(), lambda d: "file" not in os.listdir(d)),
    "replaced": (lambda d: replace(d / "file"), lambda d: (d / "file").read_bytes() == b"replaced"),
    "renamed": (lambda d: os.rename(d / "file", d / "moved"),
                lambda d: (d / "moved").exists() and not (d / "file").exists()),
    "renamed directory": (lambda d: os.rename(d / "sub", d / "moved"),
                          lambda d: (d / "moved").is_dir() and not (d / "sub").exists()),
    "another directory": (lambda d: another(d / "sub"), lambda d: os.listdir(d / "sub") == ["new"]),
    "file for a directory": (lambda d: ((d / "sub").rmdir(), (d / "sub").touch()),
                             lambda d: (d / "sub").is_file()),
}  # fmt: skip


def becomes(seen: Callable[[], bool]) -> None:
    began = time.monotonic()
    while True:
        try:
            if seen():
                break
        except OSError:
            pass  # not there yet: asked for again
        assert time.monotonic() < began + WITHIN + SLACK, "it does not show"
        time.sleep(0.02)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_behind_the_mount_shows(pair: tuple[Path, Path], edit: str) -> None:
    shown, behind = pair
    make, seen = EDITS[edit]
    make(behind)
    becomes(lambda: seen(shown))


@pytest.mark.parametrize("bits", [0o644, 0o4755])
def test_content_of_an_open_file(
    place: Place, pair: tuple[Path, Path], bits: int, opened: Callable[..., int]
) -> None:
    """With set-id bits the kernel has it cached, not passed through."""
    place.needs("invalidation")
    shown, behind = pair
    (shown / "file").chmod(bits)
    fd = opened(shown / "file", os.O_RDONLY)
    assert os.pread(fd, 7, 0) == CONTENT[:7]
    patch(behind / "file")
    becomes(lambda: os.pread(fd, 7, 0) == b"THE NEW")


def test_a_name_made_behind_the_mount_is_opened_as_it_allows(
    place: Place, pair: tuple[Path, Path], needs_root: None
) -> None:
    """The kernel has just learnt that there is none, and lets anybody make one here."""
    shown, behind = pair
    shown.chmod(0o777)
    assert not (shown / "secret").exists()
    (behind / "secret").write_bytes(b"secret")
    (behind / "secret").chmod(0o600)
    denied(BOB, errno.EACCES, os.open, shown / "secret", os.O_CREAT | os.O_RDWR, 0o600)
    assert (behind / "secret").read_bytes() == b"secret"


MAKERS: dict[str, Callable[[Path], Any]] = {
    "file": lambda new: new.touch(),
    "exclusive file": lambda new: os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    "directory": lambda new: new.mkdir(),
    "symlink": lambda new: new.symlink_to("file"),
    "fifo": os.mkfifo,
    "link": lambda new: os.link(new.with_name("file"), new),
    "renamed": lambda new: os.rename(new.with_name("file"), new),
    "renamed directory": lambda new: os.rename(new.with_name("sub"), new),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_name_that_was_absent_is_there_when_it_is_made(pair: tuple[Path, Path], maker: str) -> None:
    """Through the mount, or behind it a moment before it is to be made."""
    shown, behind = pair
    make = MAKERS[maker]
    assert not os.path.lexists(shown / "new")
    make(shown / "new")
    assert os.path.lexists(shown / "new")
    assert not os.path.lexists(shown / "moved")
    (behind / "moved").write_bytes(b"behind")
    if maker == "file":
        with open(shown / "moved", "ab") as file:  # whoever makes or appends finds what is there
            file.write(b" and through")
        assert (behind / "moved").read_bytes() == b"behind and through"
    elif "renamed" not in maker:
        with pytest.raises(FileExistsError):
            make(shown / "moved")
    else:
        os.rename(shown / "new", shown / "moved") if maker == "renamed" else os.rmdir(shown / "new")
        assert (behind / "moved").read_bytes() == (CONTENT if maker == "renamed" else b"behind")
