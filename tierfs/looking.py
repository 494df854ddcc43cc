"""What the namespace journal says of an inode: its line, made from the tree and the index as they are now."""

from __future__ import annotations

import base64
import errno
import logging
import os
import stat
from functools import partial

import msgspec

from tierfs import manifest
from tierfs.errors import ForeignStubError
from tierfs.index import Rescue, Writer
from tierfs.kit import Kit
from tierfs.model import Copy, Record, clamped
from tierfs.tree import fd_path

log = logging.getLogger("journal")

_KINDS = {stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket", stat.S_IFCHR: "char", stat.S_IFBLK: "block"}
_NO_XATTRS = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT, errno.EPERM})
_OWN = frozenset({"trusted.tierfs", "trusted.tierfs_pin", "user.tierfs", "user.tierfs_pin"})


def line(
    kit: Kit, fd: int, st: os.stat_result, handle: bytes, directory: str = "", name: bytes = b""
) -> manifest.AnyInode:
    """The line of the inode behind an O_PATH descriptor, as `name` in `directory` (an id). Raises OSError."""
    base = {
        "id": manifest.inode_id(handle),
        "mode": stat.S_IMODE(st.st_mode),
        "uid": st.st_uid,
        "gid": st.st_gid,
        "mtime": clamped(st.st_mtime_ns),
        "ctime": clamped(st.st_ctime_ns),
        "dir": directory,
        "name": manifest.text(name),
    }
    attributes = _xattrs(kit, fd)
    if attributes:
        base["pinned"] = kit.tree.pin_name in attributes
        base["xattrs"] = {key: value for key, value in attributes.items() if key not in _OWN} or None
    kind = stat.S_IFMT(st.st_mode)
    if kind == stat.S_IFREG:
        return _file(kit, fd, st, handle, base)
    if kind == stat.S_IFDIR:
        return manifest.Directory(**base, root=st.st_ino == kit.tree.root_ino)  # type: ignore[arg-type]
    if kind == stat.S_IFLNK:
        return manifest.Symlink(**base, target=manifest.text(os.readlink(b"", dir_fd=fd)))  # type: ignore[arg-type]
    return manifest.Special(**base, kind=_KINDS[kind], rdev=st.st_rdev)  # type: ignore[arg-type]


def is_settled(kit: Kit, told: manifest.AnyInode, ino: int) -> bool:
    """The line is not one of a moment in which a demotion or a fetch was moving the file's times."""
    if not isinstance(told, manifest.File) or told.copy is None:
        return True
    record = kit.index.get(ino)
    if record is None or record.copy is None:
        return True  # which has a note
    return not kit.index.is_pending(ino) and manifest.CopyLine.of(record.copy) == told.copy


def _file(kit: Kit, fd: int, st: os.stat_result, handle: bytes, base: dict[str, object]) -> manifest.File:
    record, moving = kit.index.get(st.st_ino), kit.index.is_pending(st.st_ino)
    st = os.fstat(fd)
    if record is None or record.handle != handle:
        twin = _twin(kit, fd, st, handle)
        if twin is not None:
            return manifest.File(**base, size=st.st_size, blocks=st.st_blocks, **twin)  # type: ignore[arg-type]
        # Not yet in the index: dirty, and not known since when.
        return manifest.File(**base, size=st.st_size, blocks=st.st_blocks, since=clamped(st.st_mtime_ns) or 1)  # type: ignore[arg-type]
    base["mtime"], base["ctime"] = _shown(record, st, moving)
    base |= {**_known(kit, record), "size": st.st_size, "blocks": max(record.blocks, st.st_blocks)}
    return manifest.File(**base)  # type: ignore[arg-type]


def as_recorded(kit: Kit, record: Record, told: manifest.File) -> manifest.File:
    """The line of a file that cannot be read just now, `told` as it was before, as the index knows it."""
    known: dict[str, object] = {**_known(kit, record), "size": record.size, "blocks": record.blocks}
    if record.copy is not None and not record.dirty:
        known |= {"size": record.copy.size, "mtime": record.copy.mtime, "ctime": record.copy.ctime}
    return msgspec.structs.replace(told, **known)


def _known(kit: Kit, record: Record) -> dict[str, object]:
    """What the index knows of a file's content."""
    copy, extents = None, None
    if record.copy is not None:
        copy = manifest.CopyLine.of(record.copy)
        leaves = kit.index.get_leaves(record.fid, record.copy.generation)
        if leaves is not None and sum(end - start for start, end in leaves.extents) < record.copy.size:
            extents = leaves.extents if len(leaves.extents) <= manifest.MOST_EXTENTS else None
    rescue = kit.index.rescue(record.fid) if record.dirty else None
    return {
        "fid": record.fid.hex(),
        "generation": record.generation,
        "copy": copy,
        "since": kit.index.dirty_since(record.ino) if record.dirty else 0,
        "extents": extents,
        "rescue": _rescue_line(rescue) if rescue is not None else None,
        "rescued": rescue.at if rescue is not None else 0,
    }


def _rescue_line(rescue: Rescue) -> manifest.CopyLine:
    tag, digest = rescue.tag.hex(), rescue.digest.hex()
    return manifest.CopyLine(
        rescue.generation, tag, digest, rescue.size, rescue.mtime, rescue.ctime, rescue.chunk_shift
    )


def _twin(kit: Kit, fd: int, st: os.stat_result, handle: bytes) -> dict[str, object] | None:
    """A stub without a record, copied behind the mount: another file's object is its content, and must stay."""
    try:
        stub = kit.tree.read_stub(fd)
    except ForeignStubError:
        return None
    if stub is None:
        return None
    kit.index.post(partial(_note_twin, stub.key, handle))
    copy = Copy(
        stub.generation, stub.tag, stub.digest, st.st_size, clamped(st.st_mtime_ns), clamped(st.st_ctime_ns), 0,
        stub.chunk_shift,
    )  # fmt: skip
    return {"fid": stub.fid.hex(), "generation": stub.generation, "copy": manifest.CopyLine.of(copy)}


def _note_twin(key: str, handle: bytes, w: Writer) -> None:
    w.note_twin(key, handle)


def _shown(record: Record, st: os.stat_result, moving: bool) -> tuple[int, int]:
    """The times that the mount shows; `moving`: while our own work moves those of the inode."""
    if record.copy is not None and (moving or record.left_ctime == st.st_ctime_ns):
        return record.copy.mtime, record.copy.ctime
    return clamped(st.st_mtime_ns), clamped(st.st_ctime_ns)


def _xattrs(kit: Kit, fd: int) -> dict[str, str]:
    """All extended attributes, TierFS's own too."""
    path = fd_path(fd)
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return {}
        raise
    found: dict[str, str] = {}
    room = manifest.MOST_XATTRS
    for name in sorted(names, key=lambda name: name not in _OWN):
        try:
            value = base64.b64encode(os.getxattr(path, name)).decode()
        except PermissionError:
            # Its own owner may not read it (mode 0); only root could.
            log.warning("inode %d: attribute %s is unreadable, and not journalled", os.fstat(fd).st_ino, name)
            continue
        except OSError as error:
            if error.errno not in _NO_XATTRS:
                raise
            continue
        text = manifest.text(os.fsencode(name))
        room -= len(text) + len(value)
        if room < 0:
            what = f"{kit.name_of(fd)} has more than {manifest.MOST_XATTRS >> 20} MiB of extended attributes"
            kit.troubles.note(f"{what}: not all of them are kept in the store", os.fstat(fd).st_ino)
            break
        found[text] = value
    return found
