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
    from collections.abc import Iterable, Iterator

    from outbox_relay.config import Configuration, Settings
    from outbox_relay.operate.doctor.check import Check

_COLORS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--all", "shows_all", is_flag=True, help="Print the checks that are OK, too, as JSON always does.")
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

    What is not OK is WARN or FAIL, with the remedy to paste below it. Exits with 5 when a check fails.
    """
    settings = configuration.settings
    check_producer_config(settings.producer_config())
    checks = examine(_subject(settings, long_seconds=long_seconds))
    found = _as_json(checks) if as_json else list(_as_text(checks, shows_all=shows_all))
    if any(check.status == "FAIL" for check in found):
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


def _as_json(checks: Iterable[Check]) -> list[Check]:
    found = list(checks)
    click.echo(json.dumps([asdict(check) for check in found], indent=2))
    return found


def _as_text(checks: Iterable[Check], *, shows_all: bool) -> Iterator[Check]:
    """Print what is not OK as soon as it is known, since some checks take seconds; then how many are OK."""
    fine = 0
    for check in checks:
        fine += check.status == "OK"
        if shows_all or check.status != "OK":
            _print(check)
        yield check
    click.echo(f"{fine} checks are OK{'' if shows_all else '; --all shows them'}")


def _print(check: Check) -> None:
    status = click.style(f"{check.status:<4}", fg=_COLORS[check.status])
    click.echo(f"{status}  {check.name}: {printable(check.finding)}")
    for line in check.remedy.splitlines():
        click.echo(f"      {printable(line)}")
