"""One session over a tree, of the pure or of the compiled form, with the kernel's end of it in our hands."""

import errno
import importlib.util
import os
import shutil
import socket
import subprocess
import sysconfig
from pathlib import Path

import pytest
from test_gate import DictIndex, FakeBacking

from tierfs.fuse import compiled, hot
from tierfs.fuse import protocol as p
from tierfs.fuse.kernel import Session
from tierfs.gate import Gate
from tierfs.marks import MarkWriter
from tierfs.tree import open_tree
from tierfs.vfs import Vfs

PACKAGE = Path(compiled.__file__).parent.parent
FORMS = ("pure", "compiled")


def build(program, *macros):
    """Build the compiled part from the sources that are under test; returns the program."""
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        pytest.skip(f"no Python.h in {include}: the compiled part cannot be built here")
    macro = f'-DTIERFS_SOURCES="{compiled.fingerprint(str(PACKAGE))}"'
    argv = ["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{include}", macro]
    argv += [*os.environ.get("CFLAGS", "").split(), *macros, "-o", str(program)]
    subprocess.run([*argv, *(str(PACKAGE / name) for name in compiled.C)], check=True)
    return program


def load(program):
    """The module that has been built."""
    spec = importlib.util.spec_from_file_location("tierfs.fuse._hot", program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class PlainIndex(DictIndex):
    """Every file is resident, and shows what it is."""

    def is_plain(self, ino, ctime):
        return True


class Side:
    """A session of one form over a tree, and the kernel's end of it."""

    thread = 0  # that asks: of a namespace that is not ours

    def __init__(self, base, form, monkeypatch, built, tree=None, directory_fds=3, watched=False):
        self._base = base
        (base / "marks").mkdir(parents=True)
        self.path = tree or base.parent / "tree"
        self.tree = open_tree(str(self.path))
        self._marks_fd = os.open(base / "marks", os.O_RDONLY)
        self.gate = Gate(self.tree, PlainIndex(), MarkWriter(self._marks_fd), 1)
        self.gate.lasting.watched = watched
        self.vfs = Vfs(self.tree, self.gate, directory_fds=directory_fds)
        self.vfs.nodes.left = set() if watched else None
        self.sock, self._device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "find", lambda: (built if form == "compiled" else None, ""))
            self.session = Session(self._device.fileno(), self.vfs, passthrough=False)
        assert hot.form(self.session._receiver) == form
        self.gate.states.backing = self.backing = FakeBacking()
        self._unique = 0
        self.outdated = []  # nodes of which that was told

    def send(self, opcode, nodeid, body=b"", flag=0, caller=(0, 0)):
        self._unique += 2
        unique = self._unique | flag
        head = p.HEAD.pack(p.IN + len(body), opcode, unique, nodeid)
        head += p.CALLER.pack(*caller, self.thread, 0) + bytes(2)
        self.sock.send(head + body)
        return unique

    def ask(self, opcode, nodeid, body=b"", flag=0):
        """(errno, body) of the answer."""
        unique = self.send(opcode, nodeid, body, flag)
        assert self.session.serve(1) == 1
        data = self.sock.recv(1 << 16)
        while not p.OUT.unpack_from(data)[2]:
            self.outdated.append(p.INVAL_INODE_OUT.unpack_from(data, p.OUT_SIZE)[0])
            data = self.sock.recv(1 << 16)
        length, number, answered = p.OUT.unpack_from(data)
        assert (length, answered) == (len(data), unique)
        return -number, data[p.OUT_SIZE :]

    def lookup(self, parent, name):
        number, body = self.ask(p.Op.LOOKUP, parent, name + b"\0")
        return number or (errno.ENOENT if body == p.ABSENT else p.ENTRY_OUT.unpack(body))

    def getattr(self, nodeid, flags=0, fh=0):
        number, body = self.ask(p.Op.GETATTR, nodeid, p.GETATTR_IN.pack(flags, 0, fh))
        return number or p.ATTR_OUT.unpack(body)

    def table(self):
        """All nodes, as they and as the ledger have them."""
        nodes = [
            (node.id, node.ino, node.parent and node.parent.id, self.vfs.nodes.name(node), node.anchor)
            for node in self.vfs.nodes._by_slot
            if node is not None
        ]
        view, size = self.vfs.ledger.table()
        kept = bytes(view[: size * (len(self.vfs.nodes._by_slot) + 1)])
        view.release()
        return nodes, kept, list(self.vfs.nodes._dirs)

    def close(self):
        self.session.close()
        self.vfs.close()
        self.gate.marking.marks.close()
        self.tree.close()
        os.close(self._marks_fd)
        self.sock.close()
        self._device.close()
        self.vfs.ledger.close()
        shutil.rmtree(self._base)  # a log of marks is 8 MiB
