"""The catalogue of failpoints is what the code passes, and each is where a test kills a process."""

from __future__ import annotations

import ast
from pathlib import Path

from tierfs import failpoints

ROOT = Path(__file__).parents[2]
POINTS = {name: value for name, value in vars(failpoints).items() if name.isupper() and isinstance(value, str)}
GROUPS = {name: value for name, value in vars(failpoints).items() if name.endswith("_POINTS")}


def used(tree, function):
    """Constants of the catalogue among the arguments of that function's calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == function:
            for argument in node.args:
                if isinstance(argument, ast.Attribute):
                    yield argument.attr


def test_each_point_is_passed_in_one_place_at_least_and_none_is_unknown():
    sources = [*ROOT.glob("tierfs/**/*.py"), *ROOT.glob("daemon/**/*.py")]
    hit = {name for path in sources for name in used(ast.parse(path.read_text()), "hit")}
    assert hit == set(POINTS)


def test_each_point_is_tried():
    """A test is parametrised with each group, and a group has all points of its kind."""
    grouped = [point for group in GROUPS.values() for point in group]
    assert sorted(grouped) == sorted(POINTS.values())
    tests = [path for kind in ("crash", "mount", "home") for path in ROOT.glob(f"tests/{kind}/test_*.py")]
    tried = {
        argument
        for path in tests
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and (argument := node.attr).endswith("_POINTS")
    }
    assert tried == set(GROUPS)
