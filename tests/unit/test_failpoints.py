"""The catalogue of failpoints is what the code passes, and each is where a test kills a process."""

from __future__ import annotations

import ast
from pathlib import Path

from tierfs import failpoints

ROOT = Path(__file__).parents[2]
POINTS = {name: value for name, value in vars(failpoints).items() if name.isupper() and isinstance(value, str)}
GROUPS = {name: value for name, value in vars(failpoints).items() if name.endswith("_POINTS")}


def used(tree, function):
    """Constants of the catalogue among the arguments of calls of that function or method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == function:
            for argument in node.args:
                if is_name(argument):
                    yield argument.attr


def is_name(node):
    return (
        isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "failpoints"
    )


def test_each_point_is_passed_in_one_place_at_least_and_none_is_unknown():
    sources = [*ROOT.glob("tierfs/**/*.py"), *ROOT.glob("daemon/**/*.py")]
    hit = {name for path in sources for name in used(ast.parse(path.read_text()), "hit")}
    assert hit == set(POINTS)


def test_each_point_is_tried():
    """A test of a real process is parametrised with a group that has it, or arms it by name."""
    tests = [path for kind in ("crash", "mount", "home") for path in ROOT.glob(f"tests/{kind}/test_*.py")]
    tried: set[str] = set()
    for tree in [ast.parse(path.read_text()) for path in tests]:
        loops = [node.iter.attr for node in ast.walk(tree) if isinstance(node, ast.For) and is_name(node.iter)]
        for group in [*used(tree, "parametrize"), *loops]:
            tried.update(GROUPS.get(group, ()))
        tried.update(POINTS[name] for name in used(tree, "run") if name in POINTS)
    assert tried == set(POINTS.values())
