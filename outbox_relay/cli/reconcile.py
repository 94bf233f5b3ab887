"""`outbox-relay reconcile`: compare the marks with the messages, and let relays publish what was skipped."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from outbox_relay.cli.exits import ExitCode
from outbox_relay.cli.options import settings_options
from outbox_relay.database import connect
from outbox_relay.operate import reconcile as reconciling
from outbox_relay.relay.reconcile import ReconcileOptions

if TYPE_CHECKING:
    from outbox_relay.config import Configuration, Settings
    from outbox_relay.operate.reconcile import Reconciled
    from outbox_relay.relay.reconcile import Interval


@click.command()
@click.option("--repair", "repairs", is_flag=True, help="Let relays publish what was skipped.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options("schema")
def reconcile(configuration: Configuration, *, repairs: bool, as_json: bool) -> None:
    """
    Look for messages that were skipped: no mark has counted them, and no relay would publish them.

    Exits with 5 if there are any. With --repair they are published, with the header `unordered`; where nobody can tell
    which they are, all messages of some seconds are published again. Looking is for roles in outbox_operator, repairing
    for those in outbox_relay. It may run beside relays.
    """
    settings = configuration.settings
    options = reconcile_options(settings)
    url = settings.database_url.get_secret_value()
    with closing(connect(url, application_name="outbox-relay reconcile")) as connection:
        total = reconciling.count_marked(connection, options=options)
        with click.progressbar(length=total, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
            found = reconciling.reconcile(connection, options=options, repairs=repairs, on_batch=bar.update)
    click.echo(_as_json(found) if as_json else _as_text(found, repairs=repairs))
    if found.damaged and not repairs:
        raise SystemExit(ExitCode.CHECK_FAILED)


def reconcile_options(settings: Settings) -> ReconcileOptions:
    """Return what the settings say about reconciling, for the relay and for this command."""
    return ReconcileOptions(
        schema=settings.schema_name,
        lock_timeout=settings.lock_timeout,
        statement_timeout=settings.statement_timeout,
        transaction_timeout=settings.transaction_timeout,
    )


def _as_json(found: Reconciled) -> str:
    damaged = [
        {
            "shard": interval.shard,
            "from_no": interval.from_no,
            "through": interval.through,
            "marked_messages": interval.messages,
            "found_messages": interval.found_messages,
            "skipped_messages": interval.affected_messages,
            "is_whole": interval.damage == "all",
        }
        for interval in found.damaged.values()
    ]
    facts = {
        "compared_messages": found.messages,
        "damaged": damaged,
        "repaired_messages": sum(each.messages for each in found.repairs),
    }
    return json.dumps(facts, indent=2)


def _as_text(found: Reconciled, *, repairs: bool) -> str:
    lines = [_line(interval) for interval in found.damaged.values()]
    if not found.damaged:
        end = "none was skipped"
    elif repairs:
        end = f"{sum(each.messages for each in found.repairs):,} wait to be published now"
    else:
        end = "some were skipped: run this with --repair, and relays publish them"
    return "\n".join([*lines, f"{found.messages:,} messages compared, {end}"])


def _line(interval: Interval) -> str:
    where = f"shard {interval.shard}, numbers {interval.from_no + 1} to {interval.through}"
    if interval.damage == "some":
        return f"{where}: {interval.uncounted_messages:,} skipped"
    return f"{where}: {interval.found_messages:,} messages, of which the mark has counted {interval.messages:,}"
