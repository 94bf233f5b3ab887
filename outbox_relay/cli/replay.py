"""`outbox-relay replay`: publish messages again that are published already and still kept."""

from __future__ import annotations

import json
import secrets
import sys
from contextlib import closing, contextmanager
from dataclasses import replace as with_changes
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from outbox_relay.cli.exits import ExitCode
from outbox_relay.cli.options import confirm, settings_options
from outbox_relay.cli.run import addressing_of, librdkafka_logger, source_of
from outbox_relay.cli.signals import StopSignals
from outbox_relay.config import check_producer_config
from outbox_relay.database import connect
from outbox_relay.errors import OutboxRelayError
from outbox_relay.observe import logs
from outbox_relay.operate.parked import Note
from outbox_relay.operate.replay import (
    LARGEST_NUMBER,
    Plan,
    Progress,
    ReplayOptions,
    Selection,
    is_name,
    plan_replay,
    publish_again,
)
from outbox_relay.relay.publish import Publisher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from outbox_relay.config import Configuration, Settings
    from outbox_relay.relay.message import Addressing, Message

_NUMBER = click.IntRange(1, LARGEST_NUMBER)
_LATEST_MS = 253_402_300_799_999  # the end of the year 9999, the last one that a datetime can hold


class _Time(click.ParamType[datetime]):
    """A time in the form of ISO 8601, in UTC unless it says otherwise."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            given = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is no time: write 2026-11-21T14:00 or 2026-11-21T14:00+01:00", param, ctx)
        return (given if given.tzinfo else given.replace(tzinfo=UTC)).astimezone(UTC)


class _Name(click.ParamType[str]):
    """What a replay is called, which consumers and the audit table see."""

    name = "name"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = str(value)
        if not is_name(name):
            self.fail(f"{name!r} is no name: use 1 to 100 of a-z A-Z 0-9 . _ -", param, ctx)
        return name


@click.command()
@click.option("--key", "keys", nargs=2, multiple=True, metavar="TYPE ID", help="Of this key; may be repeated.")
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Of this aggregate type; may be repeated.")
@click.option("--topic", "topics", multiple=True, metavar="TOPIC", help="Published to this topic; may be repeated.")
@click.option("--from-sequence", type=_NUMBER, metavar="N", help="With this sequence number or a higher one.")
@click.option("--through-sequence", type=_NUMBER, metavar="N", help="With this sequence number or a lower one.")
@click.option("--since", type=_Time(), metavar="TIME", help="Created at this time or later, such as 2026-11-21T14:00Z.")
@click.option("--until", type=_Time(), metavar="TIME", help="Created before this time.")
@click.option("--all", "everything", is_flag=True, help="All that is published and kept.")
@click.option("--to-topic", metavar="TOPIC", help="Send all of them to this topic instead of their own.")
@click.option(
    "--name", type=_Name(), help="Name of the replay; that of an interrupted one to go on. Default: a new one."
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0.1),
    default=1000.0,
    show_default=True,
    metavar="N",
    help="Most messages a second.",
)
@click.option("--why", required=True, metavar="TEXT", help="Why, for the audit record.")
@click.option("--operator", metavar="NAME", help="Who, beside the database role, for the record.")
@click.option("--dry-run", is_flag=True, help="Print what would be published, publish nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options("schema")
@click.pass_context
def replay(
    ctx: click.Context,
    configuration: Configuration,
    *,
    keys: tuple[tuple[str, str], ...],
    types: tuple[str, ...],
    topics: tuple[str, ...],
    from_sequence: int | None,
    through_sequence: int | None,
    since: datetime | None,
    until: datetime | None,
    everything: bool,
    to_topic: str | None,
    name: str | None,
    rate: float,
    why: str,
    operator: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """
    Publish messages again that are published already and still kept, with the header `replay`.

    All that is given has to apply. Messages that are unpublished, wait or are parked are left to the relay. Nothing is
    locked or changed, so relays go on meanwhile. The messages of each key come in their order, behind newer ones that
    were published before. For roles in outbox_operator.
    """
    selection = Selection(
        keys=tuple(sorted(set(keys))),
        aggregate_types=tuple(sorted(set(types))),
        topics=tuple(sorted(set(topics))),
        first_no=from_sequence or 1,
        last_no=through_sequence or LARGEST_NUMBER,
        since=since,
        until=until,
        to_topic=to_topic,
    )
    if everything != (with_changes(selection, to_topic=None) == Selection()):
        raise click.UsageError("say what to publish again: --all, or some of the options that select messages")
    settings = configuration.settings
    logs.configure(log_format=settings.log_format, level=settings.log_level, secrets=settings.secrets())
    check_producer_config(settings.producer_config())
    options = _options(settings, rate=rate)
    url = settings.database_url.get_secret_value()
    with closing(connect(url, application_name="outbox-relay replay")) as connection:
        plan = plan_replay(
            connection,
            options=options,
            name=name or _new_name(),
            selection=selection,
            addressing=_addressing(settings, connection),
        )
        if dry_run or not plan.messages:
            _show_plan(plan, as_json=as_json)
            return
        if not yes:
            confirm(
                f"Publish {plan.messages:,} messages again, to {', '.join(plan.topics)}?",
                otherwise="consumers will get messages again: add --yes, or --dry-run to see how many",
            )
        progress = _publish(connection, plan, settings=settings, options=options, note=Note(operator, why))
    click.echo(json.dumps(_done(plan, progress), indent=2) if as_json else _done_text(plan, progress))
    if not progress.is_finished:
        _tell_how_to_go_on(plan)
        ctx.exit(ExitCode.INTERRUPTED)


def _publish(connection: Connection, plan: Plan, *, settings: Settings, options: ReplayOptions, note: Note) -> Progress:
    """Replay until the end or a signal."""
    signals = StopSignals()
    publisher = Publisher(settings.producer_config, logger=librdkafka_logger())
    with closing(publisher), _shown(plan) as show:
        return publish_again(
            connection,
            plan=plan,
            options=options,
            addressing=_addressing(settings, connection),
            publisher=publisher,
            note=note,
            pause=lambda seconds: signals.within(seconds) is not None,
            on_progress=show,
        )


def _addressing(settings: Settings, connection: Connection) -> Addressing:
    return with_changes(addressing_of(settings), source=source_of(settings, connection))


def _options(settings: Settings, *, rate: float) -> ReplayOptions:
    return ReplayOptions(
        schema=settings.schema_name,
        rate=rate,
        publish_deadline=settings.publish_deadline,
        lock_timeout=settings.lock_timeout,
        statement_timeout=settings.statement_timeout,
        transaction_timeout=settings.transaction_timeout,
    )


def _new_name() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@contextmanager
def _shown(plan: Plan) -> Iterator[Callable[[Progress], None]]:
    """Return what shows progress on a terminal; an error is followed by how far it came, and how to go on."""
    latest = plan.progress or Progress()
    with click.progressbar(length=plan.messages, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def show(progress: Progress) -> None:
            nonlocal latest
            bar.update(progress.messages - latest.messages)
            latest = progress

        try:
            yield show
        except OutboxRelayError:
            click.echo(_done_text(plan, latest), err=True)
            _tell_how_to_go_on(plan)
            raise


def _tell_how_to_go_on(plan: Plan) -> None:
    click.echo(f"to go on: the same command with --name {plan.name}", err=True)


def _show_plan(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        planned = {
            "name": plan.name,
            "messages": plan.messages,
            "topics": plan.topics,
            "first": _place(plan.first),
            "last": _place(plan.last),
        }
        click.echo(json.dumps(planned, indent=2))
        return
    if plan.first is None or plan.last is None:
        click.echo("nothing is published and kept that fits", err=True)
        return
    for topic, messages in sorted(plan.topics.items()):
        click.echo(f"{messages:,} to {topic}")
    click.echo(f"first {plan.first.sequence_no} of {_created_at(plan.first).isoformat(timespec='seconds')}")
    click.echo(f"last {plan.last.sequence_no} of {_created_at(plan.last).isoformat(timespec='seconds')}")
    click.echo(f"would replay {plan.messages:,} messages")


def _place(message: Message | None) -> dict[str, object] | None:
    return message and {"sequence_no": message.sequence_no, "created_at": _created_at(message).isoformat()}


def _created_at(message: Message) -> datetime:
    return datetime.fromtimestamp(min(message.created_at_ms, _LATEST_MS) / 1000, UTC)


def _done(plan: Plan, progress: Progress) -> dict[str, object]:
    return {
        "name": plan.name,
        "replayed_messages": progress.messages,
        "reached_sequence_no": progress.reached_no,
        "is_finished": progress.is_finished,
    }


def _done_text(plan: Plan, progress: Progress) -> str:
    where = "" if progress.is_finished else f", stopped behind {progress.reached_no}"
    return f"replayed {progress.messages:,} messages as {plan.name}{where}"
