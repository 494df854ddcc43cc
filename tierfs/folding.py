"""What a batch of marks makes of the index, written once: many of them are about the same file.

A file is made, closed, renamed and removed; each of that alone would read, change and write its record. Folded,
the record is read once and written once, and that of a file which has come and gone meanwhile stands nowhere.
"""

from __future__ import annotations

from tierfs.index_writer import Writer
from tierfs.model import Record


class Folded:
    """Takes a Writer's place for the marks of one batch. Records and notes come into the transaction with
    `finish`, all else at once."""

    def __init__(self, w: Writer) -> None:
        self._w = w
        self._records: dict[int, Record | None] = {}  # as the marks have made them; None: there is none
        self._rows: dict[int, tuple[Record | None, int]] = {}  # as the index has them
        self._changed: dict[int, bool] = {}  # to be written; True: closed only now
        self._notes: dict[tuple[int, bytes], None] = {}
        self.end, self.given = w.end, w.given
        self.put_dir, self.drop_dir = w.put_dir, w.drop_dir
        self.put_pin, self.drop_pin = w.put_pin, w.drop_pin

    def get(self, ino: int) -> Record | None:
        """The record, as the marks before have left it."""
        if ino not in self._rows:
            row = self._rows[ino] = self._w.row(ino)
            self._records[ino] = row[0]
        return self._records[ino]

    def put(self, record: Record, touched: bool = False) -> None:
        """Set a record (see Writer.put), which is checked when it is written."""
        self.get(record.ino)
        self._records[record.ino] = record
        self._changed[record.ino] = self._changed.get(record.ino, False) or touched

    def delete(self, ino: int) -> None:
        """Forget an inode."""
        if self.get(ino) is not None and self._rows[ino][0] is None:
            self._notes.pop((ino, b""), None)  # the journal has never heard of it
        self._changed.pop(ino, None)
        # Also where it has no record: of a former inode of this number more may be left.
        self._w.delete(ino, self._rows[ino])
        self._rows[ino], self._records[ino] = (None, 0), None

    def note(self, ino: int, name: bytes = b"") -> None:
        """The journal shall look at this, once."""
        self._notes[ino, name] = None

    def finish(self) -> None:
        """Write what has been folded. Raises TransitionError."""
        for ino, touched in self._changed.items():
            record = self._records[ino]
            if record is not None:
                self._w.put(record, touched, self._rows[ino])
        for ino, name in self._notes:
            self._w.note(ino, name)
