"""How names are written for people: on the terminal, in errors and in the log, the same everywhere.

Bytes that are no UTF-8 are written as \\xff, newlines as \\n; what is written so once more stays as it is. In
JSON documents names are as Python has them, such bytes as lone surrogates.
"""

from __future__ import annotations

import os


def shown(name: bytes | str) -> str:
    """A name, or a message that has names in it, on one line that every encoding and every log can take."""
    text = os.fsdecode(name)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def quoted(name: bytes | str) -> str:
    """A name within a sentence."""
    return f"'{shown(name)}'"


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
