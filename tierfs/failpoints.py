"""Named points at which a test kills the process, and what must hold when it comes back.

Armed by the environment: TIERFS_FAILPOINT=NAME or NAME:n (the n-th passing, from 1); with NAME:n:STOP it stops
there instead. With TIERFS_FAILPOINT_ONCE=PATH only the process that can remove that file does so: for those
that are replaced. Each point has a test (tests/unit/test_failpoints.py). Unarmed, it costs one comparison.
"""

from __future__ import annotations

import os
import signal
import threading

# Demotion, in order. Up to STUB_WRITTEN the file is whole locally; recovery takes the attribute away again.
COPY_INTENDED = "copy-intended"  # the keys to put are noted: orphans, whether they were put or not
COPY_PUT = "copy-put"  # the object is in the store, nothing but its intent refers to it: an orphan
COPY_COMMITTED = "copy-committed"  # the file is clean and resident
STUB_WRITTEN = "stub-written"  # attribute durable, record still RESIDENT: blocks are present and win
STUB_COMMITTED = "stub-committed"  # record STUB and pending, all blocks present: becomes resident again
PUNCHED = "punched"  # blocks gone, times moved: a stub whose times recovery restores
PUNCH_SYNCED = "punch-synced"  # as PUNCHED with times right; the record is still pending

# A rescue copy, after COPY_INTENDED. The file is dirty and whole locally all the while.
RESCUE_PUT = "rescue-put"  # the object is in the store, nothing but its intent refers to it: an orphan
RESCUE_COMMITTED = "rescue-committed"  # the index refers to it, and to the one before no more; not told yet

# Fetch, in order. Up to FILL_CLEARED the file stays a stub and is fetched again, over equal pages.
FILL_WRITTEN = "fill-written"  # some pages written, no bit committed
FILL_BITS = "fill-bits"  # bits of a large file committed
FILL_SYNCED = "fill-synced"  # all pages durable, attribute present
FILL_CLEARED = "fill-cleared"  # attribute gone durably, record not yet RESIDENT

# A stub that is opened for a fetch: the attribute and what is on the disk count, whatever its record says.
OPEN_LISTED = "open-listed"  # the index has the list of digests again, nothing is fetched
OPEN_KEPT = "open-kept"  # somebody else's content is kept: attribute gone durably, the record still a stub's

# Without privileges: a file that refuses its owner something has a mode that lets him, and a note of its own.
LENT = "lent"

# The namespace journal, in order. Whatever has not been committed as written is looked at and written again.
SEGMENT_PUT = "segment-put"  # the segment is in the store, the index still has its notes
SEGMENT_COMMITTED = "segment-committed"  # notes gone, the chain goes on from it
SNAPSHOT_BEGUN = "snapshot-begun"  # notes are made from here on, no part is written
SNAPSHOT_PART = "snapshot-part"  # some parts are in the store, not the last: nobody uses them
SNAPSHOT_PUT = "snapshot-put"  # all parts are in the store: it may be used, and is taken once more
SNAPSHOT_COMMITTED = "snapshot-committed"  # the index knows of it

# Restore, in order. Until the last, no mount accepts the state directory; the next attempt starts again.
RESTORE_BEGUN = "restore-begun"  # the intent is written, the store is not taken yet
RESTORE_TAKEN = "restore-taken"  # the store is ours
RESTORE_PLANTED = "restore-planted"  # the tree is made and synced, under its provisional name
RESTORE_NAMED = "restore-named"  # it has its name; the volume is not complete
RESTORE_COMPLETE = "restore-complete"  # the volume is complete, the intent still there

# Collection, in order. What is on a list is deleted again where it may be gone already.
GC_BEAT = "gc-beat"  # the store's date is asked, nothing noted
GC_PUBLISHED = "gc-published"  # the list is in the store, the index does not know it: published once more
GC_LISTED = "gc-listed"  # the grace begins
GC_DELETED = "gc-deleted"  # objects are gone, their tombstones are not
GC_DROPPED = "gc-dropped"  # tombstones are gone, the list is still there

# The mark log. Positions move with what is applied, in one commit.
DRAIN_COMMITTED = "drain-committed"  # the marks are in the index, the server is not told, the log not shortened

# Recovery itself. Whatever it has put right it finds right the next time.
RECOVER_MENDED = "recover-mended"  # the file is as it shall be, its record not yet, and still pending
RECOVER_COMMITTED = "recover-committed"  # one file is done, others may be left

# A mount server that takes a session over. The session is as it was until requests are answered again.
TAKEOVER_BEGUN = "takeover-begun"  # nothing is taken over
TAKEOVER_RESTORED = "takeover-restored"  # nodes, files and marks are, the kernel has not been asked again
TAKEOVER_RESENT = "takeover-resent"  # the kernel sends again what had no answer

REPLICATE_POINTS = (COPY_INTENDED, COPY_PUT, COPY_COMMITTED)
RESCUE_POINTS = (COPY_INTENDED, RESCUE_PUT, RESCUE_COMMITTED)
DRAIN_POINTS = (DRAIN_COMMITTED,)
RECOVER_POINTS = (RECOVER_MENDED, RECOVER_COMMITTED)
TAKEOVER_POINTS = (TAKEOVER_BEGUN, TAKEOVER_RESTORED, TAKEOVER_RESENT)
DEMOTE_POINTS = (COPY_INTENDED, COPY_PUT, COPY_COMMITTED, STUB_WRITTEN, STUB_COMMITTED, PUNCHED, PUNCH_SYNCED)
COLLECT_POINTS = (GC_BEAT, GC_PUBLISHED, GC_LISTED, GC_DELETED, GC_DROPPED)
JOURNAL_POINTS = (
    SEGMENT_PUT, SEGMENT_COMMITTED, SNAPSHOT_BEGUN, SNAPSHOT_PART, SNAPSHOT_PUT, SNAPSHOT_COMMITTED,
)  # fmt: skip
RESTORE_POINTS = (RESTORE_BEGUN, RESTORE_TAKEN, RESTORE_PLANTED, RESTORE_NAMED, RESTORE_COMPLETE)
FETCH_POINTS = (FILL_WRITTEN, FILL_BITS, FILL_SYNCED, FILL_CLEARED)

_name, _count, _how = (os.environ.get("TIERFS_FAILPOINT", "") + "::").split(":")[:3]
_armed = _name or None
_left = int(_count or "1")
_signal = signal.Signals[f"SIG{_how or 'KILL'}"]
_once = os.environ.get("TIERFS_FAILPOINT_ONCE", "")
_lock = threading.Lock()


def hit(name: str) -> None:
    """Die here, by SIGKILL, if this point is armed and its turn has come."""
    global _left
    if _armed is None or name != _armed:
        return
    with _lock:
        _left -= 1
        if _left == 0 and _is_ours():
            os.kill(os.getpid(), _signal)


def _is_ours() -> bool:
    if _once:
        try:
            os.unlink(_once)
        except FileNotFoundError:
            return False
    return True
