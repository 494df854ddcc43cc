"""How much of the local disk is to be freed: by the limit of the volume, and by the filesystem's own state."""

from __future__ import annotations

from tierfs.kit import Kit


class Space:
    """Of the filesystem of the tree."""

    def __init__(self, kit: Kit, beside: bool | None) -> None:
        """`beside`: the store is on this filesystem too (None: not known as yet, which may be set later)."""
        self._kit = kit
        self.beside = beside

    @property
    def elsewhere(self) -> bool:
        """What leaves for the store leaves this filesystem."""
        return self.beside is False

    def left(self) -> float:
        """Bytes until the filesystem runs low. Raises OSError."""
        space = self._kit.tree.space()
        return space.available - self._kit.config.min_free * space.total

    def share(self, parts: int) -> int:
        """This part of the whole filesystem, in bytes. Raises OSError."""
        return self._kit.tree.space().total // parts

    def excess(self, unseen: int = 0) -> int:
        """Bytes to free: above the high watermark down to the low one, or what the filesystem lacks itself.
        `unseen`: local bytes that the index does not know of. Raises OSError, IndexError_."""
        config = self._kit.config
        excess = 0
        if config.local_limit:
            local = self._kit.index.totals().local_bytes + unseen
            if local > config.high * config.local_limit:
                excess = local - int(config.low * config.local_limit)
        if self.elsewhere:
            space = self._kit.tree.space()
            wanted = int(config.min_free * space.total)
            if space.available < wanted:
                # A little more, so that the next file does not begin it all again.
                excess = max(excess, wanted + wanted // 10 - space.available)
        return excess
