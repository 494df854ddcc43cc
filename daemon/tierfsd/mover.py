"""The mover's process: everything slow, at low priority, and the only writer of the index.

Started by the supervisor with inherited descriptors: `--link-fd`, the mover's end of the link to the mount
server, and `--control-fd`, the listening control socket. Ends on SIGTERM, or when the server is gone. Told to
end while it is still loading, it takes in what the server has left first: marks and heat.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import threading

_NICE = 19


def main() -> int:
    """Entry of the process."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    parser = argparse.ArgumentParser(prog="tierfsd.mover")
    parser.add_argument("--state", required=True)
    parser.add_argument("--link-fd", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    arguments = parser.parse_args()
    os.nice(_NICE)  # before there are other threads, since it counts for each
    return _work(arguments, stopping)


def _work(arguments: argparse.Namespace, stopping: threading.Event) -> int:
    # Loaded only now: it takes a moment, and a signal must not end the process meanwhile. What is loaded stays:
    # nobody looks for garbage in it.
    gc.disable()
    from tierfs import volume
    from tierfs.errors import IndexDamagedError, TierError
    from tierfsd import logs
    from tierfsd.assembly import Mover
    from tierfsd.indexcare import INDEX_DAMAGED

    gc.freeze()
    gc.enable()
    logs.setup()
    try:
        home = volume.load(arguments.state)
        mover = Mover(home, arguments.link_fd, arguments.control_fd, stopping)
        mover.run()
    except (TierError, OSError) as exc:
        logging.getLogger("mover").critical("%s%s", logs.CANNOT_WORK, exc)
        return INDEX_DAMAGED if isinstance(exc, IndexDamagedError) else 1
    return INDEX_DAMAGED if mover.index_damaged else 0


if __name__ == "__main__":
    sys.exit(main())
