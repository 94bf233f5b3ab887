"""How much is measured: the sizes of every scenario."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """
    Sizes of all scenarios; the defaults are those of the full run.

    Attributes:
        repeat: Rounds of every scenario but `published` and `horizon`, which have counts of their own, and `snapshot`,
            `hour` and `size`, which are measured once.
        drain_messages: Backlog to drain.
        drain_relays: Processes, and lanes of each, that drain it.
        latency_rates: Transactions a second; revisions are compared at the first two.
        latency_seconds: How long each rate is measured, after `warm_up_seconds` at the same rate.
        snapshot_seconds: How long a snapshot is held open.
        published_rows: Published messages that a batch has to stay clear of, in rising order.
        claims: Batches timed beside each number of published messages.
        layout_messages: Messages drained from each layout.
        open_transactions: Bystanders while the horizon looks for writers, in rising order.
        looks: Looks timed beside each number of bystanders.
        idle_seconds: How long an idle relay is watched.
        hour_seconds: How long an hour takes.
        size_messages: Messages whose bytes are counted, for each of `size_payload_bytes`.
        inbox_messages: Messages consumed in large transactions.
        inbox_messages_singly: Messages consumed in transactions of their own.
        inbox_messages_kept: Messages accepted before the size of an inbox is looked at.
    """

    repeat: int = 3
    drain_messages: int = 500_000
    drain_relays: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))
    latency_rates: tuple[int, ...] = (500, 2_000, 5_000)
    latency_seconds: float = 20.0
    warm_up_seconds: float = 5.0
    snapshot_seconds: float = 600.0
    published_rows: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    claims: int = 20
    layout_messages: int = 50_000
    open_transactions: tuple[int, ...] = (0, 50, 150, 300)
    looks: int = 100
    idle_seconds: float = 20.0
    hour_seconds: float = 180.0
    size_messages: int = 100_000
    size_payload_bytes: tuple[int, ...] = (200, 1_000, 10_000)
    inbox_messages: int = 50_000
    inbox_messages_singly: int = 5_000
    inbox_messages_kept: int = 1_000_000


FULL = Plan()
QUICK = Plan(
    repeat=1,
    drain_messages=100_000,
    drain_relays=((1, 1), (1, 2), (2, 2)),
    latency_seconds=5.0,
    warm_up_seconds=2.0,
    snapshot_seconds=30.0,
    published_rows=(10_000, 100_000, 1_000_000),
    open_transactions=(0, 50, 150),
    idle_seconds=5.0,
    hour_seconds=60.0,
    size_messages=20_000,
    inbox_messages=20_000,
    inbox_messages_singly=2_000,
    inbox_messages_kept=100_000,
)
