"""The language of [never] and [keep]: what users of .gitignore expect, and never less copied than of old."""

import fnmatch
import os
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierfs.patterns import matcher

FILES = [
    "a", "b", "x.tmp", "d/a", "d/b", "d/x.tmp", "d/e/a", "d/e/x.tmp", "e/a", "e/d/b", "e/d/x.tmp/a",
    "y.tmp/a", "y.tmp/x.tmp", "y.tmp/d/a", "y.tmp/e", "d/y.tmp/e/b",
]  # fmt: skip
NAMES = st.sampled_from(["a", "b", "d", "e", "*", "*.tmp", "x*", "?", "[ab]", "[!a]", "x.tmp", "y.tmp"])
PLAIN = st.sampled_from(["a", "b", "d", "e", "x.tmp", "y.tmp", "?", "[ab]"])
PATHS = st.lists(PLAIN, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
INNER = st.lists(PLAIN, min_size=2, max_size=3).map("/".join)
SIGNS, ENDS = st.sampled_from(["", "", "!"]), st.sampled_from(["", "", "/"])
LISTS = st.lists(st.tuples(SIGNS, NAMES | PATHS | INNER, ENDS).map("".join), max_size=6)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A repository that has those files, and nothing of this machine's settings."""
    root = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", root], check=True, timeout=60)
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def ignored(tree, patterns):
    (tree / ".gitignore").write_text("".join(f"{pattern}\n" for pattern in patterns))
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    done = subprocess.run(
        ["git", "-c", "core.excludesFile=/dev/null", "check-ignore", "--no-index", "-z", "--stdin"],
        input="\0".join(FILES), capture_output=True, text=True, cwd=tree, env=environment, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return set(done.stdout.split("\0")) - {""}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patterns=LISTS)
def test_git_means_the_same_files(tree, patterns):
    matches = matcher(patterns)
    assert {name for name in FILES if matches(name.encode())} == ignored(tree, patterns)


def former(patterns):
    """What lists meant when `/` at the end said nothing, and `!` stood for itself."""
    plain = [pattern.rstrip("/") for pattern in patterns]
    names = [pattern for pattern in plain if "/" not in pattern]
    paths = [pattern.lstrip("/") for pattern in plain if "/" in pattern]

    def matches(path):
        parts = path.split("/")
        heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatch.fnmatchcase(part, name) for part in parts for name in names) or any(
            fnmatch.fnmatchcase(head, path) for head in heads for path in paths
        )

    return matches


WILD = st.lists(NAMES | PLAIN, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))


@settings(max_examples=300)
@given(patterns=st.lists(NAMES | WILD | INNER, max_size=6))
def test_a_list_of_old_means_what_it_meant(patterns):
    now, before = matcher(patterns), former(patterns)
    assert [now(name.encode()) for name in FILES] == [before(name) for name in FILES]


@settings(max_examples=300)
@given(patterns=LISTS)
def test_more_is_copied_than_by_the_former_meaning_never_less(patterns):
    now, before = matcher(patterns), former([pattern.removeprefix("!") for pattern in patterns])
    assert all(before(name) for name in FILES if now(name.encode()))


@pytest.mark.parametrize(
    ("patterns", "meant", "others"),
    [
        (["*.tmp"], ["x.tmp", "y.tmp/a"], ["a"]),
        (["*.tmp/"], ["y.tmp/a", "y.tmp/x.tmp", "d/y.tmp/e/b"], ["x.tmp", "d/x.tmp"]),
        (["*.tmp", "!*/"], ["x.tmp", "y.tmp/x.tmp"], ["y.tmp/a", "y.tmp/d/a", "e/d/x.tmp/a"]),
        (["*.tmp", "!*/", "d/"], ["x.tmp", "d/a", "y.tmp/d/a"], ["y.tmp/a", "e/a"]),
        (["d/", "!*/"], [], ["d/a", "e/d/b"]),
        (["/d/e/", "!a"], ["d/e/a"], ["d/a"]),
        (["*", "!a"], ["b", "d/a"], ["a"]),
        (["a", "!a", "a"], ["a", "d/a"], ["b"]),
        (["/a/"], [], ["a"]),
        (["/d/*a"], ["d/a", "d/e/a"], ["d/b"]),
        (["/", "!", "!/", "//"], [], ["a", "d/a", "!"]),
    ],
)  # fmt: skip
def test_who_has_the_last_word(patterns, meant, others):
    matches = matcher(patterns)
    assert [name for name in meant + others if matches(name.encode())] == meant
