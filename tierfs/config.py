"""The settings of one volume: a TOML file, checked key by key.

Sizes are written as "20G" or "512K" (powers of 1024), durations as "90s", "10m" or "30d", shares as "95%".
In a `VolumeConfig` sizes are bytes, durations seconds and shares fractions; of `scrub_every` None is
"auto" and 0 never.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from tierfs.errors import ConfigError
from tierfs.model import ARCHIVES
from tierfs.patterns import matcher

FILE_NAME = "config.toml"
EMBEDDED_STORE = "embedded"  # a directory in the state directory

# Lock files, caches and build output are cheaper to make again than to fetch; keys and passwords, with which
# the list ends, are for nobody who can read a store. What a lost disk must not take is not to be hit by chance:
# "*.lock" would be Cargo.lock, yarn.lock and the like, "lock" a directory of sources, "*-journal" a diary; and
# the "-wal" or "-journal" of a program that was killed is part of its database. None is large, or in the way.
# For the same reason what stands before "!*/" is files, and no directory, and what ends in "/" no file: people
# name directories "draft.tmp" and "chapter.part". Nor has a path of files a "*": it would name all below, too.
NEVER_PATTERNS = (
    ".lock", "*.pid", "*.swp", ".~lock.*", "*.tmp", "*.part", "*.crdownload", "*-shm",
    "/.xsession-errors", "/.xsession-errors.old", "/.xsession-errors-:?", "/.Xauthority",
    "!*/",
    ".cache/", "__pycache__/", "node_modules/", ".Trash*/", "lost+found/", "/.dbus/",
    "/.ssh", "/.gnupg", "/.local/share/keyrings",
)  # fmt: skip
# A login that works offline must not wait for these; a lost disk must not take them with it.
KEEP_PATTERNS = (
    "/.profile", "/.bash*", "/.zsh*", "/.zprofile", "/.login", "/.cshrc", "/.inputrc",
    "/.xsession*", "/.xinitrc", "/.pam_environment", "/.config",
)  # fmt: skip


class _Patterns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A list of patterns, as patterns.py reads them."""

    patterns: tuple[str, ...] = ()

    def matcher(self) -> Callable[[bytes], bool]:
        """A function that says whether a file is meant, by its path from the volume's root."""
        return matcher(self.patterns)


class Never(_Patterns, frozen=True, forbid_unknown_fields=True):
    """What is neither demoted nor copied."""

    patterns: tuple[str, ...] = NEVER_PATTERNS


class Keep(_Patterns, frozen=True, forbid_unknown_fields=True):
    """What is copied and never demoted."""

    patterns: tuple[str, ...] = KEEP_PATTERNS


class VolumeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One volume's settings. `local_limit` 0 means: no limit but the filesystem's own (`min_free`)."""

    store: str = EMBEDDED_STORE
    local_limit: int = 0
    high: float = 0.95
    low: float = 0.90
    min_free: float = 0.05
    chunk_size: int = 4 << 20
    fetch_timeout: float = 60.0
    replicate: str = "auto"
    quiet_seconds: float = 30.0
    min_age: float = 600.0
    min_size: int = 4096
    storage_class: str = ""
    uploads: int = 8
    fetches: int = 16
    prefetch: bool = True
    grace: float = 86400.0
    journal_seconds: float = 20.0
    keep_versions: float = 30 * 86400.0
    scrub_every: float | None = None
    scrub_rate: int = 4 << 20
    never: Never = Never()
    keep: Keep = Keep()

    @property
    def kept_seconds(self) -> float:
        """For so long at least the store keeps what nothing refers to any more."""
        return max(self.keep_versions, self.grace)


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:I?B)?\s*", re.IGNORECASE)
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w|)\s*")
_MOST_BYTES = (1 << 63) - 1
_MOST_SECONDS = 1000 * 365 * 86400.0  # within what a date can say
_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_size(value: object) -> int:
    """Bytes of "20G", "1.5M" or 4096. Raises ValueError saying what is expected."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        size: float = value
    elif match:
        size = float(match[1]) * 1024 ** " KMGTP".index(match[2].upper() or " ")
    else:
        raise ValueError(f'{value!r} is not a size like "20G" or "512K"')
    if size > _MOST_BYTES:
        raise ValueError(f"{value!r} is more than a file can hold")
    return int(size)


def parse_duration(value: object) -> float:
    """Seconds of "10m", "90s" or 30. Raises ValueError saying what is expected."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        seconds: float = value
    elif match:
        seconds = float(match[1]) * _UNITS[match[2]]
    else:
        raise ValueError(f'{value!r} is not a duration like "90s", "10m" or "12h"')
    if seconds > _MOST_SECONDS:
        raise ValueError(f"{value!r} is more than a thousand years")
    return float(seconds)


def _parse_timeout(value: object) -> float:
    seconds = parse_duration(value)
    if seconds < 1:
        raise ValueError(f'{value!r} is too short for any store: write "1s" or more')
    return seconds


def _parse_scrub(value: object) -> float | None:
    if value in ("auto", "never"):
        return None if value == "auto" else 0.0
    seconds = parse_duration(value)
    if seconds < 60:
        raise ValueError(f'{value!r} is too often: write "30d", "auto" or "never"')
    return seconds


def _parse_scrub_rate(value: object) -> int:
    size = parse_size(value)
    if not size:
        raise ValueError(f'{value!r} would read nothing: to read no copies write scrub_every = "never"')
    return size


def _parse_limit(value: object) -> int:
    return 0 if value == "none" else parse_size(value)


def _parse_share(value: object) -> float:
    number = value[:-1].strip() if isinstance(value, str) and value.endswith("%") else ""
    if number.replace(".", "", 1).isdigit() and 0 < float(number) <= 100:
        return float(number) / 100
    raise ValueError(f'{value!r} is not a share like "95%"')


def _parse_text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{value!r} is not text in quotes")


def _parse_storage_class(value: object) -> str:
    text = _parse_text(value)
    if text in ARCHIVES:
        raise ValueError(f"{text!r} is an archive: what is in it cannot be read back; GLACIER_IR can")
    return text


def _parse_store(value: object) -> str:
    text = _parse_text(value)
    if text == EMBEDDED_STORE or text.startswith(("s3://", "file:///")):
        return text
    raise ValueError(f"{text!r} is no store: use s3://bucket/prefix or file:///path")


def _parse_replicate(value: object) -> str:
    if value in ("auto", "all", "cold"):
        return str(value)
    raise ValueError(f'{value!r} is not one of "auto", "all", "cold"')


def _parse_chunk(value: object) -> int:
    size = parse_size(value)
    if size & (size - 1) or not 64 << 10 <= size <= 1 << 30:
        raise ValueError(f'{value!r} is not a power of two between "64K" and "1G"')
    return size


def _parse_count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 256:
        return value
    raise ValueError(f"{value!r} is not a whole number between 1 and 256")


def _parse_switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is not true or false")


def _parse_patterns(value: object) -> tuple[str, ...]:
    if isinstance(value, list) and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise ValueError(f"{value!r} is not a list of patterns")


class _Key(NamedTuple):
    field: str
    reader: Callable[[object], Any]
    default: str  # as written in the file
    comment: str


_KEYS: dict[str, _Key] = {
    "store": _Key("store", _parse_store, f'"{EMBEDDED_STORE}"',
                  "Where copies live; fixed when the volume is created."),
    "local_limit": _Key("local_limit", _parse_limit, '"none"',
                        'Most bytes kept on the local disk; "none": as the disk allows.'),
    "high": _Key("high", _parse_share, '"95%"',
                 "Demotion begins when this share of local_limit is in use ..."),
    "low": _Key("low", _parse_share, '"90%"', "... and ends at this one."),
    "min_free": _Key("min_free", _parse_share, '"5%"',
                     "Demotion also begins when the local filesystem has less free."),
    "replicate": _Key("replicate", _parse_replicate, '"auto"',
                      '"all": copy every quiet file; "cold": only on demotion; "auto": "all" where the\n'
                      "# store is on another device."),
    "quiet": _Key("quiet_seconds", parse_duration, '"30s"',
                  "A changed file is copied after so long without a change."),
    "min_age": _Key("min_age", parse_duration, '"10m"', "A file used more recently stays."),
    "min_size": _Key("min_size", parse_size, '"4K"', "A smaller file stays."),
    "fetch_timeout": _Key("fetch_timeout", _parse_timeout, '"60s"', "A read of a stub fails after so long."),
    "chunk_size": _Key("chunk_size", _parse_chunk, '"4M"', "Larger files are fetched in pieces of this size."),
    "storage_class": _Key("storage_class", _parse_storage_class, '""',
                          "S3 storage class of new objects; empty: the bucket's default. One in the\n"
                          "# store's URL goes first."),
    "uploads": _Key("uploads", _parse_count, "8", "Uploads at once."),
    "fetches": _Key("fetches", _parse_count, "16", "Requests at once for reading."),
    "prefetch": _Key("prefetch", _parse_switch, "true",
                     "Small files come before they are asked for, while others of their directory are read."),
    "keep_versions": _Key("keep_versions", parse_duration, '"30d"',
                          "Overwritten and deleted files can be had back for so long, at least for `grace`."),
    "grace": _Key("grace", parse_duration, '"24h"',
                  "What is to be removed from the store is announced there for so long before."),
    "journal": _Key("journal_seconds", parse_duration, '"20s"',
                    "Names and attributes reach the store after so long."),
    "scrub_every": _Key("scrub_every", _parse_scrub, '"auto"',
                        'All copies are read back and compared so often. "auto": every 90 days from a\n'
                        "# directory, never from S3, where each byte that is read may be paid for."),
    "scrub_rate": _Key("scrub_rate", _parse_scrub_rate, '"4M"', "... at most so much of them a second."),
}  # fmt: skip
_TABLES: dict[str, type[_Patterns]] = {"never": Never, "keep": Keep}
_TABLE_KEYS = {"patterns": _parse_patterns}


def load(path: str) -> VolumeConfig:
    """Read and check a configuration. Raises ConfigError naming file, line and key."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text") from exc
    return parse(text, path)


def parse(text: str, path: str = FILE_NAME) -> VolumeConfig:
    """Check the text of a configuration; `path` is for messages. Raises ConfigError."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        match = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)", str(exc))
        line = match[1] if match and match[1] else str(text.count("\n") + 1)
        reason = str(exc).split(" (at ")[0]
        if "overwrite a value" in reason:
            raise ConfigError(f"{path}:{line}: a key is given twice: take one of them away") from exc
        raise ConfigError(f"{path}:{line}: is not valid TOML: {reason[:1].lower()}{reason[1:]}") from exc
    tables = {name: raw.pop(name) for name in _TABLES if name in raw}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in _KEYS:
            raise _unknown(text, path, "", key, (*_KEYS, *_TABLES))
        values[_KEYS[key].field] = _convert(text, path, "", key, value, _KEYS[key].reader)
    for name, table in tables.items():
        values[name] = _parse_table(text, path, name, table)
    config = VolumeConfig(**values)
    if config.low > config.high:
        key, other = ("low", "high") if "low" in raw else ("high", "low")
        shares = f"low ({config.low:.0%}) must not be above high ({config.high:.0%})"
        raise ConfigError(f"{path}:{_line(text, '', key)}: {key}: {shares}: change it, or {other} too")
    return config


def _parse_table(text: str, path: str, name: str, table: object) -> _Patterns:
    if not isinstance(table, dict):
        raise ConfigError(f"{path}:{_line(text, '', name)}: {name}: write it as a table: [{name}]")
    values = {}
    for key, value in table.items():
        if key not in _TABLE_KEYS:
            raise _unknown(text, path, name, key, tuple(_TABLE_KEYS))
        values[key] = _convert(text, path, name, key, value, _TABLE_KEYS[key])
    return _TABLES[name](**values)


def _convert(text: str, path: str, table: str, key: str, value: object, reader: Callable[[object], Any]) -> Any:
    try:
        return reader(value)
    except ValueError as exc:
        raise ConfigError(f"{path}:{_line(text, table, key)}: {_full(table, key)}: {exc}") from exc


def _unknown(text: str, path: str, table: str, key: str, known: tuple[str, ...]) -> ConfigError:
    near = difflib.get_close_matches(key, known, 1, 0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
    return ConfigError(f"{path}:{_line(text, table, key)}: unknown key {_full(table, key)!r}: {remedy}")


def _full(table: str, key: str) -> str:
    return f"{table}.{key}" if table else key


def _line(text: str, table: str, key: str) -> int:
    """The line (from 1) on which a key stands; 1 where it cannot be told."""
    now = ""
    wanted = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[.=]")
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[+\s*([^]]*?)\s*\]", line)
        if header:
            now = header[1]
            if not table and now.split(".")[0].strip("\"' ") == key:
                return number
        elif now == table and wanted.match(line):
            return number
    return 1


def default_text(**settings: str) -> str:
    """The text of a new configuration: every key with its meaning; `settings` are raw values of keys."""
    lines = ["# TierFS volume. Changes take effect as soon as this file is saved.", ""]
    for key, entry in _KEYS.items():
        given = settings.get(key)
        assignment = f"{key} = {_quote(given)}" if given is not None else f"# {key} = {entry.default}"
        lines += [f"# {entry.comment}", assignment, ""]
    lines += [
        "# What is neither demoted nor copied: a name anywhere, or with a / a path from the volume's root, of",
        "# a file or of a directory with all below it. As in .gitignore a pattern with a / at its end means",
        "# directories only, and one with a ! before it takes back what stands above: !*/ all directories.",
        *_table_lines("never", NEVER_PATTERNS),
        "# What is copied, and never demoted; written like those above.",
        *_table_lines("keep", KEEP_PATTERNS),
    ]
    return "\n".join(lines)


def _table_lines(name: str, patterns: tuple[str, ...]) -> list[str]:
    return [f"[{name}]", "# patterns = [", *(f"#     {_quote(pattern)}," for pattern in patterns), "# ]", ""]


def write_default(path: str, **settings: str) -> None:
    """Create a configuration file (mode 0600), durably. Raises ConfigError for a bad setting, OSError."""
    text = default_text(**settings)
    parse(text, path)
    _replace(path, text)


def set_key(path: str, key: str, value: str) -> None:
    """Change one top-level key, keeping the rest of the file. Raises ConfigError, OSError."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    assignment = f"{key} = {_quote(value)}"
    top = next((i for i, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
    for pattern in (rf"\s*{key}\s*=", rf"\s*#\s*{key}\s*="):
        found = next((i for i in range(top) if re.match(pattern, lines[i])), None)
        if found is not None:
            lines[found] = assignment
            break
    else:
        lines.insert(top, assignment)
    text = "\n".join(lines) + "\n"
    parse(text, path)
    _replace(path, text)


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise ConfigError(f"{value!r}: control characters cannot stand in a configuration")
    return f'"{escaped}"'


def _replace(path: str, text: str) -> None:
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    os.replace(path + ".new", path)
