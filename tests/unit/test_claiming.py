"""The fence before each batch, and the look at the store before a mount."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
from tierfsd import assembly, claiming
from tierfsd.claiming import Fence, refuse_if_taken

from tierfs import config, ownership, volume
from tierfs.errors import StoreUnavailableError, VolumeError
from tierfs.store.directory import DirectoryStore

DAYS = 30 * 86400.0


def test_a_lost_store_is_lost_for_good():
    answers = [None, VolumeError("another's"), None]
    now = [0.0]

    def verify():
        answer = answers.pop(0)
        if answer:
            raise answer

    fence = Fence(verify, lambda: DAYS, clock=lambda: now[0])
    fence.check()
    fence.check()
    assert len(answers) == 2, "an answer is good for some seconds"
    now[0] += 60
    for _ in range(2):
        with pytest.raises(VolumeError, match="another's"):
            fence.check()
    assert len(answers) == 1


def test_silence_changes_nothing(monkeypatch):
    monkeypatch.setattr(claiming, "_WAIT_SECONDS", 0.05)
    release = threading.Event()

    def verify():
        release.wait(20)
        raise StoreUnavailableError("down")

    fence = Fence(verify, lambda: DAYS)
    begun = time.monotonic()
    fence.check()
    fence.check()
    assert time.monotonic() - begun < 10
    release.set()
    fence.check()


def test_silence_of_days_ends_it_until_the_store_is_heard_again():
    """Who has taken the store over by force removes then what this machine still goes by."""
    now, down = [0.0], [False]

    def verify():
        if down[0]:
            raise StoreUnavailableError("down")

    fence = Fence(verify, lambda: DAYS, clock=lambda: now[0])
    now[0] = 2 * DAYS
    fence.check()
    down[0] = True
    now[0] += DAYS
    fence.check()
    now[0] += 60
    with pytest.raises(VolumeError, match="has not answered for 720 hours"):
        fence.check()
    down[0] = False
    now[0] += 60
    fence.check()


@pytest.mark.parametrize(("ahead", "known"), [(3600, True), (2 * 86400, False), (400 * 86400, False)])
def test_how_long_a_silence_lasts_is_not_known_once_the_clock_was_set_back(home, ahead, known):
    """As by a battery that has run out: the machine may have been off for months."""
    made, _, store = home
    os.utime(made.path("claim.json"), (0, time.time() + ahead))
    down = [True]

    def verify():
        if down[0]:
            raise StoreUnavailableError("down")
        ownership.verify(made, store)

    now = [1000.0]
    fence = Fence(verify, lambda: DAYS, ownership.silence(made), clock=lambda: now[0])
    if known:
        fence.check()
        return
    with pytest.raises(VolumeError, match="has not answered since the clock was set back"):
        fence.check()
    down[0], now[0] = False, 1010.0
    fence.check()


@pytest.mark.parametrize(("kept", "days"), [("1d", 1), ("30d", 30), ("365d", 30)])
def test_silence_is_borne_no_longer_than_a_restored_machine_keeps_versions(kept, days):
    assert claiming.patience(config.parse(f'keep_versions = "{kept}"')) == days * 86400


@pytest.fixture
def home(tmp_path):
    """A volume on a directory store, once mounted, and a clone of it."""
    state = str(tmp_path / "state")
    volume.make_state(state)
    made = volume.create(state, store=f"file://{tmp_path}/store")
    store = DirectoryStore(str(tmp_path / "store"), create=True)
    ownership.create(made, store)
    made = volume.complete(made, store.capabilities)
    ownership.renew(made, store, 1)
    clone = volume.Volume(str(tmp_path / "clone"), made.identity)
    shutil.copytree(state, clone.state)
    return made, clone, store


def test_a_silence_goes_on_over_a_reboot(home):
    made, _, store = home
    assert ownership.silence(made) < 60
    note = made.path("claim.json")
    os.utime(note, (0, time.time() - 2 * DAYS))
    fence = Fence(lambda: ownership.verify(made, store), lambda: DAYS, ownership.silence(made))
    fence.check()
    ownership.note_heard(made)
    assert ownership.silence(made) < 60
    os.utime(note, (0, time.time() + 2 * DAYS))  # by a clock that has been set right since
    ownership.note_heard(made)
    assert abs(os.stat(note).st_mtime - time.time()) < 60
    os.utime(note, (0, time.time() - 2 * DAYS))

    def down():
        raise StoreUnavailableError("down")

    with pytest.raises(VolumeError, match="has not answered for 1440 hours"):
        Fence(down, lambda: DAYS, ownership.silence(made)).check()


def test_a_mount_is_refused_where_another_machine_has_the_store(home):
    made, clone, store = home
    refuse_if_taken(made, False)
    refuse_if_taken(clone, False)
    ownership.renew(made, store, 2)
    refuse_if_taken(made, False)
    with pytest.raises(VolumeError, match=r"is used by host .* since"):
        refuse_if_taken(clone, False)
    refuse_if_taken(clone, True)
    refuse_if_taken(clone, False)
    assert volume.last_epoch(clone.state) == 3 > 2, "above all that the other has used"
    with pytest.raises(VolumeError, match="is used by host"):
        refuse_if_taken(made, False)


@pytest.mark.parametrize("body", [b"<html>Log in to the hotel's network</html>", b"", b'{"volume": "12', b"[]"])
def test_a_store_that_answers_nonsense_is_not_lost(home, tmp_path, body):
    """As a login page does in its place: when that is over, work goes on by itself."""
    made, _, store = home
    kept = (tmp_path / "store/volume.json").read_bytes()
    (tmp_path / "store/volume.json").write_bytes(body)
    for ask in (ownership.verify, ownership.look, lambda *where: ownership.renew(*where, 2)):
        with pytest.raises(StoreUnavailableError, match="makes no sense"):
            ask(made, store)
    now = [0.0]
    fence = Fence(lambda: ownership.verify(made, store), lambda: DAYS, clock=lambda: now[0])
    fence.check()
    refuse_if_taken(made, False)
    (tmp_path / "store/volume.json").write_bytes(kept)
    now[0] += 60
    fence.check()
    ownership.renew(made, store, 2)


def test_a_store_that_answers_what_it_held_before_is_not_lost(home, tmp_path):
    """A cache in between, or a replica that lags: nobody has taken it."""
    made, clone, store = home
    file = tmp_path / "store/volume.json"
    before = file.read_bytes()
    ownership.renew(made, store, 2)
    now = file.read_bytes()
    file.write_bytes(before)
    with pytest.raises(StoreUnavailableError, match="as it was before this mount"):
        ownership.verify(made, store)
    refuse_if_taken(made, False)
    file.write_bytes(now)
    ownership.verify(made, store)
    ownership.take_over(clone, store, 3)
    with pytest.raises(VolumeError, match="is used by host"):
        ownership.verify(made, store)
    ownership.renew(clone, store, 4)
    with pytest.raises(VolumeError, match="is used by host"):
        ownership.verify(made, store)


def test_a_store_of_an_earlier_time_is_no_proof_of_any_copy(home, tmp_path):
    """As a NAS that was put back to a snapshot: what was copied since is gone from it. Not lost for good."""
    made, _, store = home
    file = tmp_path / "store/volume.json"
    before = file.read_bytes()
    ownership.renew(made, store, 2)
    now, clock = file.read_bytes(), [0.0]
    fence = Fence(lambda: ownership.verify(made, store), lambda: DAYS, clock=lambda: clock[0])
    fence.check()
    file.write_bytes(before)
    clock[0] += 60
    for _ in range(2):
        with pytest.raises(VolumeError, match=r"as it was before this mount: if .* --force"):
            fence.check()
    file.rename(tmp_path / "away")
    clock[0] += 60
    with pytest.raises(VolumeError, match="as it was before this mount"):
        fence.check()
    file.write_bytes(now)
    clock[0] += 60
    fence.check()


def test_a_store_that_is_away_hinders_no_mount_but_a_takeover(home, tmp_path):
    made, _, _ = home
    shutil.move(tmp_path / "store", tmp_path / "away")
    refuse_if_taken(made, False)
    with pytest.raises(VolumeError, match=r"cannot be taken over now: .*does not exist"):
        refuse_if_taken(made, True)


def test_a_store_that_hangs_hinders_no_mount(home, monkeypatch):
    made, _, _ = home
    monkeypatch.setattr(claiming, "_MOUNT_SECONDS", 0.2)
    monkeypatch.setattr(claiming, "_look", lambda home, force: time.sleep(60))
    begun = time.monotonic()
    refuse_if_taken(made, False)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("view", [False, True])
def test_where_a_store_is_that_is_gone_again_is_looked_at_until_it_is_known(home, monkeypatch, view):
    """As with a NAS whose disk answers one call and not the next."""
    made, _, store = home
    identity = SimpleNamespace(view=view)
    kit = SimpleNamespace(withheld="not yet", claim_tried=threading.Event())
    mover = assembly.Mover.__new__(assembly.Mover)
    mover.stopping, mover._claiming, mover._store = threading.Event(), threading.Lock(), store
    mover._home = made if not view else SimpleNamespace(identity=identity, store_url=made.store_url)
    mover._index = SimpleNamespace(session=SimpleNamespace(epoch=2))
    mover._tier = SimpleNamespace(kit=kit)
    mover._scheduler = SimpleNamespace(space=SimpleNamespace(beside=None))
    mover._tree = SimpleNamespace(device=os.stat(made.state).st_dev)
    answers = [OSError(116, "Stale file handle"), OSError(2, "No such file or directory")]
    real = assembly._device_of

    def device_of(url):
        if answers:
            raise answers.pop()
        return real(url)

    monkeypatch.setattr(assembly, "_device_of", device_of)
    monkeypatch.setattr(assembly, "_CLAIM_SECONDS", 0.01)
    mover._claim()
    assert mover._scheduler.space.beside is True and kit.claim_tried.is_set()
    assert bool(kit.withheld) is view


def test_on_a_full_disk_there_is_made_room_for_the_note_of_the_claim(home, monkeypatch):
    """Nothing may be copied out before, so that nothing that is dirty could leave."""
    made, _, store = home
    mover = assembly.Mover.__new__(assembly.Mover)
    mover.stopping, mover._claiming, mover._store = threading.Event(), threading.Lock(), store
    mover._home, mover._index = made, SimpleNamespace(session=SimpleNamespace(epoch=2))
    mover._tier = SimpleNamespace(kit=SimpleNamespace(withheld="not yet", claim_tried=threading.Event()))
    mover._scheduler = SimpleNamespace(space=SimpleNamespace(beside=True), eviction=SimpleNamespace())
    withheld, real, full = [], ownership.write_json, [True]

    def write_json(path, value, **how):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, value, **how)

    def make_room(count, failed):
        withheld.append(mover._tier.kit.withheld)
        assert count > 0 and failed and mover._tier.kit.claim_tried.is_set()
        full.clear()

    mover._scheduler.eviction.make_room = make_room
    monkeypatch.setattr(ownership, "write_json", write_json)
    monkeypatch.setattr(assembly, "_CLAIM_SECONDS", 0.01)
    mover._claim()
    assert withheld == [f"{made.state}: No space left on device"]
    assert not mover._tier.kit.withheld
