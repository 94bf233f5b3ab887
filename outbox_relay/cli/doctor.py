"""`outbox-relay doctor`: what the checks have found, and what to paste where one does not pass."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from outbox_relay.cli.exits import ExitCode
from outbox_relay.cli.options import settings_options
from outbox_relay.cli.terminal import printable
from outbox_relay.config import check_producer_config
from outbox_relay.operate.doctor.examine import Subject, examine
from outbox_relay.relay.message import Addressing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outbox_relay.config import Configuration, Settings
    from outbox_relay.operate.doctor.check import Check

_MOST_ALIKE = 3
_COLORS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--all", "shows_all", is_flag=True, help="Print every check, as JSON always does.")
@click.option(
    "--long-after",
    "long_seconds",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Age at which an open transaction is long, and a prepared one forgotten.",
)
@settings_options("schema")
@click.pass_context
def doctor(
    ctx: click.Context, configuration: Configuration, *, as_json: bool, shows_all: bool, long_seconds: float
) -> None:
    """
    Examine PostgreSQL, Kafka and the way to them, as the relay would use them; nothing is changed.

    What is not OK is FAIL or WARN, in this order, with the remedy to paste below it. Exits with 5 when a check fails.
    """
    settings = configuration.settings
    check_producer_config(settings.producer_config())
    checks = list(examine(_subject(settings, long_seconds=long_seconds)))
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        click.echo("\n".join(report(checks, shows_all=shows_all)))
    if any(check.status == "FAIL" for check in checks):
        ctx.exit(ExitCode.CHECK_FAILED)


def _subject(settings: Settings, *, long_seconds: float) -> Subject:
    return Subject(
        conninfo=settings.database_url.get_secret_value(),
        schema=settings.schema_name,
        ordering_timeout=settings.ordering_timeout,
        long_seconds=long_seconds,
        addressing=Addressing(
            template=settings.topic_template, topics=settings.topic_map, allowed=settings.allowed_topics
        ),
        producer_config=settings.producer_config(),
    )


def report(checks: Sequence[Check], *, shows_all: bool) -> list[str]:
    """Return the lines for people: what fails, then what is worth a warning, then how many checks are OK."""
    lines: list[str] = []
    for status in ("FAIL", "WARN", "OK") if shows_all else ("FAIL", "WARN"):
        by_finding: dict[str, list[Check]] = {}
        for check in checks:
            if check.status == status:
                by_finding.setdefault(check.finding, []).append(check)
        for alike in by_finding.values():
            lines += _lines_alike(alike, most=len(alike) if shows_all else _MOST_ALIKE)
    fine = sum(check.status == "OK" for check in checks)
    return [*lines, f"{fine} checks are OK{'' if shows_all else '; --all shows them'}"]


def _lines_alike(checks: Sequence[Check], *, most: int) -> list[str]:
    """Return the lines of checks with one finding, as hundreds of topics may have it: *most* of them, and a number."""
    lines = [line for check in checks[:most] for line in _lines(check)]
    if len(checks) > most:
        lines.append(f"{_styled(checks[0])}  the same of {len(checks) - most:,} more; --all shows them")
    return lines


def _lines(check: Check) -> list[str]:
    remedy = [f"      {printable(line)}" for line in check.remedy.splitlines()]
    return [f"{_styled(check)}  {check.name}: {printable(check.finding)}", *remedy]


def _styled(check: Check) -> str:
    return click.style(f"{check.status:<4}", fg=_COLORS[check.status])
