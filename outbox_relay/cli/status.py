"""`outbox-relay status`: the backlog, what is parked, and who holds the horizon."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from outbox_relay.cli.options import settings_options
from outbox_relay.database import connect
from outbox_relay.operate.status import MOST_COUNTED, Status, read_status

if TYPE_CHECKING:
    from outbox_relay.config import Configuration
    from outbox_relay.relay.horizon import OpenTransaction


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options("schema")
def status(configuration: Configuration, *, as_json: bool) -> None:
    """Show the backlog, its age, what is parked, and which open writers hold the horizon."""
    settings = configuration.settings
    url = settings.database_url.get_secret_value()
    with closing(connect(url, application_name="outbox-relay status")) as connection:
        found = read_status(connection, schema=settings.schema_name)
    click.echo(json.dumps(asdict(found), indent=2) if as_json else _text(found))


def _text(found: Status) -> str:
    lines = [
        f"unpublished   {_count(found.unpublished)}",
        f"oldest        {found.oldest_age_seconds:.1f} s",
        f"parked        {_count(found.parked)} of {found.parked_keys:,} keys",
        f"open writers  {len(found.writers)}",
    ]
    return "\n".join([*lines, *(f"  {_writer(writer)}" for writer in found.writers)])


def _count(number: int) -> str:
    return f"{number:,} or more" if number >= MOST_COUNTED else f"{number:,}"


def _writer(writer: OpenTransaction) -> str:
    """One open transaction with what ends it, for an operator to paste."""
    if writer.gid:
        return (
            f"prepared {writer.gid!r} of {writer.role_name}, {writer.age_seconds:.1f} s: "
            f"COMMIT PREPARED '{writer.gid}' or ROLLBACK PREPARED '{writer.gid}'"
        )
    who = writer.application_name or writer.role_name
    return (
        f"pid {writer.pid} ({who}), {writer.state}, {writer.age_seconds:.1f} s: "
        f"SELECT pg_terminate_backend({writer.pid}); last query: {writer.query}"
    )
