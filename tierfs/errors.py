"""The errors of TierFS: each class owns an errno and says what a person can do.

Raise them with facts of the domain (a path, a key, a limit); translate to an errno or an exit code once,
at the boundary (a FUSE binding, the control socket or the command line).
"""

from __future__ import annotations

import errno


class TierError(Exception):
    """Base of every error that TierFS raises on purpose. `str(error)` is one line that a person can act on."""

    errno: int = errno.EIO


class ConfigError(TierError):
    """The configuration is unreadable or wrong; the message names file, line and key."""

    errno = errno.EINVAL


class UsageError(TierError):
    """A request makes no sense as given (exit code 2 on the command line)."""

    errno = errno.EINVAL


class VolumeError(TierError):
    """The volume cannot be created, opened or mounted as asked."""

    errno = errno.EBUSY


class PathError(TierError):
    """A path is not part of a mounted volume, or does not exist there."""

    errno = errno.ENOENT


class NotPermittedError(TierError):
    """The caller may not do this to that file."""

    errno = errno.EPERM


class BusyError(TierError):
    """A file is open, mapped, guarded or being copied, so that it cannot change its tier now."""

    errno = errno.EBUSY


class IndexError_(TierError):
    """The index is damaged, of an unknown version or cannot be written."""

    errno = errno.EIO


class IndexDamagedError(IndexError_):
    """The index's file is not whole: it is put aside and made anew from the tree. No single record is meant."""


class IndexFullError(IndexError_):
    """The index cannot grow: its filesystem or its address space is full. Nothing is lost."""

    errno = errno.ENOSPC


class TransitionError(TierError):
    """A change of a record that would break an invariant of residency; nothing was written."""

    errno = errno.EIO


class ForeignStubError(TierError):
    """A stub whose blocks or tuple are not TierFS's own work: nothing of it may be overwritten."""

    errno = errno.EIO


class FetchTimeoutError(TierError):
    """Content did not arrive within `fetch_timeout`."""

    errno = errno.EIO


class StoreError(TierError):
    """Base of what a store may answer."""

    errno = errno.EIO


class ObjectMissingError(StoreError):
    """The store has no object under this key."""


class ObjectCorruptError(StoreError):
    """An object is shorter than recorded or its bytes do not match their digest."""


class ObjectArchivedError(StoreError):
    """The provider has put an object into an archive: it can be read when somebody has had it restored."""


class PreconditionError(StoreError):
    """A conditional write found another version than the expected one."""

    errno = errno.EEXIST


class StoreUnavailableError(StoreError):
    """The store did not answer, or answered that it cannot now; trying again later may work."""


class StoreStaleError(StoreUnavailableError):
    """The store answers what it held at an earlier time; it may lack what has been put into it since."""


class StoreThrottledError(StoreUnavailableError):
    """The store asks for fewer requests (503 SlowDown, 429)."""


class StoreDeniedError(StoreError):
    """The store refuses the credentials or the action."""

    errno = errno.EACCES


class StoreFullError(StoreError):
    """The store has no room left."""

    errno = errno.ENOSPC


class BucketMissingError(StoreError):
    """The bucket, container or root directory of the store does not exist."""
