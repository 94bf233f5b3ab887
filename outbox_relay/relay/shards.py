"""Which lane of this process holds which shards, and how far each shard is drained."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

SHARDS = 16
_ALL = range(SHARDS)


class Shards:
    """
    Shared by the lanes of a process, so that they do not compete for the same shards in the database.

    A shard is *drained* through a number when nothing is left to publish in it up to that number.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders: list[str | None] = [None] * SHARDS
        self._drained = [0] * SHARDS

    @property
    def drained_through(self) -> int:
        """The number through which every shard is drained."""
        return min(self._drained)

    def drained_for(self, lane: str) -> int:
        """Return the number through which every shard is drained that no lane but *lane* holds."""
        holders = zip(self._drained, self._holders, strict=True)
        return min((through for through, holder in holders if holder in (None, lane)), default=0)

    def await_free(self, *, timeout: float) -> bool:
        """Wait until no lane holds some shard, at most *timeout* seconds; True if there is one."""
        with self._changed:
            return self._changed.wait_for(lambda: None in self._holders, timeout)

    def take(self, lane: str) -> list[int]:
        """Let *lane* hold all shards that no other lane holds, and return them."""
        with self._changed:
            taken = [shard for shard in _ALL if self._holders[shard] in (None, lane)]
            for shard in taken:
                self._holders[shard] = lane
        return taken

    def keep(self, lane: str, shards: Collection[int]) -> None:
        """Let *lane* hold none but *shards* of those that it has taken."""
        with self._changed:
            for shard in _ALL:
                if self._holders[shard] == lane and shard not in shards:
                    self._holders[shard] = None
            self._changed.notify_all()

    def drain(self, shards: Iterable[int], *, through: int) -> None:
        """Note that *shards* are drained through a number."""
        for shard in shards:
            self._drained[shard] = through

    def forget(self) -> None:
        """Note that nothing is known of what is drained: behind a new connection may be another server."""
        self._drained = [0] * SHARDS
