"""Topics that cannot be written to now: their messages are left out of claims until a probe finds them again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outbox_relay.relay.failures import Backoff

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

_FIRST_PROBE_SECONDS = 1.0
_MOST_PROBE_SECONDS = 30.0


@dataclass(slots=True)
class _Hold:
    backoff: Backoff = field(default_factory=lambda: Backoff(_FIRST_PROBE_SECONDS, _MOST_PROBE_SECONDS))
    aggregate_types: set[str] = field(default_factory=set)
    is_held: bool = False
    probe_at: float = 0.0


@dataclass(slots=True)
class HeldTopics:
    """
    Which topics are held, since when, and when to ask again; it is told the time.

    A topic that is released and fails again goes on with its longer pauses, until something was acknowledged there:
    a topic that may be seen but not written to would otherwise fail every second.
    """

    chance: random.Random
    _holds: dict[str, _Hold] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Tell whether any topic is held or was until lately."""
        return bool(self._holds)

    @property
    def topics(self) -> list[str]:
        """Topics held now."""
        return [topic for topic, hold in self._holds.items() if hold.is_held]

    @property
    def aggregate_types(self) -> set[str]:
        """Aggregate types to leave out of claims."""
        return {name for hold in self._holds.values() if hold.is_held for name in hold.aggregate_types}

    def hold(self, topic: str, *, aggregate_type: str, now: float) -> bool:
        """Hold *topic* until its next probe; True if it was not held before."""
        hold = self._holds.setdefault(topic, _Hold())
        hold.aggregate_types.add(aggregate_type)
        if hold.is_held:
            return False
        hold.is_held = True
        hold.probe_at = now + hold.backoff.next_pause(self.chance)
        return True

    def due(self, *, now: float) -> list[str]:
        """Give the held topics whose time to be probed has come."""
        return [topic for topic, hold in self._holds.items() if hold.is_held and hold.probe_at <= now]

    def postpone(self, topic: str, *, now: float) -> None:
        """Keep holding *topic*: the probe failed."""
        hold = self._holds[topic]
        hold.probe_at = now + hold.backoff.next_pause(self.chance)

    def release(self, topic: str) -> None:
        """Let messages of *topic* be claimed again."""
        self._holds[topic].is_held = False

    def acknowledged(self, topics: Iterable[str]) -> None:
        """Forget the past of topics that took a message."""
        for topic in topics:
            if topic in self._holds and not self._holds[topic].is_held:
                del self._holds[topic]
