"""What the service manager is told, where one wants to know (sd_notify)."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger("supervisor")


def notify(state: str) -> None:
    """Say how it is with us: READY=1, STOPPING=1."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as exc:
            log.warning("the service manager cannot be told %s: %s", state, exc)
