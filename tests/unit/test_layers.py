"""Imports go downwards only, and each outside world is touched in one place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the bottom to the top; a module may import from lower layers, and from those of its own that stand
# with it in `FAMILIES`.
LAYERS = [
    {"errors", "model", "marks", "failpoints", "spelling", "patterns", "tierfs"},
    {"config", "locate", "transitions", "policy", "wire", "channel", "codec", "datafile", "manifest"}
    | {"inodes", "moments", "pages", "unawaited"},
    {"index", "heat_index", "tree", "syscalls", "store", "waits"},
    {"transfer", "volume", "ownership", "namespace", "ledger"},
    {"tier", "recovery", "gate"},
    {"vfs", "control", "adoption", "launch", "restoring", "viewing"},
    {"fuse", "__main__", "cli", "commands", "terminal"},
    {"tierfsd"},
]
FAMILIES = [
    {"model", "errors", "failpoints"},
    {"policy", "transitions"},
    {"index", "codec", "heat_index"},
    {"tree", "syscalls"},
    {"datafile", "pages"},
    {"volume", "ownership"},
    {"wire", "channel"},
    {"__main__", "cli", "commands", "terminal"},
    {"control", "locate"},
    {"tier", "recovery"},
    {"restoring", "viewing"},
]
# Parts of a larger module that were split off share its place.
PARTS_OF = {
    "index": {"index_writer", "past", "environment"},
    "tree": {"lent"},
    "restoring": {"planting"},
    "ledger": {"intents"},
    "gate": {
        "idle",
        "inflow",
        "passages",
        "handles",
        "appearance",
        "report",
        "room",
        "vigil",
        "lasting",
        "marking",
        "states",
        "contents",
        "guarding",
        "moverlink",
        "succession",
    },
    "vfs": {"nodes", "dirs", "xattrs", "making", "names", "openfiles", "told"},
    "fuse": {"slices"},
    "tier": {
        "kit",
        "restless",
        "rescuing",
        "reusing",
        "serverlink",
        "places",
        "digests",
        "draining",
        "folding",
        "copying",
        "punching",
        "filling",
        "passing",
        "settling",
        "arrivals",
        "breadth",
        "bringing",
        "neighbours",
        "opening",
        "survey",
        "collecting",
        "versions",
        "readback",
        "shortened",
        "journal",
        "looking",
        "remembering",
        "snapshots",
        "walking",
    },
}
WORLDS = {
    "boto3": {"tierfs/store/s3"},
    "botocore": {"tierfs/store/s3"},
    "obstore": {"tierfs/store/s3"},
    "lmdb": {"tierfs/index.py", "tierfs/heat_index.py", "tierfs/environment.py"},
    "fuse": {"tierfs/fuse/"},
    "watchdog": {"daemon/tierfsd/watcher.py"},
    "click": {"tierfs/cli.py", "tierfs/commands/"},
    "rich": {"tierfs/terminal.py", "tierfs/commands/"},
}
HEAVY = {"boto3", "botocore", "obstore", "click", "rich", "watchdog", "zstandard", "cryptography"}
PURE = {"os", "time", "lmdb", "random", "datetime", "socket", "subprocess"}


def _sources():
    return sorted([*ROOT.glob("tierfs/**/*.py"), *ROOT.glob("daemon/tierfsd/**/*.py")])


def _imports(path):
    """Dotted names of all modules that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _part(dotted):
    """The first component below the package, or "tierfsd"."""
    parts = dotted.split(".")
    if parts[0] == "tierfsd":
        return "tierfsd"
    name = parts[1] if len(parts) > 1 and parts[1] != "__init__" else "tierfs"
    return next((whole for whole, split in PARTS_OF.items() if name in split), name)


def _own_part(path):
    relative = path.relative_to(ROOT).with_suffix("")
    return "tierfsd" if relative.parts[0] == "daemon" else _part(".".join(relative.parts))


def _layer(part):
    return next((number for number, layer in enumerate(LAYERS) if part in layer), None)


def _is_module(dotted):
    base = ROOT / dotted.replace(".", "/")
    return base.is_dir() or base.with_suffix(".py").exists()


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards_only(path):
    own = _own_part(path)
    assert _layer(own) is not None, f"{path.name}: say in LAYERS or PARTS_OF where {own!r} belongs"
    for dotted in _imports(path):
        package = dotted.split(".")[0]
        if package == "tierfsd":
            assert own == "tierfsd", f"{path.name} imports {dotted}"
        if package != "tierfs" or not _is_module(dotted):
            continue
        other = _part(dotted)
        if other in (own, "tierfs") or any({own, other} <= family for family in FAMILIES):
            continue
        assert _layer(other) is not None, f"say in LAYERS or PARTS_OF where {other!r} belongs"
        assert _layer(other) < _layer(own), f"{path.name} ({own}) imports {dotted} ({other})"


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_outside_world_has_one_place(path):
    relative = str(path.relative_to(ROOT))
    for dotted in _imports(path):
        allowed = WORLDS.get(dotted.split(".")[0])
        if allowed is not None:
            assert any(relative.startswith(place) for place in allowed), f"{relative} imports {dotted}"
    if not relative.startswith("tierfs/fuse/"):
        code = ast.parse(path.read_text())
        texts = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
        assert "/dev/fuse" not in texts, f"{relative} opens /dev/fuse"


@pytest.mark.parametrize(
    "path",
    [path for path in _sources() if path.parent.name == "policy" or path.name == "transitions.py"],
    ids=lambda path: path.name,
)
def test_policy_and_transitions_are_pure(path):
    assert not {dotted.split(".")[0] for dotted in _imports(path)} & PURE


@pytest.mark.parametrize("start", ["tierfsd.main", "tierfsd.mount_server"])
def test_what_must_begin_quickly_carries_no_store_and_no_terminal(start):
    reached, pending = set(), [start]
    while pending:
        dotted = pending.pop()
        path = _file_of(dotted)
        if path is None or path in reached:
            continue
        reached.add(path)
        names = _module_level(path)
        heavy = {name.split(".")[0] for name in names} & HEAVY
        assert not heavy, f"{path.relative_to(ROOT)}, reached from {start}, imports {heavy}"
        pending += names


def _file_of(dotted):
    base = ROOT / ("daemon" if dotted.startswith("tierfsd") else "") / dotted.replace(".", "/")
    found = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return found if found.exists() and dotted.split(".")[0] in ("tierfs", "tierfsd") else None


def _module_level(path):
    """What is imported at once; imports inside functions are made when they are needed."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names
