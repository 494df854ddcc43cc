"""Two servers, one of the pure and one of the compiled form, asked the same and compared to the last field.

Each has a tree of its own, so that requests may change it; inode numbers are compared by what they pair with.
"""

import contextlib
import errno
import os

from hotside import FORMS, Side

from tierfs.fuse import protocol as p
from tierfs.ledger import _NODE
from tierfs.marks import Mark, MarkReader
from tierfs.vfs import ROOT

INODE_FIELDS = (
    "backing_id", "gone", "marked", "name", "opens", "passthrough", "size", "slot", "writers",
)  # fmt: skip
HANDLE_FIELDS = ("backing_id", "flags", "uid", "writable")
USED = 12  # slots that are compared
# What is answered with an entry.
ENTRIES = (p.Op.LOOKUP, p.Op.MKDIR, p.Op.MKNOD, p.Op.CREATE, p.Op.TMPFILE, p.Op.LINK, p.Op.SYMLINK)


class Ino(int):
    """The number of an inode."""


def entry_of(data):
    """What is the same on both sides of a packed entry."""
    found = p.ENTRY_OUT.unpack(data)
    return found[:6], Ino(found[6]), found[7], found[15:19]


def listed_of(data, plus):
    """What a listing says: of each entry the offset behind it, and what is the same on both sides."""
    listed = []
    while data:
        entry = entry_of(data[: p.ENTRY_OUT.size]) if plus else None
        head = p.ENTRY_OUT.size if plus else 0
        ino, following, length, kind = p.DIRENT.unpack_from(data, head)
        name = data[head + p.DIRENT.size :][:length]
        if name == b"..":
            ino = 0  # both may have the same
        listed.append((following, name, Ino(ino), kind, entry))
        data = data[head + p.DIRENT.size + (length + 7 & ~7) :]
    return listed


class Twin(Side):
    """One of both."""

    caller = (0, 0)  # user and group
    offset = 0  # behind the last entry of the listing that was asked for last

    def __init__(self, *more):
        super().__init__(*more)
        self.notices = []

    def answer(self, opcode, nodeid, body):
        """The answer, as far as both must give the same; None: it has been put off."""
        self.send(opcode, nodeid, body, caller=self.caller)
        assert self.session.serve(1) == 1
        if opcode in (p.Op.FORGET, p.Op.BATCH_FORGET) or self.session._parked:
            return None
        return self.said(opcode, self.sock.recv(1 << 17))

    def said(self, opcode, data):
        """What this answer to a request of this kind says, as far as both must say the same."""
        while not p.OUT.unpack_from(data)[2]:
            self.notices.append(data)
            data = self.sock.recv(1 << 17)
        length, number, _ = p.OUT.unpack_from(data)
        assert length == len(data)
        data = data[p.OUT_SIZE :]
        if opcode in ENTRIES and data:
            return number, entry_of(data[: p.ENTRY_OUT.size]), data[p.ENTRY_OUT.size :]
        if opcode in (p.Op.READDIR, p.Op.READDIRPLUS):
            listed = listed_of(data, opcode == p.Op.READDIRPLUS)
            self.offset = listed[-1][0] if listed else self.offset
            return number, [each[1:] for each in listed]
        if opcode in (p.Op.GETATTR, p.Op.SETATTR) and data:
            found = p.ATTR_OUT.unpack(data)
            return number, found[:3], Ino(found[3]), found[4], found[12:16]
        if opcode in (p.Op.STATFS, p.Op.STATX):
            return number, len(data)
        return number, data

    def looks(self):
        """What there is in the tree, but for times."""
        found = []
        for top, dirs, files in os.walk(self.path):
            for name in sorted((*dirs, *files)):
                path = os.path.join(top, name)
                st = os.lstat(path)
                owner, more = (st.st_uid, st.st_gid), os.listxattr(path, follow_symlinks=False)
                place = os.path.relpath(path, self.path)
                found.append((place, Ino(st.st_ino), st.st_mode, st.st_nlink, owner, st.st_size, more))
            dirs.sort()
        return found

    def inode(self, inode):
        return {"ino": Ino(inode.ino), "parent": Ino(inode.parent), "opath": inode.opath >= 0,
                "handle": bool(inode.handle), "guard": inode.guard is not None,
                "content": inode.content is not None, "shown": inode.shown is not None,
                "set_id": bool(inode.set_id),  # it is a time
                **{name: getattr(inode, name) for name in INODE_FIELDS}}  # fmt: skip

    def nodes(self):
        anchors = {int: "descriptor", bytes: "handle", type(None): None}
        found = []
        for node in filter(None, self.vfs.nodes._by_slot):
            above, anchor = node.parent and node.parent.id, anchors.get(type(node.anchor), "gone")
            found.append((node.id, Ino(node.ino), above, self.vfs.nodes.name(node), anchor))
        return found

    def ledger(self):
        """Its records."""
        ledger = self.vfs.ledger
        form, records = ledger.form(), []
        for part, (_, at, size, _) in enumerate(form.parts):
            for slot in range(USED):
                raw = bytes(form.memory[at + slot * size :][:size])
                if not any(raw):
                    continue
                if part == 0:
                    number, ino, parent, lookups, kind, length, content = _NODE.unpack(raw)
                    records.append((number, Ino(ino), parent, lookups, kind, length, kind or content[:length]))
                elif part == 2:
                    records.append((Ino(int.from_bytes(raw[:8], "little")), raw[8:16]))
                elif part == 1:
                    records.append(raw)
        free = [list(each) for each in (*form.free, *form.free_longs)]
        return records, free, list(ledger._words[1:10])

    def marks(self):
        """All that the mover is told, and what of it stands in somebody's way."""
        told = []
        for entry in MarkReader(self._marks_fd, 0).read():
            which = entry.kind, Ino(entry.ino), entry.generation, Ino(entry.parent), entry.name
            first = Ino(entry.a) if entry.kind is Mark.ENTRY else entry.a
            second = 0 if entry.kind is Mark.TIMES else entry.b  # of TIMES: when it was
            told.append((*which, first, second, len(entry.handle), entry.end))
        marking = self.gate.marking
        return told, marking.marks.position, [(Ino(ino), at) for ino, at in marking.recent.items()]

    def intent(self):
        """What a successor would find of the change made last."""
        found = self.vfs.ledger._read_intent(self.vfs.ledger.form().intents)
        if found is None:
            return None
        request, (doing, _, first, second, handle) = found
        looks = [st and (Ino(st.st_ino), st.st_mode, st.st_nlink, st.st_size) for st in (first, second)]
        return request, doing, looks, len(handle)

    def state(self):
        """All that a request may leave behind."""
        nodes, gate = self.vfs.nodes, self.gate
        return {
            "tree": self.looks(),
            "notices": self.notices,
            "nodes": self.nodes(),
            "by_ino": sorted((node.id, Ino(ino)) for ino, node in nodes._by_ino.items()),
            "dirs": sorted(nodes._dirs),
            "opens": sorted(nodes._opens.items()),
            "former": sorted(nodes._former.items()),
            "ledger": self.ledger(),
            "files": [
                (number, node.id, Ino(handle.inode.ino), handle.fd >= 0,
                 [getattr(handle, each) for each in HANDLE_FIELDS])
                for number, (node, handle) in sorted(self.vfs.files.handles.items())
            ],
            "inodes": [self.inode(each) for each in gate.states.inodes.values()],
            "idle": [Ino(ino) for ino in gate.states.idle.inodes],
            "heat": [(Ino(ino), n, size, Ino(above), name, pid)
                     for ino, (n, _, size, above, name, pid) in gate.heat.touched.items()],
            "besides": [(Ino(ino), n, size, Ino(above), name, pid)
                        for (ino, _), (n, _, size, above, name, pid) in gate.heat.besides.items()],
            "marks": self.marks(),
            "intent": self.intent(),
            "late": [Ino(ino) for ino in gate.appearance.late],
            "seals": [Ino(ino) for ino in gate.marking.seals],
            "backing": [(number, Ino(ino)) for number, ino in self.backing.live.items()],
        }  # fmt: skip


def same(one, other, pairs):
    """Both are equal, numbers of inodes by one and the same pairing throughout."""
    if isinstance(one, Ino):
        return isinstance(other, Ino) and pairs.setdefault(int(one), int(other)) == other
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key], pairs) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b, pairs) for a, b in zip(one, other))
    return one == other


class Both:
    """The two sides, and what has been learnt by asking them."""

    def __init__(self, base, monkeypatch, built, directory_fds=64):
        self.sides = []
        for form in FORMS:
            (base / form / "tree").mkdir(parents=True)
            twin = Twin(base / form / "side", form, monkeypatch, built, base / form / "tree", directory_fds)
            self.sides.append(twin)
            self.sides[-1].gate.states.idle.most = 3
        self.nodes, self.open, self.reading = [ROOT], [], {}
        self._held = {}

    def ask(self, opcode, nodeid, body):
        one, other = (side.answer(opcode, nodeid, body) for side in self.sides)
        assert same(one, other, {}), (opcode, one, other)
        self.compare()
        return one

    def compare(self):
        one, other = (side.state() for side in self.sides)
        pairs = {}
        for key in one:
            assert same(one[key], other[key], pairs), (key, one[key], other[key], pairs)

    def lookup(self, parent, name):
        number, *found = self.ask(p.Op.LOOKUP, parent, name + b"\0")
        nodeid = found[0][0][0] if not number else 0
        if nodeid and nodeid not in self.nodes:
            self.nodes.append(nodeid)
        return nodeid or -number or errno.ENOENT

    def opened(self, nodeid, flags):
        """Open a file; its number, or the errno."""
        found = self.ask(p.Op.OPEN, nodeid, p.OPEN_IN.pack(flags, 0))
        if found is None or found[0]:
            return -found[0] if found else None
        fh, how, backing_id = p.OPEN_OUT.unpack(found[1])
        assert bool(how & p.OPEN_PASSTHROUGH) == bool(backing_id)
        self.open.append((nodeid, fh))
        return fh

    def made(self, opcode, nodeid, name, mode, umask=0o22, flags=os.O_WRONLY | os.O_CREAT):
        """Make a file, which is open then, or a directory; its node, or the errno."""
        how = p.MKDIR_IN.pack(mode, umask) if opcode == p.Op.MKDIR else p.CREATE_IN.pack(flags, mode, umask, 0)
        found = self.ask(opcode, nodeid, how + name + b"\0")
        if found is None or found[0]:
            return -found[0] if found else None
        made = found[1][0][0]
        self.nodes.append(made)
        self.hold()
        if opcode == p.Op.CREATE:
            self.open.append((made, p.OPEN_OUT.unpack(found[2])[0]))
        return made

    def linked(self, nodeid, parent, name):
        """Give a file one more name; 0 or the errno."""
        return -self.ask(p.Op.LINK, parent, p.U64.pack(nodeid) + name + b"\0")[0]

    def symlinked(self, parent, name, target):
        """Make a symbolic link; its node, or the errno."""
        found = self.ask(p.Op.SYMLINK, parent, name + b"\0" + target + b"\0")
        if found[0]:
            return -found[0]
        self.nodes.append(found[1][0][0])
        return self.nodes[-1]

    def listed(self, op, nodeid, room, fh=0, pieces=1000):
        """Read a directory, from where that was left or else anew; the entries, or the errno."""
        entries = []
        where = self.reading.pop((nodeid, fh), [0, 0])
        for _ in range(pieces):
            how = [p.READ_IN.pack(fh, offset, room, 0, 0, 0, 0) for offset in where]
            one, other = (side.answer(op, nodeid, body) for side, body in zip(self.sides, how))
            assert same(one, other, {}), (op, one, other)
            self.compare()
            if one[0]:
                return -one[0]
            if not one[1]:
                return entries
            entries += one[1]
            where = [side.offset for side in self.sides]
        self.reading[nodeid, fh] = where
        return entries

    def renamed(self, parent, name, new_parent, new_name, flags=0):
        how = p.RENAME2_IN.pack(new_parent, flags, 0) if flags else p.U64.pack(new_parent)
        opcode = p.Op.RENAME2 if flags else p.Op.RENAME
        return -self.ask(opcode, parent, how + name + b"\0" + new_name + b"\0")[0]

    def set(self, nodeid, valid, fh=0, size=0, times=(0, 0), mode=0, uid=0, gid=0):
        """SETATTR; the errno. `times`: of access and modification, in nanoseconds."""
        (atime, atime_ns), (mtime, mtime_ns) = (divmod(each, 10**9) for each in times)
        body = p.SETATTR_IN.pack(
            valid, 0, fh, size, 0, atime, mtime, 0, atime_ns, mtime_ns, 0, mode, 0, uid, gid, 0
        )  # fmt: skip
        found = self.ask(p.Op.SETATTR, nodeid, body)
        return None if found is None else -found[0]

    def release(self, which):
        nodeid, fh = self.open.pop(which % len(self.open))
        assert self.ask(p.Op.RELEASE, nodeid, p.RELEASE_IN.pack(fh, 0, 0, 0)) == (0, b"")

    def behind(self, change):
        """The same change in both trees. It need not succeed."""
        for side in self.sides:
            with contextlib.suppress(OSError):
                change(side.path)

    def hold(self):
        """Let no number of what is there now be used again: the two trees may share a filesystem."""
        for side in self.sides:
            for top, dirs, files in os.walk(side.path):
                for name in (*dirs, *files):
                    path = os.path.join(top, name)
                    ino = os.lstat(path).st_ino
                    if ino not in self._held:
                        self._held[ino] = os.open(path, os.O_PATH | os.O_NOFOLLOW)

    def hold_open(self, fh):
        """The same of an open file, which may have no name."""
        for side in self.sides:
            _, handle = side.vfs.files.handles[fh]
            fd = handle.fd if handle.fd >= 0 else handle.inode.opath
            if handle.inode.ino not in self._held:
                self._held[handle.inode.ino] = os.open(f"/proc/self/fd/{fd}", os.O_PATH)

    def close(self):
        for side in self.sides:
            side.close()
        for fd in self._held.values():
            os.close(fd)
