"""A volume whose garbage ages as a test says: the store's dates and the time since boot are variables."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from tiering import Volume

from tierfs.collecting import Collector
from tierfs.errors import StoreFullError
from tierfs.model import object_key
from tierfs.store.memory import MemoryStore

DAY = 86400.0


class DatedStore(MemoryStore):
    """Its clock shows `date`; it takes `room` bytes in all."""

    def __init__(self):
        super().__init__()
        self.date, self.room = 1_000_000.0, 1 << 60

    @property
    def used(self):
        return sum(info.size for info in self.list(""))

    def put(self, key, body, size):
        if self.used + size > self.room:  # also in place of another: a quota does not know of that yet
            raise StoreFullError(f"{key}: the store is full")
        return super().put(key, body, size)

    def head(self, key):
        return replace(super().head(key), modified=self.date)


class AgingVolume(Volume):
    """`pass_time` lets both clocks go on; `collect` is one look."""

    def __init__(self, base, **settings):
        self.uptime, self.boot = 100.0, "boot"
        super().__init__(base, DatedStore(), **settings)

    def start(self, boot="boot", floor=0):
        super().start(boot, floor)
        self.index.commit(lambda w: w.set_surveyed(True)).result()
        self.collector = Collector(self.tier.kit, lambda: (self.uptime, self.boot))
        self.snapshots = 0
        self.snapshots_fail = False

    def take_snapshot(self):
        """As snapshots.py notes one that begins and ends now."""
        self.tier.kit.snapshot_wanted.clear()
        self.index.commit(lambda w: w.note_snapshot(w.past.beat)).result()
        self.snapshots += 1

    def configure(self, **settings):
        self.config = self.tier.kit.config = replaced(self.config, **settings)

    def pass_time(self, seconds):
        self.uptime += seconds
        self.store.date += seconds

    def collect(self):
        self.tier.drain()
        gone = self.collector.run(now=True)
        if self.tier.kit.snapshot_wanted.is_set() and not self.snapshots_fail:
            self.take_snapshot()
        return gone

    def objects(self):
        return {info.key for info in self.store.list("data/") if "." not in info.key}

    def write(self, name, data):
        """New content, copied out; the key of its object."""
        path = self.path(name)
        try:
            self.server.write(path, data)
        except FileNotFoundError:
            self.server.create(path, data)
        (item,) = self.demote(name, punch=False)
        assert not item.reason, item.reason
        return self.key(name)

    def key(self, name):
        record = self.record(name)
        copy = record.copy
        return object_key(record.fid, copy.generation, copy.tag)


def replaced(config, **settings):
    return msgspec.structs.replace(config, **settings)
