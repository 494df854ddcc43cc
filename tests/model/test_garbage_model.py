"""Collection beside everything that it races with: no object that anything refers to ever goes.

A real tree, index and gate; files are written, copied, demoted, replaced, deleted, copies given up, the mover
killed, time passes in leaps and clocks jump. A plain list says since when each version is one.
"""

from __future__ import annotations

import os
import shutil
import tempfile

from dating import DAY, AgingVolume
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tierfs import versions
from tierfs.errors import VolumeError

NAMES = st.sampled_from(["a", "b", "c"])
KEEP, GRACE = 5 * DAY, DAY


class GarbageMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.base = tempfile.mkdtemp(prefix="tierfs-model-")
        self.volume = AgingVolume(self.base, keep_versions=KEEP, grace=GRACE)
        self.now = 0.0
        self.content: dict[str, bytes] = {}
        self.count = 0
        self.ended: dict[str, float] = {}  # object -> since when no file has it
        self.had: set[str] = set()

    def teardown(self):
        if hasattr(self, "volume"):
            self.volume.stop()
            shutil.rmtree(self.base)

    def note(self):
        """Who lost its copy just now?"""
        self.volume.tier.drain()
        has = {self.volume.key(name) for name in self.content if self.copied(name)}
        for key in self.had - has:
            self.ended[key] = self.now
        self.had = has

    def copied(self, name):
        record = self.volume.record(name)
        return record is not None and record.copy is not None

    @rule(name=NAMES, copy=st.booleans())
    def write(self, name, copy):
        self.count += 1
        data = b"%d" % self.count * 100
        path = self.volume.path(name)
        (self.volume.server.write if name in self.content else self.volume.server.create)(path, data)
        self.content[name] = data + self.content.get(name, b"")[len(data) :]
        if copy:
            self.volume.demote(name, punch=False)
        self.note()

    @rule(name=NAMES, fail=st.booleans())
    def copy_out(self, name, fail):
        """Copied, or given up after the put."""
        if name not in self.content:
            return
        copier = self.volume.tier._copier
        real = copier._commit
        if fail:
            copier._commit = lambda taken: (_ for _ in ()).throw(VolumeError("given up"))
        try:
            self.volume.demote(name, punch=False)
        finally:
            copier._commit = real
        self.note()

    @rule(name=NAMES)
    def demote(self, name):
        if name in self.content:
            self.volume.demote(name)
            self.note()

    @rule(name=NAMES)
    def unlink(self, name):
        if name in self.content:
            self.volume.server.unlink(self.volume.path(name))
            del self.content[name]
            self.note()

    @rule(old=NAMES, new=NAMES)
    def replace(self, old, new):
        if old == new or old not in self.content:
            return
        if new in self.content:
            self.unlink(new)
        self.volume.server.rename(self.volume.path(old), self.volume.path(new))
        self.content[new] = self.content.pop(old)
        self.note()

    @rule(seconds=st.sampled_from([60.0, DAY, 3 * DAY, 4.5 * DAY]))
    def time_passes(self, seconds):
        self.now += seconds
        self.volume.pass_time(seconds)

    @rule(seconds=st.sampled_from([0.3 * DAY, DAY, 3.5 * DAY]), times=st.integers(1, 3))
    def time_passes_with_looks(self, seconds, times):
        for _ in range(times):
            self.time_passes(seconds)
            self.volume.collect()

    @rule(seconds=st.sampled_from([-2 * DAY, 100 * DAY]))
    def the_stores_clock_jumps(self, seconds):
        self.volume.store.date += seconds

    @rule()
    def collect(self):
        self.volume.collect()

    @rule(store_fails=st.booleans())
    def collect_and_die(self, store_fails):
        """Objects may be gone or not; the index does not know."""
        delete = self.volume.store.delete

        def die(keys):
            if not store_fails:
                delete(keys)
            raise VolumeError("killed")

        self.volume.store.delete = die
        try:
            self.volume.collect()
        except VolumeError:
            pass
        finally:
            self.volume.store.delete = delete
        self.volume.restart(clean=False)

    @rule()
    def mover_is_killed(self):
        self.volume.tier._copier._abandon = lambda items: None
        for name in self.content:
            self.copy_out(name, True)
        self.volume.restart(clean=False)

    @invariant()
    def all_that_is_needed_is_there(self):
        if not hasattr(self, "volume"):
            return
        objects = self.volume.objects()
        assert self.had <= objects
        for name, data in self.content.items():
            stub = self.volume.stub(name)
            if stub is not None:
                assert self.volume.store.get(stub.key) == data
        young = {key for key, at in self.ended.items() if self.now - at < KEEP}
        assert young <= objects, "a version went before its time"
        for key in young:
            version = self.volume.index.version(key)
            if version is not None:
                (kept,) = [k for k in versions.beneath(self.volume.tier.kit, b"") if k.key == key]
                assert b"".join(piece for _, piece in versions.content(self.volume.tier.kit, kept))


GarbageMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("TIERFS_EXAMPLES", "30")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestGarbage = GarbageMachine.TestCase
