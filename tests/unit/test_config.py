"""The configuration file: what it accepts, and how exactly it names what is wrong."""

import os
import re
import stat

import pytest

from tierfs import config
from tierfs.config import NEVER_PATTERNS
from tierfs.errors import ConfigError


def test_an_empty_file_gives_the_defaults():
    parsed = config.parse("")
    assert parsed == config.VolumeConfig()
    assert parsed.low < parsed.high < 1


def test_the_written_defaults_are_the_defaults(tmp_path):
    path = str(tmp_path / "config.toml")
    config.write_default(path)
    assert config.load(path) == config.VolumeConfig()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    uncommented = re.sub(r"(?m)^# (?=\w+ = |    |\])", "", config.default_text())
    assert config.parse(uncommented) == config.VolumeConfig()


def test_settings_are_written_and_read_back(tmp_path):
    path = str(tmp_path / "config.toml")
    config.write_default(path, store='s3://bucket/a "b" \\c', local_limit="1.5G")
    parsed = config.load(path)
    assert parsed.store == 's3://bucket/a "b" \\c'
    assert parsed.local_limit == 3 * 2**29


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1", 1), ("4K", 4096), ("4k", 4096), ("4KiB", 4096), ("4 KB", 4096), ("2T", 2**41), (7, 7)],
)
def test_sizes(text, size):
    assert config.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1 2", "0x10", None, 1.5, True, -1])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="size"):
        config.parse_size(text)


@pytest.mark.parametrize("text", ["9" * 400, 10**400, 1 << 63, "8192P"])
def test_sizes_beyond_any_file(text):
    with pytest.raises(ValueError, match="more than a file can hold"):
        config.parse_size(text)
    assert config.parse_size("8191P") < 1 << 63


@pytest.mark.parametrize("text", ["9" * 400 + "d", "1000000d", float("inf"), 1e300, 10**400])
def test_durations_beyond_any_date(text):
    with pytest.raises(ValueError, match="more than a thousand years"):
        config.parse_duration(text)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("12h", 43200), (3, 3)])
def test_durations(text, seconds):
    assert config.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1s", "1M", None, True])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="duration"):
        config.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\nlocl_limit = "1G"\n', r"c\.toml:2: unknown key 'locl_limit': did you mean 'local_limit'\?"),
        ("zzz = 1\n", r"c\.toml:1: unknown key 'zzz': known keys are store, local_limit"),
        ("# x\n[nevr]\npatterns = []\n", r"c\.toml:2: unknown key 'nevr': did you mean 'never'\?"),
        ('store = "embedded"\n[never]\npatern = []\n', r"c\.toml:3: unknown key 'never\.patern'.*'patterns'"),
        ('local_limit = "big"\n', r"c\.toml:1: local_limit: 'big' is not a size like"),
        ("\n\nhigh = 95\n", r"c\.toml:3: high: 95 is not a share like \"95%\""),
        ('high = "0%"\n', r"c\.toml:1: high: "),
        ('quiet = "soon"\n', r"c\.toml:1: quiet: 'soon' is not a duration"),
        ('store = "ftp://x"\n', r"c\.toml:1: store: 'ftp://x' is no store"),
        ('replicate = "never"\n', r"c\.toml:1: replicate: "),
        ('chunk_size = "3M"\n', r"c\.toml:1: chunk_size: .*power of two"),
        ('storage_class = "DEEP_ARCHIVE"\n', r"c\.toml:1: storage_class: .*cannot be read back"),
        ("uploads = 0\n", r"c\.toml:1: uploads: 0 is not a whole number"),
        ('fetch_timeout = "0s"\n', r"c\.toml:1: fetch_timeout: '0s' is too short"),
        ("[keep]\npattern = []\n", r"c\.toml:2: unknown key 'keep\.pattern'.*'patterns'"),
        ("never = 3\n", r"c\.toml:1: never: write it as a table"),
        ("[never]\npatterns = [1]\n", r"c\.toml:2: never\.patterns: "),
        ('high = "50%"\nlow = "60%"\n', r"c\.toml:2: low: low \(60%\) must not be above high \(50%\)"),
        ('# low = "90%"\nhigh = "50%"\n', r"c\.toml:2: high: low \(90%\) must not be above high \(50%\)"),
        ("store = \n", r"c\.toml:1: is not valid TOML: invalid value"),
        ('store = "a', r"c\.toml:1: is not valid TOML"),
        ("uploads = 1\nuploads = 2\n", r"c\.toml:2: a key is given twice: take one of them away"),
    ],
)
def test_mistakes_are_named_with_file_line_and_key(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.parse(text, "c.toml")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        config.load(str(tmp_path / "none.toml"))
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b'store = "\xff"\n')
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(str(bad))


def test_set_key_changes_one_key_and_keeps_the_rest(tmp_path):
    path = tmp_path / "config.toml"
    config.write_default(str(path))
    before = path.read_text().splitlines()
    config.set_key(str(path), "local_limit", "3G")
    after = path.read_text().splitlines()
    assert [line for line in after if line not in before] == ['local_limit = "3G"']
    assert config.load(str(path)).local_limit == 3 * 2**30
    config.set_key(str(path), "local_limit", "none")
    assert config.load(str(path)).local_limit == 0
    with pytest.raises(ConfigError):
        config.set_key(str(path), "local_limit", "much")
    assert config.load(str(path)).local_limit == 0


def test_set_key_stands_before_the_first_table(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[never]\npatterns = ["a"]\n')
    config.set_key(str(path), "quiet", "5s")
    parsed = config.load(str(path))
    assert parsed.quiet_seconds == 5
    assert parsed.never.patterns == ("a",)


def test_control_characters_cannot_enter_the_file(tmp_path):
    with pytest.raises(ConfigError):
        config.write_default(str(tmp_path / "c"), store="s3://a\nuploads = 3")


@pytest.mark.parametrize(
    ("path", "stays"),
    [
        (b"a/b.pid", True), (b"project/node_modules/x/index.js", True), (b"photo.jpg", False),
        (b".ssh/id_ed25519", True), (b"copy/.ssh/id_ed25519", False), (b".local/share/keyrings/login", True),
        (b".local/share/other", False), (b"x\xff.pid", True), (b"line\nbreak.txt", False),
        (b".xsession-errors.old", True), (b"a/.lock", True), (b"app/db-shm", True), (b"a/Cargo.lock", False),
        (b"src/lock/mod.rs", False), (b"travel-journal/day 1", False), (b"app/db-wal", False),
        (b"app/db-journal", False), (b".cache/x", True), (b"a/.cache", False), (b".Trash-1000/files/x", True),
        (b".xsession-errors-:0", True), (b".Xauthority", True), (b".ssh", True), (b".dbus/session-bus/x", True),
    ],
)  # fmt: skip
def test_what_never_leaves(path, stays):
    assert config.Never().matcher()(path) is stays


@pytest.mark.parametrize("pattern", NEVER_PATTERNS[: NEVER_PATTERNS.index("!*/")])
def test_what_names_files_never_means_what_lies_in_a_directory_of_that_name(pattern):
    name = pattern.replace("*", "draft").replace("?", "0").lstrip("/").encode()
    never = config.Never().matcher()
    assert never(name)
    assert not never(name + b"/text") and not never(name + b"/" + b"more/text")
    assert never(b"below/" + name) is not pattern.startswith("/")
    assert not never(b"below/" + name + b"/text")


@pytest.mark.parametrize("pattern", [pattern for pattern in NEVER_PATTERNS if pattern.endswith("/")])
def test_what_names_directories_never_means_a_file(pattern):
    name = pattern.replace("*", "-1000").strip("/").encode()
    never = config.Never().matcher()
    assert never(name + b"/text") is not pattern.startswith("!")
    assert not never(name)


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        (b".bashrc", True), (b".config/app/settings", True), (b".profile", True), (b"copy/.profile", False),
        (b"Documents/a", False),
    ],
)  # fmt: skip
def test_what_a_login_needs_is_kept_and_may_be_copied(path, kept):
    assert config.Keep().matcher()(path) is kept
    assert not config.Never().matcher()(path)


def test_a_pattern_with_a_slash_before_its_end_is_a_path():
    matches = config.Keep(patterns=("build/", "a/b", "/c/")).matcher()
    assert matches(b"x/build/y") and matches(b"a/b") and matches(b"a/b/c") and matches(b"c/d")
    assert not matches(b"x/a/b") and not matches(b"x/c")


def test_both_lists_of_patterns_are_read():
    parsed = config.parse('[keep]\npatterns = ["a"]\n[never]\npatterns = []\n')
    assert (parsed.keep.patterns, parsed.never.patterns) == (("a",), ())


def test_no_patterns_match_nothing():
    assert config.Never(patterns=()).matcher()(b"a.pid") is False
