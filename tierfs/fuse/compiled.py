"""Whether the compiled part that is installed may be used: only if it was built from the sources that are.

Also run by setup.py, before anything of this project can be imported: needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from types import ModuleType

PURE = "TIERFS_PURE"  # an environment variable; 1: do without
# What is compiled, and all that it has to agree with, from the package's directory.
C = (
    "fuse/_hot.c", "fuse/_hot_asked.c", "fuse/_hot_attrs.c", "fuse/_hot_copy.c", "fuse/_hot_dirs.c",
    "fuse/_hot_index.c", "fuse/_hot_last.c", "fuse/_hot_links.c", "fuse/_hot_look.c", "fuse/_hot_make.c",
    "fuse/_hot_marks.c", "fuse/_hot_names.c", "fuse/_hot_open.c", "fuse/_hot_release.c", "fuse/_hot_slice.c",
    "fuse/_hot_state.c", "fuse/_hot_watch.c", "fuse/_hot_xattrs.c",
)  # fmt: skip
SOURCES = (
    *C, "fuse/_hot.h", "appearance.py", "codec.py", "contents.py", "dirs.py", "gate.py", "handles.py",
    "idle.py", "intents.py", "lasting.py", "ledger.py", "making.py", "marking.py", "marks.py", "names.py",
    "nodes.py", "openfiles.py", "report.py", "room.py", "states.py", "told.py", "vfs.py", "fuse/backing.py",
    "fuse/compiled.py", "fuse/hot.py", "fuse/kernel.py", "fuse/operations.py", "fuse/protocol.py",
    "fuse/watching.py",
)  # fmt: skip


def fingerprint(package: str) -> str:
    """SHA-256 of these sources, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    for name in SOURCES:
        with open(os.path.join(package, name), "rb") as file:
            content = file.read()
        digest.update(b"%d %s\n" % (len(content), name.encode()))
        digest.update(content)
    return digest.hexdigest()


def find() -> tuple[ModuleType | None, str]:
    """The compiled module, or None; and why not, in a few words, "" where nothing is amiss."""
    if os.environ.get(PURE, "0") not in ("", "0"):
        return None, ""
    try:
        module = importlib.import_module("tierfs.fuse._hot")
    except ImportError as error:
        # None was built: there was no compiler, or none was wanted.
        return None, "" if isinstance(error, ModuleNotFoundError) else f"it does not load: {error}"
    try:
        current = fingerprint(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    except OSError as error:
        return None, f"its sources cannot be read: {error}"
    if current != module.SOURCES:
        return None, "it was built from other sources than these: `make setup` builds it anew"
    return module, ""
