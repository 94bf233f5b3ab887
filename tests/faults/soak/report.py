"""The report of a soak: what struck, what was found, what it cost."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass
from operator import attrgetter
from statistics import median, quantiles
from typing import TYPE_CHECKING

from outbox_relay.sandbox.history import arrivals
from outbox_relay.sandbox.judge import judge

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from outbox_relay.sandbox.history import History, Record
    from outbox_relay.sandbox.judge import Verdict
    from tests.faults.soak.run import Incident, Soak

AFTER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class FaultCount:
    """
    What one fault came to.

    Attributes:
        struck: How often it was to strike.
        fired: How often there was a sign that it did.
        recovery_seconds: Of the times it fired alone: from the healing until all committed before was settled.
        duplicates: Records beyond the first that arrived from its beginning until the next one began.
    """

    struck: int
    fired: int
    recovery_seconds: list[float]
    duplicates: int


@dataclass(frozen=True, slots=True)
class Report:
    """
    Of one soak.

    Attributes:
        latency_seconds: From commit to arrival, of messages committed undisturbed, during a fault (until the
            recovery), and within ten seconds after it.
        not_recovered: Faults after which something was left unsettled for too long.
        skipped: How many messages the nemesis has written where no relay looks.
        found_skipped: How many relays have found there; any more would be false alarms.
    """

    seed: int
    seconds: float
    verdict: Verdict
    faults: dict[str, FaultCount]
    latency_seconds: dict[str, list[float]]
    not_recovered: list[str]
    oldest_transaction_seconds: float
    skipped: int
    found_skipped: int

    @property
    def never_fired(self) -> list[str]:
        """Faults that were to strike and left no sign."""
        return [name for name, count in self.faults.items() if not count.fired]


def report_of(soak: Soak, *, seed: int, seconds: float) -> Report:
    verdict = judge(soak.history)
    return Report(
        seed=seed,
        seconds=seconds,
        verdict=verdict,
        faults=_faults(soak),
        latency_seconds=_latencies(soak.history, incidents=soak.incidents),
        not_recovered=[" + ".join(each.step.faults) for each in soak.incidents if each.recovered_at is None],
        oldest_transaction_seconds=soak.oldest_transaction_seconds,
        skipped=soak.skipped,
        found_skipped=soak.found_skipped,
    )


def lines(report: Report) -> Iterator[str]:
    """The report as Markdown."""
    yield f"Seed {report.seed}, {report.seconds:,.0f} s of faults."
    yield ""
    yield "| verdict | messages |"
    yield "|---|---|"
    yield from (f"| {word} | {count:,} |" for word, count in report.verdict.counts().items())
    yield ""
    yield "| fault | struck | fired | recovered in, median | at most | duplicates |"
    yield "|---|---|---|---|---|---|"
    for name, count in sorted(report.faults.items()):
        times = count.recovery_seconds
        recovery = f"{median(times):.2f} s | {max(times):.2f} s" if times else "- | -"
        yield f"| `{name}` | {count.struck} | {count.fired} | {recovery} | {count.duplicates:,} |"
    yield ""
    yield "| committed | messages | median | p99 | at most |"
    yield "|---|---|---|---|---|"
    for name, latencies in report.latency_seconds.items():
        yield f"| {name} | {len(latencies):,} | {_spread(latencies)} |"
    yield ""
    yield f"Oldest transaction of a relay: {report.oldest_transaction_seconds:.1f} s."
    yield f"Skipped on purpose: {report.skipped:,}; found by reconciling: {report.found_skipped:,}."
    if report.not_recovered:
        yield f"Not recovered: {', '.join(report.not_recovered)}."


def _faults(soak: Soak) -> dict[str, FaultCount]:
    struck = Counter(name for incident in soak.incidents for name in incident.step.faults)
    fired = Counter(name for incident in soak.incidents for name in incident.fired)
    recoveries: dict[str, list[float]] = defaultdict(list)
    for incident in soak.incidents:
        if len(incident.fired) == 1 and incident.recovered_at is not None:
            recoveries[incident.fired[0]].append(incident.recovered_at - incident.healed_at)
    duplicates = _duplicates_by_fault(soak)
    return {name: FaultCount(struck[name], fired[name], recoveries[name], duplicates[name]) for name in sorted(struck)}


def _duplicates_by_fault(soak: Soak) -> Counter[str]:
    begins = [incident.began_at for incident in soak.incidents]
    counted: Counter[str] = Counter()
    for record in _duplicates(soak.history.records):
        index = bisect_right(begins, record.arrived_at) - 1
        counted.update(soak.incidents[index].fired if index >= 0 else ["none"])
    return counted


def _duplicates(records: Iterable[Record]) -> Iterator[Record]:
    seen: set[str] = set()
    for record in sorted(records, key=attrgetter("topic", "partition", "offset")):
        if record.is_replay:
            continue
        if record.message_id in seen:
            yield record
        seen.add(record.message_id)


def _latencies(history: History, *, incidents: Sequence[Incident]) -> dict[str, list[float]]:
    begins = [incident.began_at for incident in incidents]
    found: dict[str, list[float]] = {"undisturbed": [], "during a fault": [], "just after it": []}
    for write, arrived_at in arrivals(history):
        index = bisect_right(begins, write.ended_at) - 1
        period = _period(incidents[index], at=write.ended_at) if index >= 0 else "undisturbed"
        found[period].append(arrived_at - write.ended_at)
    return found


def _period(incident: Incident, *, at: float) -> str:
    end = incident.recovered_at or incident.healed_at
    if at < end:
        return "during a fault"
    return "just after it" if at < end + AFTER_SECONDS else "undisturbed"


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "- | - | -"
    return f"{1000 * median(values):,.1f} ms | {1000 * quantiles(values, n=100)[98]:,.1f} ms | {max(values):,.2f} s"
