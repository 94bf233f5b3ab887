"""The checks of messages: whether they get through, and who keeps them from it; each a function of the status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox_relay.operate.doctor.check import Check, duration
from outbox_relay.operate.status import how_to_end

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outbox_relay.operate.status import Status
    from outbox_relay.relay.horizon import OpenTransaction

MANY_MARKS = 1_000_000
_UNRECONCILED_SECONDS = 3600.0


def check_horizon(status: Status, *, ordering_timeout: float) -> Check:
    """Does a writer hold up the messages of everybody else?"""
    holders = [writer for writer in status.writers if writer.age_seconds > ordering_timeout]
    if holders:
        return Check("horizon", "FAIL", f"held by {who(holders)}", how_to_end_all(holders))
    return Check("horizon", "OK", f"free; writers at work: {len(status.writers)}")


def check_shard_locks(status: Status, *, long_seconds: float) -> Check:
    """Does somebody else than a relay hold shards, so that nobody publishes there?"""
    long = [locker for locker in status.lockers if locker.age_seconds > long_seconds]
    if long:
        return Check("shard locks", "FAIL", f"held by {who(long)}", how_to_end_all(long))
    return Check("shard locks", "OK", "held by nobody but relays for long")


def check_backlog(status: Status, *, long_seconds: float) -> Check:
    """Does everything that was written reach Kafka soon?"""
    finding = f"not in Kafka yet: {status.unpublished:,}"
    if status.oldest_no is not None:
        finding += f", the oldest is message {status.oldest_no}, {duration(status.oldest_age_seconds)} old"
    if status.oldest_age_seconds > long_seconds:
        return Check(
            "backlog", "WARN", finding, "# start a relay; if one runs, its log and /readyz tell what it waits for"
        )
    return Check("backlog", "OK", finding)


def check_waiting(status: Status, *, long_seconds: float) -> Check:
    """Do messages that a mark has passed get no further?"""
    if not status.waiting:
        return Check("waiting messages", "OK", "none")
    reasons = ", ".join(f"{code}: {count:,}" for code, count in status.waiting_reasons.items())
    finding = f"{status.waiting:,} for up to {duration(status.longest_wait_seconds)}; {reasons}"
    if status.longest_wait_seconds > long_seconds:
        return Check("waiting messages", "WARN", finding, "# mend the reason, a missing topic for instance")
    return Check("waiting messages", "OK", finding)


def check_parked(status: Status) -> Check:
    """Does somebody have to decide about messages?"""
    if status.parked:
        finding = f"{status.parked:,} of {status.parked_keys:,} keys"
        return Check("parked messages", "WARN", finding, "# decide about them: outbox-relay parked list")
    return Check("parked messages", "OK", "none")


def check_late_writers(status: Status) -> Check:
    """Are messages of given-up writers left alone?"""
    if status.uncollected_writers:
        finding = f"{status.uncollected_writers} have ended, and nobody has collected their messages"
        return Check("late writers", "WARN", finding, "# start a relay: it collects them within seconds")
    return Check("late writers", "OK", "the messages of all that have ended are collected")


def check_marks(status: Status, *, unthinned_marks: int) -> Check:
    """Does somebody compare the marks with the rows, and thin them out?"""
    if status.unreconciled_seconds > _UNRECONCILED_SECONDS:
        finding = f"not compared with the messages for {duration(status.unreconciled_seconds)}"
    elif unthinned_marks >= MANY_MARKS:
        finding = f"{unthinned_marks:,} or more that nobody has thinned"
    else:
        return Check("marks", "OK", f"compared with the messages; not thinned yet: {unthinned_marks:,}")
    return Check("marks", "WARN", finding, "# start a relay; if one runs, its log says why as reconciling_failed")


def who(transactions: Sequence[OpenTransaction]) -> str:
    """Name the sessions and prepared transactions behind *transactions*."""
    return "; ".join(
        f"{transaction.gid or f'pid {transaction.pid}'} ({transaction.application_name or transaction.role_name}, "
        f"{transaction.state}) for {duration(transaction.age_seconds)}"
        for transaction in transactions
    )


def how_to_end_all(transactions: Sequence[OpenTransaction]) -> str:
    """Return the statements that end *transactions* without their effects."""
    return "\n".join(how_to_end(transaction) for transaction in transactions)
