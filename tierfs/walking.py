"""A walk through the backing tree while it is in use: what goes is passed over, what moves is found, and no
link that somebody puts on the way leads out of it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tierfs.kit import is_gone, is_passing
from tierfs.places import Directory, Places, join
from tierfs.tree import Tree


class Name(NamedTuple):
    """One name of the tree: `opath` is an O_PATH descriptor of it until the next is asked for."""

    path: bytes
    parent: int
    name: bytes
    opath: int
    st: os.stat_result


def walk(
    tree: Tree, places: Places, top: Directory, refused: Callable[[bytes, OSError], None]
) -> Iterator[Name]:
    """All that is beneath a directory, but for what is on another filesystem: its inode numbers mean others
    here.

    `refused` hears of each path where something is that cannot be looked at. Raises OSError where that is so
    just now only.
    """
    pending = [top]
    while pending:
        here, fd = pending.pop(), -1
        try:
            fd = places.opened(here)
            for found in _names(here, fd, refused):
                if found.st.st_dev != tree.device:
                    continue
                if stat.S_ISDIR(found.st.st_mode):
                    pending.append(Directory(found.st.st_ino, tree.handle_of(found.opath), found.path))
                yield found
        except OSError as error:
            _tell(refused, here.path, error)
        finally:
            if fd >= 0:
                os.close(fd)


def _names(here: Directory, fd: int, refused: Callable[[bytes, OSError], None]) -> Iterator[Name]:
    for name in sorted(os.fsencode(text) for text in os.listdir(fd)):
        path = join(here.path, name)
        try:
            opath = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except PermissionError:
            raise  # it may be read, but not searched: so it is with all names
        except OSError as error:
            _tell(refused, path, error)
            continue
        try:
            yield Name(path, here.ino, name, opath, os.fstat(opath))
        finally:
            os.close(opath)


def _tell(refused: Callable[[bytes, OSError], None], path: bytes, error: OSError) -> None:
    """What is gone, or has become a link, is nothing to tell."""
    if is_passing(error):
        raise error
    if not is_gone(error) and error.errno != errno.ELOOP:
        refused(path, error)
