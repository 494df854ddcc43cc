"""How a record may change: pure, (record, event) -> record. Illegal moves raise TransitionError.

                     wrote                copied                 stubbed
        (no record) -------> RESIDENT    --------> RESIDENT     ---------> STUB <-. punched
                             dirty       <-------- clean        <---------  |  '--'
                               ^           wrote     ^             whole    | arrived
                               |                     |                      v
                               |                     '------- whole ----- PARTIAL <-. arrived
                               '---------------- wrote (from any state) ----'  '----'
                                                  (stubbed leads back from PARTIAL to STUB)

    event    what has happened                                                     said by
    wrote    content changed: opened for writing, truncated or created             WRITE mark
    closed   the last writing handle is closed; size and blocks are known          CLOSED mark
    copied   a verified object has the content of this very generation             copying
    stubbed  the stub attribute is durable, the blocks are still there             punching
    punched  the blocks are gone                                                   punching
    arrived  some leaves of the copy are durably local                             settling
    whole    all content is local and the stub attribute durably gone              settling, punching, recovery

Invariants, checked at every change that reaches the index (`check`):
    1. Dirty => fully resident: content that no copy has is nowhere else.
    2. Not fully resident => a verified copy of this generation, of the file's size.
    3. A resident file loses content only as a stub first: never RESIDENT -> PARTIAL.
"""

from __future__ import annotations

from dataclasses import replace

from tierfs.errors import TransitionError
from tierfs.model import DOUBTED, Copy, Record, Residency

RESIDENT, PARTIAL, STUB = Residency.RESIDENT, Residency.PARTIAL, Residency.STUB


def check(before: Record | None, after: Record) -> None:
    """Raises TransitionError where the invariants forbid `after`, or the move to it from `before`."""
    if after.residency is not RESIDENT:
        if after.copy is None or after.dirty:
            raise TransitionError(f"inode {after.ino}: {after.residency.name} without a copy of its generation")
        if after.copy.size != after.size:
            raise TransitionError(f"inode {after.ino}: {after.size} bytes, but its copy has {after.copy.size}")
    known = before is not None and before.fid == after.fid
    if known and before is not None and before.residency is RESIDENT and after.residency is PARTIAL:
        raise TransitionError(f"inode {after.ino}: RESIDENT cannot become PARTIAL")


def wrote(record: Record, generation: int, parent: int = 0, name: bytes = b"") -> Record:
    """Resident, with a generation that has no copy; the last copy stays known until a newer one replaces it."""
    return replace(
        record,
        generation=generation,
        residency=RESIDENT,
        parent=parent or record.parent,
        name=name or record.name,
        left_ctime=0,
    )


def closed(record: Record, size: int, blocks: int) -> Record:
    """`blocks` of 512 bytes. Of a file that is not resident nothing new is learned."""
    if record.residency is not RESIDENT:
        return record
    return replace(record, size=size, blocks=blocks, local=blocks * 512)


def copied(record: Record, copy: Copy, size: int, blocks: int, ctime: int) -> Record:
    """`size`, `blocks` and `ctime` are the inode's while it was sealed. The record takes the copy's generation:
    that of an earlier copy where a file was opened for writing and not changed."""
    if record.residency is not RESIDENT:
        raise TransitionError(f"inode {record.ino}: a {record.residency.name} file is not copied")
    if copy.size != size:
        raise TransitionError(f"inode {record.ino}: {size} bytes, but its copy has {copy.size}")
    left = record.left_ctime if record.left_ctime == ctime else 0
    return replace(
        record,
        generation=copy.generation,
        copy=copy,
        size=size,
        blocks=blocks,
        local=blocks * 512,
        left_ctime=left,
    )


def stubbed(record: Record, blocks: int, copy: Copy) -> Record:
    """`blocks`: all that the file has, which `stat` goes on showing. `copy`: as it was proven just now."""
    if copy.generation != record.generation:
        raise TransitionError(f"inode {record.ino}: only a file with a copy of its content becomes a stub")
    if copy.custody == DOUBTED:
        raise TransitionError(f"inode {record.ino}: its copy was found bad: the good bytes are here")
    return replace(record, residency=STUB, blocks=blocks, local=0, copy=copy)


def punched(record: Record, ctime: int, blocks: int) -> Record:
    """`ctime` and `blocks` as the punch left them."""
    if record.residency is not STUB:
        raise TransitionError(f"inode {record.ino}: {record.residency.name}, but its blocks were punched")
    return replace(record, local=blocks * 512, left_ctime=ctime)


def arrived(record: Record, blocks: int, copy: Copy, left_ctime: int) -> Record:
    """Part of `copy` is durably local, in `blocks`; its bits are committed with this."""
    if record.residency is RESIDENT or copy.generation != record.generation:
        raise TransitionError(
            f"inode {record.ino}: nothing can arrive of a {record.residency.name} file's copy"
        )
    return replace(record, residency=PARTIAL, local=blocks * 512, copy=copy, left_ctime=left_ctime)


def whole(record: Record, blocks: int, left_ctime: int) -> Record:
    """All content is local, in `blocks`, and the attribute is durably gone. True from any state."""
    return replace(record, residency=RESIDENT, local=blocks * 512, left_ctime=left_ctime)
