"""Moments as people write them: an ISO date and time, or how long ago.

    2026-11-20 · 2026-11-20T14:30 · 2026-11-20 14:30:05+01:00 · 90 minutes ago · 2 days ago · 1 week ago

Without a zone it is local time; a date alone means its very beginning.
"""

from __future__ import annotations

import re
from datetime import datetime

from tierfs.errors import UsageError

GRAMMAR = 'a date and time like 2026-11-20T14:30, or like "2 days ago"'
_AGO = re.compile(r"(\d+)\s*(second|minute|hour|day|week)s?\s+ago", re.IGNORECASE)
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?")


def parse(text: str, now: float) -> int:
    """Nanoseconds since the epoch; `now` in seconds. Raises UsageError."""
    text = text.strip()
    ago = _AGO.fullmatch(text)
    if ago:
        return int((now - int(ago[1]) * _SECONDS[ago[2].lower()]) * 1e9)
    try:
        if not _DATE.fullmatch(text):
            raise ValueError
        return int(datetime.fromisoformat(text).timestamp() * 1e9)
    except (ValueError, OverflowError, OSError) as exc:
        raise UsageError(f"{text!r} is no moment: write {GRAMMAR}") from exc
