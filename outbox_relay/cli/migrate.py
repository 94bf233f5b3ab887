"""`outbox-relay migrate`: apply the migrations, say where they stand, or print them for another tool."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from outbox_relay.cli.exits import ExitCode
from outbox_relay.cli.options import settings_options
from outbox_relay.database import connect
from outbox_relay.operate import migrate as migrations

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from outbox_relay.config import Configuration, Settings


def _line_option(command: Callable[..., None]) -> Callable[..., None]:
    """Say which migrations are meant: the outbox's, unless told otherwise."""
    for flag, summary in (
        ("partitioned", "The partitioned layout, on top of the outbox."),
        ("inbox", "The tables of a consumer, in place of the outbox."),
    ):
        command = click.option(f"--{flag}", "line", flag_value=flag, default="outbox", help=summary)(command)
    return command


@click.group()
def migrate() -> None:
    """Bring the tables to the state that this version needs."""


@migrate.command()
@_line_option
@click.option(
    "--lock-timeout",
    "lock_timeout_seconds",
    type=click.FloatRange(min=0.001),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest that writers queue behind a migration before it steps back; it tries ten times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options("schema")
def apply(configuration: Configuration, *, line: str, lock_timeout_seconds: float, as_json: bool) -> None:
    """Apply what is pending, as the role that owns the tables, and print it."""
    settings = configuration.settings
    with _connect(settings) as conn:
        applied = migrations.apply(
            conn, schema=settings.schema_name, line=line, lock_timeout_seconds=lock_timeout_seconds
        )
    if as_json:
        click.echo(
            json.dumps([{"number": migration.number, "name": migration.name} for migration in applied], indent=2)
        )
    else:
        click.echo("\n".join(f"{migration} applied" for migration in applied) or "nothing is pending")


@migrate.command()
@_line_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options("schema")
@click.pass_context
def status(ctx: click.Context, configuration: Configuration, *, line: str, as_json: bool) -> None:
    """Print each migration as applied, pending or unknown to this version; exit with 5 when one is pending."""
    settings = configuration.settings
    with _connect(settings) as conn:
        states = migrations.status(conn, schema=settings.schema_name, line=line)
    if as_json:
        click.echo(json.dumps([_json(state) for state in states], indent=2))
    else:
        click.echo("\n".join(f"{state}  {state.state}" for state in states))
    if any(state.state == "pending" for state in states):
        ctx.exit(ExitCode.CHECK_FAILED)


@migrate.command()
@_line_option
@click.option("--after", type=click.IntRange(min=0), default=0, metavar="N", help="Only migrations numbered above N.")
@settings_options("schema")
def sql(configuration: Configuration, *, line: str, after: int) -> None:
    """Print a script that does and records the same, for review, psql or another tool."""
    click.echo(migrations.sql(schema=configuration.settings.schema_name, line=line, after=after), nl=False)


def _connect(settings: Settings) -> Connection:
    return connect(settings.database_url.get_secret_value(), application_name="outbox-relay migrate")


def _json(state: migrations.MigrationState) -> dict[str, object]:
    applied_at = state.applied_at.isoformat() if state.applied_at else None
    return {"number": state.number, "name": state.name, "state": state.state, "applied_at": applied_at}
