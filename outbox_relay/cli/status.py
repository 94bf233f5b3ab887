"""`outbox-relay status`: the backlog, what waits, what is parked, and who holds things up."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from outbox_relay.cli.exits import ExitCode
from outbox_relay.cli.options import settings_options
from outbox_relay.cli.terminal import printable
from outbox_relay.database import connect
from outbox_relay.operate.status import MOST_COUNTED, Status, how_to_end, read_status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from outbox_relay.config import Configuration
    from outbox_relay.relay.horizon import OpenTransaction

_SECONDS = click.FloatRange(min=0.1)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch an object a line.")
@click.option(
    "--watch",
    "watch_seconds",
    is_flag=False,
    flag_value=2.0,
    type=_SECONDS,
    metavar="[SECONDS]",
    help="Look again every SECONDS, 2 by default, until interrupted.",
)
@click.option(
    "--max-age",
    "max_age_seconds",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Exit with 5 when the oldest unpublished message is older.",
)
@settings_options("schema")
@click.pass_context
def status(
    ctx: click.Context,
    configuration: Configuration,
    *,
    as_json: bool,
    watch_seconds: float | None,
    max_age_seconds: float | None,
) -> None:
    """Show the backlog, its age, what waits and why, what is parked, and who holds the horizon or a shard."""
    settings = configuration.settings
    url = settings.database_url.get_secret_value()
    with closing(connect(url, application_name="outbox-relay status")) as connection:
        while True:
            found = read_status(connection, schema=settings.schema_name)
            _show(found, as_json=as_json, is_watched=watch_seconds is not None)
            if max_age_seconds is not None and found.oldest_age_seconds > max_age_seconds:
                ctx.exit(ExitCode.CHECK_FAILED)
            if watch_seconds is None:
                return
            time.sleep(watch_seconds)


def _show(found: Status, *, as_json: bool, is_watched: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(found), indent=None if is_watched else 2))
        return
    if is_watched and sys.stdout.isatty():
        click.clear()
    click.echo(_text(found))


def _text(found: Status) -> str:
    oldest = f": message {found.oldest_no}" if found.oldest_no is not None else ""
    reasons = ", ".join(f"{printable(code)}: {count:,}" for code, count in found.waiting_reasons.items())
    lines = [
        f"unpublished   {_count(found.unpublished)}",
        f"oldest        {found.oldest_age_seconds:.1f} s{oldest}",
        f"waiting       {_count(found.waiting)}{f'; {reasons}' if reasons else ''}",
        f"parked        {_count(found.parked)} of {found.parked_keys:,} keys",
    ]
    if found.uncollected_writers:
        lines.append(f"late writers  {found.uncollected_writers} have ended, and nobody has collected their messages")
    if found.lockers:
        lines += [f"shards held   by {len(found.lockers)}, who are no relays", *_transactions(found.lockers)]
    return "\n".join([*lines, f"open writers  {len(found.writers)}", *_transactions(found.writers)])


def _count(number: int) -> str:
    return f"{number:,} or more" if number >= MOST_COUNTED else f"{number:,}"


def _transactions(found: Iterable[OpenTransaction]) -> Iterator[str]:
    return (f"  {_transaction(each)}" for each in found)


def _transaction(found: OpenTransaction) -> str:
    """One open transaction with what ends it, for an operator to paste."""
    who = found.application_name or found.role_name
    what = f"prepared {found.gid!r} of {who}" if found.gid else f"pid {found.pid} ({who}), {found.state}"
    last = f"  -- last query: {' '.join(found.query.split())}" if found.query else ""
    return printable(f"{what}, {found.age_seconds:.1f} s: {how_to_end(found)}{last}")
