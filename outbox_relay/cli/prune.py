"""`outbox-relay prune`: remove published messages by age, for cron."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from outbox_relay.cli.options import confirm, settings_options
from outbox_relay.config.durations import MOST_SECONDS, duration_seconds
from outbox_relay.database import connect
from outbox_relay.operate import prune as pruning
from outbox_relay.relay.prune import PruneOptions

if TYPE_CHECKING:
    from outbox_relay.config import Configuration, Settings


class _Age(click.ParamType[float]):
    """A duration above zero, in seconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = duration_seconds(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not 0 < seconds <= MOST_SECONDS:
            self.fail(f"{value} is not between 0 and 100 years", param, ctx)
        return seconds


@click.command()
@click.option("--older-than", type=_Age(), metavar="7d", help="Age since publishing; by default the retention.")
@click.option("--dry-run", is_flag=True, help="Count what would be removed, remove nothing.")
@click.option("--yes", "is_agreed", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options("schema")
def prune(
    configuration: Configuration, *, older_than: float | None, dry_run: bool, is_agreed: bool, as_json: bool
) -> None:
    """
    Remove messages that were published longer ago than the retention.

    What is unpublished, waiting or parked stays, however old, and so does what no mark has counted: that is published.
    For roles in outbox_pruner; it may run beside relays and itself.
    """
    settings = configuration.settings
    older_than_seconds = older_than or settings.retention
    if not older_than_seconds:
        raise click.UsageError("the retention is 0, which keeps messages for ever: give --older-than, such as 30d")
    if not (dry_run or is_agreed):
        confirm(
            f"Remove the messages that were published more than {older_than_seconds:,.0f} s ago?",
            otherwise="nobody can be asked here: add --yes to remove messages, or --dry-run to count them",
        )
    options = prune_options(settings, older_than_seconds=older_than_seconds)
    url = settings.database_url.get_secret_value()
    with closing(connect(url, application_name="outbox-relay prune")) as connection:
        if dry_run:
            counted = pruning.count_prunable(connection, options=options, on_batch=_tell_progress)
            found = {"prunable_messages": counted}
            text = f"{counted:,} messages would be removed"
        else:
            pruned = pruning.prune(connection, options=options, on_batch=_tell_progress)
            found = {
                "pruned_messages": pruned.messages,
                "pruned_unordered": pruned.unordered,
                "skipped_messages": pruned.skipped,
            }
            text = f"{pruned.messages:,} messages removed"
    _end_progress()
    if found.get("skipped_messages"):
        click.echo(
            f"skipped messages that stay, for a relay publishes them now: {found['skipped_messages']:,}", err=True
        )
    click.echo(json.dumps(found, indent=2) if as_json else text)


def prune_options(settings: Settings, *, older_than_seconds: float) -> PruneOptions:
    """Return what the settings say about pruning, for the relay and for this command."""
    return PruneOptions(
        schema=settings.schema_name,
        older_than_seconds=older_than_seconds,
        lock_timeout=settings.lock_timeout,
        statement_timeout=settings.statement_timeout,
        transaction_timeout=settings.transaction_timeout,
    )


def _tell_progress(messages: int) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{messages:,} messages", err=True, nl=False)


def _end_progress() -> None:
    if sys.stderr.isatty():
        click.echo(err=True)
