"""`outbox-relay demo`: the steps on standard error as they happen, the verdict on standard output."""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import TYPE_CHECKING

import click

from outbox_relay.cli.exits import ExitCode
from outbox_relay.sandbox.demo import run_demo

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox_relay.sandbox.demo import KafkaChoice, Report


@click.command()
@click.option(
    "--kafka",
    type=click.Choice(["mock", "broker"]),
    help="A mock cluster inside this process, or a real broker, which needs Java and Maven. "
    "Default: the cluster at KAFKA_BOOTSTRAP_SERVERS, or the mock where that is not set.",
)
@click.option("--seconds", type=click.FloatRange(min=5), default=15.0, show_default=True, help="How long orders come.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def demo(*, kafka: KafkaChoice | None, seconds: float, as_json: bool) -> None:
    """
    Show the main job under load and a kill -9, in less than a minute.

    A shop commits and rolls back orders in a PostgreSQL of the demo's own while two relays publish them, and one of
    these is killed. Then everything committed is compared with everything consumed. Exits 5 when a promise is broken.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that every process is stopped then, too
    report = run_demo(kafka=kafka, seconds=seconds, say=_steps())
    click.echo(_as_json(report) if as_json else _as_table(report))
    if not report.verdict.is_correct:
        sys.exit(ExitCode.CHECK_FAILED)


def _steps() -> Callable[[str], None]:
    """Make the function that prints one step with the time since the start."""
    start = time.monotonic()

    def say(step: str) -> None:
        click.echo(f"{time.monotonic() - start:5.1f} s  {step}", err=True)

    return say


def _as_json(report: Report) -> str:
    return json.dumps(
        report.verdict.counts()
        | {
            "latency_median_seconds": report.latency_median_seconds,
            "latency_p99_seconds": report.latency_p99_seconds,
            "is_correct": report.verdict.is_correct,
        }
    )


def _as_table(report: Report) -> str:
    counts = report.verdict.counts()
    lines = [
        ("committed", f"{counts['committed']:,}", ""),
        ("rolled back", f"{counts['rolled_back']:,}", ""),
        ("published", f"{counts['published']:,}", "distinct messages that a consumer received"),
        ("lost", f"{counts['lost']:,}", "committed, never received"),
        ("phantoms", f"{counts['unexpected']:,}", "received, never committed"),
        ("out of order", f"{counts['reordered']:,}", "behind a later message of their key"),
        ("false marks", f"{counts['false_mark']:,}", "marked published, never received"),
        ("miscounted", f"{counts['miscounted']:,}", "marks that counted other messages than there are"),
        ("corrupted", f"{counts['corrupted']:,}", "received with another key, value or number"),
        ("parked", f"{counts['parked']:,}", "put aside because Kafka will never take them"),
        ("given up on", f"{counts['given_up']:,}", "late, and marked as such"),
        ("duplicates", f"{counts['duplicated']:,}", "allowed: delivery is at least once"),
        (
            "latency, median",
            _milliseconds(report.latency_median_seconds),
            "from commit to consumer; transactions that overlap are waited for",
        ),
        ("latency, p99", _milliseconds(report.latency_p99_seconds), ""),
    ]
    conclusion = (
        "Nothing is lost, nothing is a phantom, every key is in order."
        if report.verdict.is_correct
        else "A PROMISE IS BROKEN: see above."
    )
    return "\n".join(["", *(f"  {name:<16}{value:>9}  {note}".rstrip() for name, value, note in lines), "", conclusion])


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"
