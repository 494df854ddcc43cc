"""Hot reload: notices that the volume's configuration has changed, by whichever way an editor saves."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from tierfs import config
from tierfs.errors import ConfigError

log = logging.getLogger("config")

_SETTLE_SECONDS = 0.1  # an editor truncates, writes and renames: read when it has done


class ConfigWatcher(FileSystemEventHandler):
    """Calls `apply` with each new valid configuration. A bad one is reported by `problem` and changes nothing.

    `problem` is "" while the file is good. Where it is bad from the beginning (a mover that was restarted) the
    defaults hold: with them nothing is demoted but for want of space. Safe to use from several threads.
    """

    def __init__(self, path: str, store: str, apply: Callable[[config.VolumeConfig], None]) -> None:
        """`store` is the volume's, which no configuration changes."""
        self.problem = ""
        self._path = os.path.realpath(path)
        self._store = store
        self._apply = apply
        try:
            self.current = self._read()
        except ConfigError as exc:
            log.error("%s; the default settings are in force", exc)
            self.problem = str(exc)
            self.current = config.VolumeConfig(store=store)
        self._lock = threading.Lock()
        self._observer = Observer()

    def start(self) -> None:
        """Watch in a thread of its own. Where the kernel has no watch left this is logged; `reload` works."""
        try:
            self._observer.schedule(self, os.path.dirname(self._path))
            self._observer.start()
        except OSError as exc:
            log.warning("changes of %s are seen only on SIGHUP: %s", self._path, exc)

    def close(self) -> None:
        """Stop watching."""
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join()

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Called by watchdog's thread for everything in the state directory."""
        if event.event_type in ("opened", "closed_no_write"):
            return
        if self._path in (os.fsdecode(event.src_path), os.fsdecode(event.dest_path)):
            time.sleep(_SETTLE_SECONDS)
            said = self.problem
            try:
                self.reload()
            except ConfigError as exc:
                if self.problem != said:  # a save makes several events
                    log.error("%s; the former settings stay in force", exc)

    def reload(self) -> None:
        """Read the file now. Raises ConfigError where it is bad."""
        with self._lock:
            try:
                fresh = self._read()
            except ConfigError as exc:
                self.problem = str(exc)
                raise
            self.problem = ""
            if fresh != self.current:
                self.current = fresh
                self._apply(fresh)
                log.info("new settings are in force")

    def _read(self) -> config.VolumeConfig:
        fresh = config.load(self._path)
        if fresh.store != self._store:
            raise ConfigError(f"{self._path}: store: is fixed when the volume is created: put it back")
        return fresh
