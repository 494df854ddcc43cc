"""`tierfs umount` of a volume that is just being mounted anew."""

from __future__ import annotations

import os

import pytest

from tierfs import locate
from tierfs.commands import mount as commands
from tierfs.errors import VolumeError

MOUNT = locate.Mount("/a/home", locate.FSTYPE, f"{locate.SOURCE_PREFIX}{'ab' * 16}", 0)


class Machine:
    """`there`: whether it is mounted at each look, the last one for ever; `ended`: the daemon has."""

    def __init__(self, monkeypatch, there, said="umount: /a/home: not mounted."):
        self.there, self.said, self.tries = list(there), said, 0
        self.reading, self.writing = os.pipe()
        monkeypatch.setattr(commands, "_run", self.run)
        monkeypatch.setattr(commands, "_daemon_of", lambda mount: os.dup(self.reading))
        monkeypatch.setattr(locate, "read_mounts", lambda: [MOUNT] if self.look() else [])
        monkeypatch.setattr(commands.os, "geteuid", lambda: 0)

    def look(self):
        return self.there.pop(0) if len(self.there) > 1 else self.there[0]

    def end(self):
        os.write(self.writing, b"x")

    def run(self, command, mountpoint):
        self.tries += 1
        if not self.look():
            raise VolumeError(f"{mountpoint}: cannot be unmounted: {self.said.split(': ')[-1]}")
        self.there = [False]
        self.end()

    def close(self):
        os.close(self.reading)
        os.close(self.writing)


@pytest.fixture
def machine(monkeypatch):
    made = []

    def make(*there, **more):
        made.append(Machine(monkeypatch, there, **more))
        return made[0]

    yield make
    made[0].close()


@pytest.mark.parametrize("said", ["umount: /a/home: not mounted.", "entry for /a/home not found in /etc/mtab"])
def test_it_is_waited_for_until_it_is_there_again(machine, said):
    one = machine(False, False, False, True, said=said)
    assert commands.unmount(MOUNT) == "" and one.tries == 2


def test_also_where_it_is_there_again_at_the_next_look(machine):
    one = machine(False, True)
    assert commands.unmount(MOUNT) == "" and one.tries == 2


def test_a_daemon_that_ends_instead_has_done_what_was_asked(machine):
    one = machine(False)
    one.end()
    assert commands.unmount(MOUNT) == "" and one.tries == 1


def test_it_is_not_waited_for_for_ever(machine, monkeypatch):
    monkeypatch.setattr(commands, "ANEW_SECONDS", 0.1)
    machine(False)
    with pytest.raises(VolumeError, match="not mounted"):
        commands.unmount(MOUNT)


def test_what_is_busy_is_said_at_once(machine):
    one = machine(False, said="umount: /a/home: target is busy.")
    with pytest.raises(VolumeError, match="busy"):
        commands.unmount(MOUNT)
    assert one.tries == 1
