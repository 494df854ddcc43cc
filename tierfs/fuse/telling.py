"""Hands notifications on to the kernel, in a process of its own.

To forget a name the kernel waits for its directory's lock, and whoever holds that may be waiting for an answer
of the mount server. A thread of the server would then wait for the server, and not even end when it is killed.
Nobody waits for this process. It is forked before anything is mounted, since its program may lie in what will
be, and ends when the server does. Where that has been killed while somebody with such a lock waits for it, this
cannot end before another server has answered them. If nobody is there to start one, the connection is aborted.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import socket
import threading
import time
from collections import deque

from tierfs.fuse import mounting
from tierfs.fuse import protocol as p

log = logging.getLogger("fuse")

MOST = 1 << 15  # bytes of notifications in one message
_AGAIN_SECONDS = 0.05
_TRIES = 200
_ALONE_SECONDS = 1.0  # from the server's end until it is asked whether there will be another
_GONE = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN})


def start(volume: str) -> socket.socket:
    """Fork it: where to send the descriptor of /dev/fuse (SCM_RIGHTS), and then messages of notifications.

    Call it in the server, whose parent is the supervisor, while there are no threads, and nothing is open that
    would mind. Raises OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server, supervisor = os.getpid(), os.getppid()
    if not os.fork():
        code = 1
        try:
            _live(theirs, server, supervisor, volume)
            code = 0
        except OSError as error:
            log.critical("edits behind the mount cannot be told any more: %s", error)
        finally:
            os._exit(code)
    theirs.close()
    ours.setblocking(False)
    return ours


def _live(source: socket.socket, server: int, supervisor: int, volume: str) -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends with the server
    fd = source.detach()
    os.dup2(fd, 3)  # whatever is inherited otherwise is not ours to keep open
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    others = os.pidfd_open(server), os.pidfd_open(supervisor)
    aborting = threading.Lock()
    threading.Thread(target=_abort_when_alone, args=(*others, volume, aborting), daemon=True).start()
    with socket.socket(fileno=3) as alone:
        _, fds, _, _ = socket.recv_fds(alone, 1, 1)
        if fds:
            Teller(alone, fds[0]).run()
    aborting.acquire()  # an abort, which has let us go on, takes away what it has mounted first


def _abort_when_alone(server: int, supervisor: int, volume: str, aborting: threading.Lock) -> None:
    """Mostly this process has ended before that."""
    select.select([server], [], [])
    time.sleep(_ALONE_SECONDS)
    if select.select([supervisor], [], [], 0)[0]:
        log.error("nobody serves the mount any more, and somebody waits: the connection is aborted")
        with aborting:
            mounting.abort_volume(volume)


class Teller:
    """Tells what comes from a socket."""

    def __init__(self, source: socket.socket, device: int) -> None:
        self._source = source
        self._device = device
        self._again: deque[tuple[float, int, bytes]] = deque()

    def run(self) -> None:
        """Until the other end is closed. Raises OSError."""
        while True:
            timeout = max(0.0, self._again[0][0] - time.monotonic()) if self._again else None
            if select.select([self._source], [], [], timeout)[0]:
                data = self._source.recv(MOST)
                if not data:
                    return
                self._tell_all(data)
            self._try_again()

    def _tell_all(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            (length, _, _) = p.OUT.unpack_from(data, at)
            self._tell(data[at : at + length], _TRIES)
            at += length

    def _try_again(self) -> None:
        now = time.monotonic()
        while self._again and self._again[0][0] <= now:
            _, tries, message = self._again.popleft()
            self._tell(message, tries)

    def _tell(self, message: bytes, tries: int) -> None:
        try:
            os.write(self._device, message)
        except OSError as error:
            if error.errno in _GONE:
                return
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            # It does not know the name, or the directory has gone, and a file has its number: nothing is to be
            # forgotten. It does not know the inode: perhaps it has yet to take the answer that tells of it, and
            # of what is not true any more.
            if tries and p.OUT.unpack_from(message)[1] == p.NOTIFY_INVAL_INODE:
                self._again.append((time.monotonic() + _AGAIN_SECONDS, tries - 1, message))
