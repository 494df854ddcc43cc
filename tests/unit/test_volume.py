"""State directories, ownership of stores, mountpoints and the mount table."""

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tierfs import adoption, locate, ownership, syscalls, volume
from tierfs.commands import home as commands_home
from tierfs.commands.home import adopt, leave
from tierfs.errors import PathError, PreconditionError, StoreUnavailableError, VolumeError
from tierfs.store.memory import MemoryStore
from tierfs.store.urls import open_store


@pytest.fixture
def state(tmp_path):
    path = str(tmp_path / "state")
    volume.make_state(path)
    return path


def complete(made, store):
    ownership.create(made, store)
    return volume.complete(made, store.capabilities)


def test_a_new_volume_is_private_and_claims_its_store(state):
    store = MemoryStore()
    made = volume.create(state, local_limit="1G")
    assert not made.identity.complete
    finished = complete(made, store)
    assert finished.identity.complete
    assert volume.load(state) == finished
    assert json.loads(store.get("volume.json"))["volume"] == finished.identity.volume
    assert stat.S_IMODE(os.stat(state).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(finished.path("config.toml")).st_mode) == 0o600


def test_a_store_of_another_volume_is_refused_and_named(tmp_path):
    store = MemoryStore()
    for name in ("one", "two"):
        volume.make_state(str(tmp_path / name))
    complete(volume.create(str(tmp_path / "one")), store)
    second = volume.create(str(tmp_path / "two"))
    with pytest.raises(VolumeError, match=r"belongs to volume .* of host .*tierfs restore"):
        complete(second, store)
    assert not volume.load(str(tmp_path / "two")).identity.complete


def test_creation_interrupted_after_the_store_was_claimed_is_finished_by_trying_again(state):
    store = MemoryStore()
    made = volume.create(state)
    complete(made, store)
    again = complete(volume.Volume(state, made.identity), store)
    assert again.identity.volume == made.identity.volume


def test_a_store_without_our_mark_is_down_and_not_created_again(state):
    made = volume.create(state)
    with pytest.raises(StoreUnavailableError, match="not this volume's store, or is not mounted"):
        ownership.check(made, MemoryStore())


def test_a_store_with_a_strange_mark_is_refused(state):
    store = MemoryStore()
    store.put("volume.json", b"[]", 2)
    with pytest.raises(VolumeError, match="not ours"):
        complete(volume.create(state), store)


def test_each_mount_takes_the_store_and_a_clone_is_refused(tmp_path, state):
    store = MemoryStore()
    mine = complete(volume.create(state), store)
    ownership.renew(mine, store, 1)
    clone = volume.Volume(str(tmp_path / "clone"), mine.identity)
    shutil.copytree(state, clone.state)
    ownership.renew(mine, store, 2)
    ownership.renew(mine, store, 3)
    with pytest.raises(VolumeError, match=r"is used by host .* since .*--force"):
        ownership.renew(clone, store, 2)
    assert json.loads(store.get("volume.json"))["epoch"] == 3


def test_a_mount_interrupted_while_it_takes_the_store_is_not_a_clone(state, monkeypatch):
    store = MemoryStore()
    mine = complete(volume.create(state), store)
    ownership.renew(mine, store, 1)
    real = ownership.write_json
    for crash_at in (1, 2):
        calls = []

        def crash(path, value, crash_at=crash_at, calls=calls, **how):
            calls.append(path)
            if len(calls) == crash_at:
                raise KeyboardInterrupt
            real(path, value, **how)

        monkeypatch.setattr(ownership, "write_json", crash)
        with pytest.raises(KeyboardInterrupt):
            ownership.renew(mine, store, 2)
        monkeypatch.setattr(ownership, "write_json", real)
        ownership.renew(mine, store, 3)


def test_who_takes_over_fences_who_had_it(tmp_path, state):
    store = MemoryStore()
    mine = complete(volume.create(state), store)
    ownership.renew(mine, store, 1)
    clone = volume.Volume(str(tmp_path / "clone"), mine.identity)
    shutil.copytree(state, clone.state)
    ownership.renew(mine, store, 2)
    ownership.verify(mine, store)
    ownership.take_over(clone, store, 3)
    ownership.verify(clone, store)
    with pytest.raises(VolumeError, match="is used by host"):
        ownership.verify(mine, store)
    with pytest.raises(VolumeError, match="is used by host"):
        ownership.renew(mine, store, 4)
    ownership.renew(clone, store, 5)
    assert json.loads(store.get("volume.json"))["epoch"] == 5


@pytest.mark.parametrize("conditional", [True, False])
def test_of_two_that_take_a_store_at_the_same_moment_one_is_refused(tmp_path, state, conditional):
    """The other one comes between our look and our write."""
    store = MemoryStore()
    mine = complete(volume.create(state), store)
    clone = volume.Volume(str(tmp_path / "clone"), mine.identity)
    shutil.copytree(state, clone.state)
    real = store.put_if

    def meanwhile(key, body, etag):
        store.put_if = real
        if conditional:
            ownership.renew(clone, store, 1)
            return real(key, body, etag)
        put = store.put(key, body, len(body))
        ownership.take_over(clone, store, 1)
        return put

    store.capabilities = replace(store.capabilities, conditional_put=conditional)
    store.put_if = meanwhile
    with pytest.raises(VolumeError, match="another machine is taking"):
        ownership.renew(mine, store, 1)
    ownership.verify(clone, store)


@pytest.mark.parametrize("refusals", [1, 2])
def test_a_refusal_although_nobody_has_taken_the_store_is_not_for_good(state, refusals):
    """As S3 answers when two requests are in each other's way."""
    store = MemoryStore()
    mine = complete(volume.create(state), store)
    real, left = store.put_if, [PreconditionError("409")] * refusals

    def busy(key, body, etag):
        if left:
            raise left.pop()
        return real(key, body, etag)

    store.put_if = busy
    if refusals > 1:
        with pytest.raises(StoreUnavailableError, match="although nobody else"):
            ownership.renew(mine, store, 1)
    ownership.renew(mine, store, 1)
    ownership.verify(mine, store)
    assert json.loads(store.get("volume.json"))["epoch"] == 1


def test_who_takes_a_store_while_its_claim_is_being_read_is_not_written_over(tmp_path, state, monkeypatch):
    """What is compared at the write is what the claim was read from, not what has come since."""
    store = MemoryStore()
    mine = complete(volume.create(state), store)
    clone = volume.Volume(str(tmp_path / "clone"), mine.identity)
    shutil.copytree(state, clone.state)
    read = ownership.check

    def read_and_wait(*which):
        found = read(*which)
        monkeypatch.undo()
        ownership.renew(clone, store, 1)
        return found

    monkeypatch.setattr(ownership, "check", read_and_wait)
    with pytest.raises(VolumeError, match="another machine is taking"):
        ownership.renew(mine, store, 1)
    ownership.verify(clone, store)


def test_epochs_outlive_the_index(state):
    assert volume.last_epoch(state) == 0
    volume.keep_epoch(state, 7)
    assert volume.last_epoch(state) == 7


def test_a_directory_with_other_content_is_no_state_directory(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(VolumeError, match="neither a volume nor empty"):
        volume.create(str(tmp_path))


NEWER = '{"format": 9, "volume": "a", "store": "s", "created": 1, "host": "h"}'


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"volume": 1', NEWER])
def test_a_damaged_volume_file_is_one_clear_error(state, content):
    with open(os.path.join(state, "volume.json"), "w") as file:
        file.write(content)
    with pytest.raises(VolumeError, match=r"damaged|format 9"):
        volume.load(state)


def test_what_may_not_be_looked_into_is_not_called_no_volume(state, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    assert not volume.exists(state) and not volume.exists(f"{state}/volume.json")
    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(VolumeError, match="is closed to you: act as its owner or as root"):
        volume.exists(state)


def test_a_new_volume_does_not_lie_in_another(monkeypatch):
    mounts = [locate.Mount("/", "ext4", "x", 0), locate.Mount("/vol", locate.FSTYPE, "tierfs#abc", 0)]
    monkeypatch.setattr(locate, "read_mounts", lambda: mounts)
    volume.check_state_place("/var/lib/tierfs/x")
    with pytest.raises(VolumeError, match="would lie in the TierFS volume at /vol: choose another --state"):
        volume.check_state_place("/vol/.tierfs-vol-d")


def test_a_store_is_not_taken_for_a_damaged_state_directory(tmp_path, state):
    """Each has a volume.json."""
    where = tmp_path / "a store"
    with contextlib.closing(open_store(f"file://{tmp_path}/a%20store", create=True)) as store:
        complete(volume.create(state), store)
        with pytest.raises(VolumeError) as refused:
            volume.load(str(where))
    assert str(refused.value) == (
        f"{where}: is the store of a volume, not its state directory: name that one, or have one made with"
        f" `tierfs restore --store file://{tmp_path}/a%20store DIR`"
    )


def test_stubs_that_this_process_would_not_see_are_refused(state):
    made = complete(volume.create(state), MemoryStore())
    assert made.identity.attributes == ""  # of a version that did not note it
    kept = volume.keep_attributes(made, "user")
    assert volume.load(state).identity == kept.identity and kept.identity.attributes == "user"
    assert volume.keep_attributes(volume.load(state), "user") == kept
    with pytest.raises(VolumeError, match="without root's privileges"):
        volume.keep_attributes(kept, "trusted")
    assert volume.load(state).identity == kept.identity


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_on_a_full_disk_the_namespace_of_attributes_is_noted_later(state, monkeypatch, error):
    made, before = complete(volume.create(state), MemoryStore()), Path(state, "volume.json").read_bytes()

    def refuse(*given):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as full:
        full.setattr(volume, "_write", refuse)
        if error == errno.EIO:
            with pytest.raises(OSError, match="Input/output"):
                volume.keep_attributes(made, "user")
        else:
            assert volume.keep_attributes(made, "user") == made
    assert Path(state, "volume.json").read_bytes() == before
    assert volume.keep_attributes(made, "user").identity.attributes == "user"


def test_the_lock_is_held_once_and_names_the_user(state):
    first = volume.lock(state)
    volume.write_runtime(state, {"mountpoint": "/home/ann"})
    with pytest.raises(VolumeError, match="in use by the mount at /home/ann"):
        volume.lock(state)
    os.close(first)
    os.close(volume.lock(state))


def test_who_ends_is_waited_for_and_named_where_it_does_not(state, monkeypatch):
    """A daemon whose mount has gone: detached with files open it stays."""
    volume.create(state)
    first = volume.lock(state)
    volume.write_runtime(state, {"mountpoint": "/home/ann", "pids": {"supervisor": os.getpid()}})
    ending = threading.Timer(0.3, os.close, [first])
    ending.start()
    second = volume.lock(state)
    ending.join()
    monkeypatch.setattr(volume, "_END_SECONDS", 0.2)
    with pytest.raises(VolumeError, match=f"not yet let go by process {os.getpid()}, .* open at /home/ann"):
        volume.lock(state)
    os.close(second)


def test_what_may_be_written_in_place_needs_no_room(state, monkeypatch):
    """On a full disk it goes into the sectors of the former file; what may not fails, and leaves nothing."""
    path, real, number = os.path.join(state, "note"), volume._write, [errno.ENOSPC]
    volume.write_json(path, {"a": 1}, in_place=True)
    assert os.path.getsize(path) == 512
    inode = os.stat(path).st_ino

    def write(where, flags, text, sync):
        real(where, flags, text, sync)
        if where.endswith(".new"):
            raise OSError(number[0], os.strerror(number[0]))

    monkeypatch.setattr(volume, "_write", write)
    for size in (10, 2000, 20):
        volume.write_json(path, {"a": "x" * size}, in_place=True)
        with open(path) as file:
            assert json.load(file) == {"a": "x" * size}
        assert os.path.getsize(path) % 512 == 0 and os.stat(path).st_ino == inode
    with pytest.raises(OSError, match="No space"):
        volume.write_json(path, {"a": 2})
    number[0] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        volume.write_json(path, {"a": 2}, in_place=True)
    assert os.path.getsize(path) == 512 and not os.path.exists(path + ".new")


@pytest.mark.parametrize("former", [30, 130, 1500])
def test_what_is_written_in_place_is_whole_after_a_power_cut(state, monkeypatch, former):
    """Of a file as former versions wrote it, without spaces to a whole sector. What was written since the last
    sync may be on the disk or not, and the length by itself as well."""
    path, new = os.path.join(state, "note"), {"a": "y" * 200}
    old = {"a": "x" * former}
    with open(path, "w") as file:
        json.dump(old, file)
    real, write, synced = os.pwrite, volume._write, [Path(path).read_bytes()]

    def after_a_cut(fd, data, offset):
        """The same, and what the disk may hold if the power fails before the next sync."""
        count = real(fd, data, offset)
        whole, durable = Path(path).read_bytes(), synced[-1]
        for lasting in (durable, whole[: len(durable)], whole):
            assert json.loads(lasting) in (old, new)
        return count

    def full(where, flags, text, sync):
        if where.endswith(".new"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(where, flags, text, sync)

    monkeypatch.setattr(volume, "_write", full)
    monkeypatch.setattr(os, "pwrite", after_a_cut)
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(path).read_bytes()))
    volume.write_json(path, new, in_place=True)
    assert json.loads(Path(path).read_bytes()) == new and os.path.getsize(path) == 512
    assert json.loads(synced[-1]) == new and len(synced) == (3 if former < 500 else 2)


def test_discarding_keeps_a_tree(state):
    volume.create(state)
    os.mkdir(os.path.join(state, "tree"))
    volume.discard(state)
    assert not volume.exists(state)
    assert "tree" in os.listdir(state)


@pytest.mark.parametrize("path", ["/home/ann", "/home/ann b/.x", "/.a", "/", "/a-b//c/", "/ä/\udcff\n"])
def test_names_are_escaped_as_systemd_does(path):
    escaped = volume.escape_path(path)
    assert "/" not in escaped and escaped.isascii() and escaped.isprintable()
    try:
        expected = subprocess.run(
            ["systemd-escape", "--path", "--", os.fsencode(path)], capture_output=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return
    assert escaped == expected.stdout.decode().rstrip("\n")


def test_very_long_paths_still_make_a_name_and_different_ones():
    one, two = (volume.escape_path("/" + "x/" * 300 + end) for end in "ab")
    assert one != two and len(one) <= 200


def test_mountpoints_that_cannot_be_used(tmp_path):
    state = str(tmp_path / "state")
    with pytest.raises(VolumeError, match="does not exist: create it"):
        volume.check_mountpoint(str(tmp_path / "none"), state)
    (tmp_path / "file").write_text("")
    with pytest.raises(VolumeError, match="is not a directory"):
        volume.check_mountpoint(str(tmp_path / "file"), state)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(VolumeError, match=r"not empty.*tierfs adopt"):
        volume.check_mountpoint(str(tmp_path / "full"), state)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="state directory lies inside the mountpoint"):
        volume.check_mountpoint(str(tmp_path / "empty"), str(tmp_path / "empty" / "s"))
    with pytest.raises(VolumeError, match="lies inside the state directory"):
        volume.check_mountpoint(str(tmp_path / "empty"), str(tmp_path))
    volume.check_mountpoint(str(tmp_path / "empty"), state)


# --- the mount table -------------------------------------------------------------------------------------

TABLE = b"""\
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:50 / /home/ann rw,nosuid,nodev shared:7 - fuse.tierfs tierfs#abc rw,user_id=1000,group_id=1000
41 40 0:51 / /home/ann/usb\\040stick rw - vfat /dev/sdb1 rw
43 22 0:50 /d/e /srv/part rw,nosuid,nodev shared:7 - fuse.tierfs tierfs#abc rw,user_id=1000,group_id=1000
42 22 0:52 / /mnt/a\\134b\\012c rw - fuse.tierfs tierfs#def rw,user_id=0,group_id=0,allow_other
"""


@pytest.fixture
def mounts(tmp_path):
    (tmp_path / "table").write_bytes(TABLE)
    return locate.read_mounts(str(tmp_path / "table"))


def test_the_mount_table_is_read_with_its_escapes(mounts):
    assert [mount.mountpoint for mount in mounts] == [
        "/", "/home/ann", "/home/ann/usb stick", "/srv/part", "/mnt/a\\b\nc",
    ]  # fmt: skip
    assert [mount.volume for mount in mounts] == ["", "abc", "", "abc", "def"]
    assert mounts[1].uid == 1000


def test_paths_find_their_volume(mounts):
    assert locate.locate("/home/ann", mounts).relative == b""
    place = locate.locate("/home/ann/a/b c", mounts)
    assert (place.mount.volume, place.relative) == ("abc", b"a/b c")
    for path in ("/home/anna", "/home", "/home/ann/usb stick/x", "/tmp"):
        with pytest.raises(PathError, match="not in a mounted TierFS volume"):
            locate.locate(path, mounts)


def test_a_part_that_is_bound_to_another_place_is_that_part(mounts, monkeypatch):
    place = locate.locate("/srv/part/f", mounts)
    assert (place.mount.volume, place.relative) == ("abc", b"d/e/f")
    assert locate.locate("/srv/part", mounts).relative == b"d/e"
    assert place.mount.shown(b"d/e/f/g") == "/srv/part/f/g" and place.mount.shown(b"d/e") == "/srv/part"
    assert mounts[1].shown(b"d/e") == "/home/ann/d/e" and mounts[1].shown(b"") == "/home/ann"
    monkeypatch.setattr(locate, "read_mounts", lambda: mounts)
    assert [mount.mountpoint for mount in locate.tier_mounts()] == ["/home/ann", "/mnt/a\\b\nc"]


def test_a_link_from_outside_leads_into_a_volume(mounts, tmp_path):
    (tmp_path / "volume" / "d").mkdir(parents=True)
    (tmp_path / "volume" / "link").symlink_to("d")
    (tmp_path / "outside").symlink_to("volume")
    root = os.path.realpath(tmp_path)
    here = [*mounts, locate.Mount(f"{root}/volume", locate.FSTYPE, "tierfs#xyz", 0)]
    assert locate.locate(str(tmp_path / "outside"), here).relative == b""
    assert locate.locate(str(tmp_path / "outside" / "d"), here).relative == b"d"
    assert locate.locate(str(tmp_path / "volume" / "link"), here).relative == b"link"


def test_a_covered_mount_is_not_found(mounts):
    over = locate.Mount("/home/ann", "tmpfs", "tmpfs", 0)
    with pytest.raises(PathError):
        locate.locate("/home/ann/x", [*mounts, over])


def test_links_on_the_way_are_followed_and_a_link_itself_is_meant(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    real = os.path.realpath(tmp_path)
    assert locate.resolve(str(tmp_path / "link" / "x")) == f"{real}/real/x"
    assert locate.resolve(str(tmp_path / "link")) == f"{real}/link"
    assert locate.resolve(str(tmp_path / "link") + "/") == f"{real}/real"
    monkeypatch.chdir(tmp_path / "real")
    assert locate.resolve("x") == f"{real}/real/x"
    assert locate.resolve(".") == f"{real}/real"
    assert locate.resolve("..") == real


def test_a_link_in_the_place_of_a_state_directory_is_not_followed(tmp_path):
    """Who may write beside a mountpoint could have root close, and then use, whatever the link leads to."""
    aim = tmp_path / "aim"
    aim.mkdir(0o755)
    (tmp_path / "state").symlink_to(aim)
    for use in (volume.make_state, volume.lock):
        with pytest.raises(VolumeError, match="symbolic link"):
            use(str(tmp_path / "state"))
    assert stat.S_IMODE(aim.stat().st_mode) == 0o755 and not list(aim.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="gives directories to others")
def test_a_state_directory_of_another_user_is_not_written_to(tmp_path):
    state = tmp_path / "state"
    state.mkdir(0o700)
    os.chown(state, 4711, 4711)
    (state / "lock").symlink_to(tmp_path / "made")
    for use in (volume.make_state, volume.lock):
        with pytest.raises(VolumeError, match="belongs to another user"):
            use(str(state))
    os.chown(state, 0, 0)
    with pytest.raises(VolumeError, match="cannot be opened"):
        volume.lock(str(state))
    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives directories to others")
@pytest.mark.parametrize(
    ("owner", "mode", "safe"), [(0, 0o755, True), (0, 0o1777, True), (0, 0o777, False), (4711, 0o700, False)]
)
def test_what_root_adopts_is_kept_where_nobody_else_can_replace_it(tmp_path, monkeypatch, owner, mode, safe):
    above = tmp_path / "above"
    (above / "between").mkdir(parents=True)
    os.chmod(above, mode)
    os.chown(above, owner, owner)
    launched = []
    monkeypatch.setattr(commands_home.launch, "launch", lambda arguments, real: launched.append(arguments[1]))
    for home in (above / "home", above / "between" / "home"):
        home.mkdir()
        state = volume.adopted_state(str(home))
        if safe:
            adopt.callback(None, None, str(home))
        else:
            with pytest.raises(VolumeError, match=f"{above}: may be changed by others"):
                adopt.callback(None, None, str(home))
            adopt.callback(None, state, str(home))
        assert launched.pop() == state


# --- adoption --------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    directory = tmp_path / "home"
    directory.mkdir(0o750)
    (directory / "letter").write_text("dear")
    return str(directory)


def test_adoption_can_be_finished_after_a_crash_at_any_step(home):
    state = volume.adopted_state(home)
    adoption.check_directory(home, state)
    adoption.begin(home, state)
    adoption.finish(home, state)  # a crash before the rename: nothing has moved, nothing is changed
    assert os.listdir(home) == ["letter"]
    adoption.move(home, state)
    assert not os.path.exists(home)
    adoption.finish(home, state)  # a crash after it
    assert os.listdir(home) == []
    assert stat.S_IMODE(os.stat(home).st_mode) == 0o555
    assert os.listdir(os.path.join(state, "tree")) == ["letter"]
    assert stat.S_IMODE(os.stat(os.path.join(state, "tree")).st_mode) == 0o750
    assert adoption.read_intent(state) is None
    adoption.finish(home, state)


def test_adoption_never_covers_what_came_in_between(home):
    state = volume.adopted_state(home)
    adoption.begin(home, state)
    adoption.move(home, state)
    os.mkdir(home)
    with open(os.path.join(home, "new"), "w"):
        pass
    with pytest.raises(VolumeError, match="was filled"):
        adoption.finish(home, state)


def test_a_directory_whose_files_have_names_elsewhere_is_not_adopted(home, tmp_path):
    """Those names are of the same blocks: given up here, they would be files of zeros there."""
    inner = os.path.join(home, "inner")
    os.mkdir(inner)
    os.link(os.path.join(home, "letter"), os.path.join(inner, "same"))
    os.symlink(home, os.path.join(inner, "around"))
    adoption.check_links(home)
    os.link(os.path.join(home, "letter"), tmp_path / "elsewhere")
    with pytest.raises(VolumeError, match=r"1 files in it have other names \(hard links\) .*, as '.*/home/"):
        adoption.check_links(home)
    adoption.check_links(str(tmp_path))


def test_a_file_that_goes_meanwhile_hides_no_names_of_others(tmp_path, monkeypatch):
    for name in ("a", "z"):
        (tmp_path / name).write_bytes(b"")
    os.link(tmp_path / "a", tmp_path / "b")
    usual = os.scandir

    @contextlib.contextmanager
    def scandir(path):
        with usual(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name != "z")
            (tmp_path / "z").unlink()
            yield iter([found[1], found[0], found[2]])

    monkeypatch.setattr(os, "scandir", scandir)
    adoption.check_links(str(tmp_path))
    assert not (tmp_path / "z").exists()


def test_a_link_in_the_place_of_what_is_adopted_gets_no_owner(home, tmp_path):
    """Who owns the directory above may put one there between two steps; it leads to an empty directory."""
    aim = tmp_path / "aim"
    aim.mkdir(0o755)
    state = volume.adopted_state(home)
    adoption.begin(home, state)
    adoption.move(home, state)
    os.symlink(aim, home)
    with pytest.raises(VolumeError, match="was filled"):
        adoption.finish(home, state)
    assert stat.S_IMODE(aim.stat().st_mode) == 0o755 and adoption.read_intent(state) is not None


def test_giving_back_restores_the_very_directory(home):
    state = volume.adopted_state(home)
    inode = os.stat(home).st_ino
    adoption.begin(home, state)
    adoption.move(home, state)
    adoption.finish(home, state)
    tree = os.path.join(state, "tree")
    os.setxattr(tree, "user.tierfs_pin", b"1")
    assert adoption.find_stubs(tree) == []
    adoption.strip(tree)
    adoption.give_back(home, state)
    assert os.stat(home).st_ino == inode
    assert os.listxattr(home) == []
    with open(os.path.join(home, "letter")) as file:
        assert file.read() == "dear"


@pytest.fixture
def story(tmp_path, monkeypatch):
    """What is done to names and what is synced, in this order: a power cut leaves all up to some point."""
    told = []

    def name(path):
        return os.path.relpath(path, tmp_path)

    def note(call, tell):
        usual = getattr(os, call)

        def do(*given, **more):
            usual(*given, **more)
            told.append(tell(*given))

        monkeypatch.setattr(os, call, do)

    note("fsync", lambda fd: f"sync {name(os.readlink(f'/proc/self/fd/{fd}'))}")
    for call in ("rename", "replace"):
        note(call, lambda old, new: f"{name(old)} -> {name(new)}")
    note("unlink", lambda path: f"remove {name(path)}")
    note("mkdir", lambda path, mode=0o777: f"make {name(path)}")
    return told


def test_the_order_of_an_adoption_and_of_leaving(home, story):
    """Each step is on the disk before the next one begins that relies on it."""
    state = volume.adopted_state(home)
    volume.make_state(state)
    where, intent = os.path.basename(state), f"{os.path.basename(state)}/adopting.json"
    story.clear()
    adoption.begin(home, state)
    assert story == [f"sync {intent}.new", f"{intent}.new -> {intent}", f"sync {where}", "sync ."]
    story.clear()
    adoption.move(home, state)
    adoption.finish(home, state)
    assert story == [f"home -> {where}/tree", "make home", "sync .", f"sync {where}", f"remove {intent}"]
    story.clear()
    os.rmdir(home)
    adoption.give_back(home, state)
    assert story == [f"sync {where}/given", f"{where}/tree -> home", "sync .", f"sync {where}"]


def test_a_new_state_directory_is_on_the_disk_before_anything_in_it(tmp_path, story):
    volume.make_state(str(tmp_path / "a" / "state"))
    assert story == ["make a", "sync .", "make a/state", "sync a"]
    volume.make_state(str(tmp_path / "a" / "state"))
    assert len(story) == 4


def test_what_is_written_of_a_volume_is_on_the_disk_when_that_returns(tmp_path, story):
    volume.write_json(str(tmp_path / "a"), {"b": 1})
    assert story == ["sync a.new", "a.new -> a", "sync ."]
    story.clear()
    volume.write_json(str(tmp_path / "a"), {"b": 2}, sync=False)
    assert story == ["a.new -> a"]


def test_stubs_are_found_wherever_they_are(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "stub").write_text("")
    (tmp_path / "plain").write_text("")
    os.setxattr(tmp_path / "a" / "b" / "stub", "user.tierfs", b"\1")
    assert adoption.find_stubs(str(tmp_path)) == ["a/b/stub"]


@pytest.mark.parametrize("directory", ["/", "/proc", "/dev"])
def test_directories_that_cannot_be_adopted(directory, tmp_path):
    with pytest.raises(VolumeError, match=r"mountpoint|root directory"):
        adoption.check_directory(directory, str(tmp_path / "s"))


def test_adopting_what_is_no_directory_or_holds_the_state(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VolumeError, match="not a directory"):
        adoption.check_directory(str(tmp_path / "file"), str(tmp_path / "s"))
    with pytest.raises(VolumeError, match="does not exist"):
        adoption.check_directory(str(tmp_path / "none"), str(tmp_path / "s"))
    with pytest.raises(VolumeError, match="lies inside the directory"):
        adoption.check_directory(str(tmp_path), str(tmp_path / "s"))


def test_a_state_directory_that_only_root_may_make(tmp_path, monkeypatch):
    """As beside a user's own home, which only root can adopt."""
    monkeypatch.setattr(os, "mkdir", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(VolumeError, match="only root may make the state directory there: act as root"):
        volume.make_state(str(tmp_path / ".tierfs-home-ann"))


def test_what_was_written_beneath_a_mount_is_told_from_a_directory_to_adopt(tmp_path, monkeypatch):
    """While its volume was not mounted: adopted, it would hide that volume."""
    monkeypatch.setattr(volume, "default_state", lambda mountpoint: str(tmp_path / "state"))
    mountpoint, state = tmp_path / "mnt", str(tmp_path / "state")
    mountpoint.mkdir()
    (mountpoint / "stray").write_text("")
    with pytest.raises(VolumeError, match="or turn this one into a volume"):
        volume.check_mountpoint(str(mountpoint), state)
    volume.make_state(state)
    volume.create(state)
    with pytest.raises(VolumeError, match=f"its volume is in {state}: move away"):
        volume.check_mountpoint(str(mountpoint), state)
    with pytest.raises(VolumeError, match=f"mountpoint of the volume in {state}"):
        adoption.check_directory(str(mountpoint), str(tmp_path / ".tierfs-mnt"))


@pytest.mark.parametrize("place", [".local/state/tierfs/home-ann-files", ".tierfs-x", "archive/.tierfs-x"])
def test_a_directory_with_a_volume_in_it_is_not_adopted(tmp_path, place):
    home, inner = tmp_path / "ann", tmp_path / "ann" / place
    inner.parent.mkdir(parents=True)
    adoption.check_directory(str(home), str(tmp_path / ".tierfs-ann"))
    volume.make_state(str(inner))
    volume.create(str(inner))
    with pytest.raises(VolumeError, match=f"the volume in {inner} keeps its local data there"):
        adoption.check_directory(str(home), str(tmp_path / ".tierfs-ann"))


def test_leaving_that_is_cut_short_is_done_again(home, monkeypatch, capsys):
    state = volume.adopted_state(home)
    volume.make_state(state)
    made = complete(volume.create(state), MemoryStore())
    os.rename(home, made.path("tree"))
    os.mkdir(home)
    calls, usual = [], shutil.rmtree

    def interrupted(path, *more, **named):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        usual(path, *more, **named)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    monkeypatch.setattr(locate, "read_mounts", list)
    with pytest.raises(KeyboardInterrupt):
        leave.callback(home)
    assert "the same command goes on" in capsys.readouterr().err
    assert os.listdir(home) == ["letter"] and volume.exists(state)
    leave.callback(home)
    assert os.listdir(home) == ["letter"] and not os.path.exists(state)


def test_leaving_that_is_cut_short_names_the_state_directory_that_is_to_be_given(home, monkeypatch, capsys):
    state = f"{os.path.dirname(home)}/another place"
    volume.make_state(state)
    made = complete(volume.create(state), MemoryStore())
    os.rename(home, made.path("tree"))
    os.mkdir(home)
    mounts = [locate.Mount(home, locate.FSTYPE, "tierfs#1", 0)]

    def interrupted(mount, status):
        mounts.clear()
        raise KeyboardInterrupt

    monkeypatch.setattr(locate, "read_mounts", lambda: list(mounts))
    monkeypatch.setattr(commands_home, "_status", lambda mount: SimpleNamespace(where=state))
    monkeypatch.setattr(commands_home, "_bring_home", interrupted)
    with pytest.raises(VolumeError, match="leave out --state"):
        leave.callback(home, f"{home}-elsewhere")
    with pytest.raises(KeyboardInterrupt):
        leave.callback(home)
    assert f"`tierfs leave --state '{state}' {home}` goes on where it was" in capsys.readouterr().err
    with pytest.raises(VolumeError, match="correct --state"):
        leave.callback(home, f"{home}-elsewhere")
    leave.callback(home, state)
    assert os.listdir(home) == ["letter"] and not os.path.exists(state)


def test_a_store_goes_only_when_what_it_held_is_on_the_disk(home, monkeypatch):
    state = volume.adopted_state(home)
    volume.make_state(state)
    complete(volume.create(state), MemoryStore())
    adoption.begin(home, state)
    adoption.move(home, state)
    adoption.finish(home, state)
    done = []
    monkeypatch.setattr(syscalls, "syncfs", lambda fd: done.append(os.fstat(fd).st_ino))
    monkeypatch.setattr(volume, "remove", lambda state: done.append("removed"))
    commands_home._give_back(home, state)
    assert done == [os.stat(home).st_ino, "removed"]


def test_a_tree_that_is_missing_for_another_reason_is_no_leave_to_remove_the_rest(home):
    state = volume.adopted_state(home)
    volume.make_state(state)
    made = volume.create(state)
    complete(made, MemoryStore())
    adoption.begin(home, state)
    adoption.move(home, state)
    adoption.finish(home, state)
    kept = os.path.join(state, "store", "object")
    os.makedirs(os.path.dirname(kept), exist_ok=True)
    with open(kept, "w") as file:
        file.write("the only copy")
    os.rename(made.path("tree"), f"{home}.elsewhere")
    with pytest.raises(VolumeError, match="put it back"):
        commands_home._give_back(home, state)
    assert os.path.exists(kept)
    os.rename(f"{home}.elsewhere", made.path("tree"))
    commands_home._give_back(home, state)
    assert os.listdir(home) == ["letter"] and not os.path.exists(state)
