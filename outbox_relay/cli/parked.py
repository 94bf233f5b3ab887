"""`outbox-relay parked`: list, show, edit, release and skip messages that Kafka did not take."""

from __future__ import annotations

import json
import os
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outbox_relay.cli.options import confirm, settings_options
from outbox_relay.cli.terminal import printable
from outbox_relay.database import connect
from outbox_relay.operate.parked import (
    MOST_COUNTED,
    Change,
    Note,
    ParkedKey,
    ParkedMessage,
    ParkedMessages,
    Selection,
    Skipped,
)
from outbox_relay.writer.rows import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from outbox_relay.config import Configuration, Settings

_MOST_SHOWN = 60  # characters of a type or a key; `show` has all of them
_HEADINGS = ("id", "sequence_no", "parked_at", "key", "waiting", "reason")

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_ids_argument = click.argument("ids", nargs=-1, type=int, metavar="[ID]...")


def _selection_options(command: Callable[..., None]) -> Callable[..., None]:
    key = click.option("--key", "keys", nargs=2, multiple=True, metavar="TYPE ID", help="Of this key; may be repeated.")
    aggregate_type = click.option("--type", "aggregate_type", metavar="TYPE", help="Of this aggregate type.")
    reason = click.option(
        "--reason", metavar="TEXT", help="Parked for a reason with TEXT in it; % and _ are wildcards."
    )
    return key(aggregate_type(reason(command)))


def _note_options(*, needs_why: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        why = click.option("--why", required=needs_why, metavar="TEXT", help="Why, for the audit record.")
        operator = click.option("--operator", metavar="NAME", help="Who, beside the database role, for the record.")
        return why(operator(command))

    return decorate


@click.group()
def parked() -> None:
    """Decide about messages that Kafka did not take, and those that wait behind them."""


@parked.command("list")
@_selection_options
@click.option("--waiting", "with_waiting", is_flag=True, help="Also those that wait behind an earlier one.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Most messages to print.")
@_json_option
@settings_options("schema")
def list_(
    configuration: Configuration,
    *,
    keys: Sequence[tuple[str, str]],
    aggregate_type: str | None,
    reason: str | None,
    with_waiting: bool,
    limit: int,
    as_json: bool,
) -> None:
    """Print the messages that were refused, oldest first, and how many wait behind each."""
    selection = Selection(keys=keys, aggregate_type=aggregate_type, reason=reason)
    with _messages(configuration.settings) as messages:
        found = messages.find(selection, limit=limit + 1, with_waiting=with_waiting)
    shown, has_more = found[:limit], len(found) > limit
    if as_json:
        click.echo(json.dumps({"messages": [_line(each) for each in shown], "has_more": has_more}, indent=2))
        return
    if not shown:
        click.echo("nothing is parked that fits", err=True)
        return
    click.echo(_table([_HEADINGS, *map(_cells, shown)]))
    if has_more:
        click.echo(f"there are more than {limit}: narrow the list, or raise --limit", err=True)


@parked.command()
@click.argument("message", type=int, metavar="ID")
@_json_option
@settings_options("schema")
def show(configuration: Configuration, *, message: int, as_json: bool) -> None:
    """Print everything of one parked message; payload_bytes in base64."""
    with _messages(configuration.settings) as messages:
        fields = messages.show(message)
    if as_json:
        click.echo("{\n" + ",\n".join(f'  "{name}": {value}' for name, value in fields.items()) + "\n}")
    else:
        click.echo("\n".join(f"{name:<16}{printable(value)}" for name, value in fields.items() if value != "null"))


@parked.command()
@click.argument("message", type=int, metavar="ID")
@click.option("--payload", metavar="JSON|@FILE", help="The new payload, or the file that has it.")
@click.option(
    "--payload-bytes",
    metavar="@FILE",
    help="The file that has the new payload, which is published as it is.",
)
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="Set a header; may be repeated.")
@click.option("--remove-header", "removed", multiple=True, metavar="NAME", help="Remove a header; may be repeated.")
@_note_options(needs_why=False)
@_json_option
@settings_options("schema")
def edit(
    configuration: Configuration,
    *,
    message: int,
    payload: str | None,
    payload_bytes: str | None,
    headers: Sequence[str],
    removed: Sequence[str],
    operator: str | None,
    why: str | None,
    as_json: bool,
) -> None:
    """
    Replace the payload or headers of a parked message, if the outcome can be published; it stays parked.

    Its id, key and number stay as they are. The audit table keeps what it was.
    """
    if payload is not None and payload_bytes is not None:
        raise click.UsageError("a message has one payload: give --payload or --payload-bytes")
    if payload is None and payload_bytes is None and not headers and not removed:
        raise click.UsageError("nothing to change: give --payload, --payload-bytes, --header or --remove-header")
    if payload_bytes is not None and not payload_bytes.startswith("@"):
        raise click.UsageError("--payload-bytes takes @FILE")
    change = Change(
        payload=_content(payload),
        payload_bytes=_content(payload_bytes),
        headers=_headers(headers),
        removed_headers=removed,
    )
    settings = configuration.settings
    with _messages(settings) as messages:
        messages.edit(
            message,
            change=change,
            max_message_bytes=int(settings.producer_config().get("message.max.bytes", MAX_MESSAGE_BYTES)),
            note=Note(operator, why),
        )
    click.echo(json.dumps({"edited": message}) if as_json else f"edited {message}")


@parked.command()
@_ids_argument
@_selection_options
@click.option("--all", "everything", is_flag=True, help="All keys that have parked messages.")
@click.option("--dry-run", is_flag=True, help="Print what would be released.")
@_note_options(needs_why=False)
@_json_option
@settings_options("schema", "on_poison")
def release(
    configuration: Configuration,
    *,
    ids: Sequence[int],
    keys: Sequence[tuple[str, str]],
    aggregate_type: str | None,
    reason: str | None,
    everything: bool,
    dry_run: bool,
    operator: str | None,
    why: str | None,
    as_json: bool,
) -> None:
    """
    Publish parked messages after all, whole keys in their order.

    A message named by its id takes its key along; it must be the first that is parked of its key, or the earlier ones
    must be named too.
    """
    is_selected = bool(keys or aggregate_type is not None or reason is not None)
    if bool(ids) + is_selected + everything != 1:
        raise click.UsageError("say what to release: IDs, or some of --key, --type and --reason, or --all")
    settings = configuration.settings
    selection = Selection(keys=keys, aggregate_type=aggregate_type, reason=reason)
    with _messages(settings) as messages:
        found = messages.keys_of(ids) if ids else messages.keys(selection)
        released = (
            found
            if dry_run
            else messages.release(found, note=Note(operator, why), are_overtaken=settings.on_poison == "skip")
        )
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, "released": _counts(released)}, indent=2))
    else:
        click.echo("\n".join([*map(_key, released), f"{'would release' if dry_run else 'released'} {_sum(released)}"]))


@parked.command()
@_ids_argument
@click.option("--release-rest", is_flag=True, help="Release the other parked messages of the same keys.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_note_options(needs_why=True)
@_json_option
@settings_options("schema", "on_poison")
def skip(
    configuration: Configuration,
    *,
    ids: Sequence[int],
    release_rest: bool,
    yes: bool,
    operator: str | None,
    why: str,
    as_json: bool,
) -> None:
    """Move parked messages to the audit table, outbox_audit, so that they are never published."""
    if not ids:
        raise click.UsageError("say which messages: IDs of outbox-relay parked list")
    if not yes:
        question = f"Never publish {_number(len(ids), 'message')}?"
        confirm(question, otherwise="this cannot be undone: confirm it with --yes")
    settings = configuration.settings
    with _messages(settings) as messages:
        skipped = messages.skip(
            ids,
            note=Note(operator, why),
            release_rest=release_rest,
            are_overtaken=settings.on_poison == "skip",
        )
    if as_json:
        left, released = _counts(skipped.left), _counts(skipped.released)
        click.echo(json.dumps({"skipped": skipped.ids, "released": released, "left": left}, indent=2))
    else:
        click.echo(_outcome(skipped))


@contextmanager
def _messages(settings: Settings) -> Iterator[ParkedMessages]:
    url = settings.database_url.get_secret_value()
    with closing(connect(url, application_name="outbox-relay parked")) as connection:
        yield ParkedMessages(
            connection,
            schema=settings.schema_name,
            lock_timeout=settings.transaction_timeout,  # PostgreSQL lets no idle relay hold a shard for longer
        )


def _content(given: str | None) -> bytes | None:
    """Give the bytes of an argument, or of the file that it names."""
    if given is None or not given.startswith("@"):
        return None if given is None else os.fsencode(given)
    try:
        return Path(given[1:]).read_bytes()
    except OSError as error:
        raise click.UsageError(f"{given[1:]} cannot be read: {error.strerror}") from error


def _headers(given: Sequence[str]) -> dict[str, str]:
    pairs = [header.partition("=") for header in given]
    for name, separator, _ in pairs:
        if not separator:
            raise click.UsageError(f"--header {name}: write NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _line(message: ParkedMessage) -> dict[str, object]:
    return asdict(message) | {"parked_at": message.parked_at.isoformat()}


def _cells(message: ParkedMessage) -> tuple[str, ...]:
    return (
        str(message.id),
        str(message.sequence_no),
        message.parked_at.isoformat(timespec="seconds"),
        _key_name(message),
        f"{message.waiting:,}{'+' if message.waiting == MOST_COUNTED else ''}",
        printable(message.reason),
    )


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _key(key: ParkedKey) -> str:
    return f"{_key_name(key)}  {key.messages:,}"


def _key_name(of: ParkedMessage | ParkedKey) -> str:
    return f"{printable(of.aggregate_type, most=_MOST_SHOWN)} {printable(of.aggregate_id, most=_MOST_SHOWN)}"


def _sum(keys: Sequence[ParkedKey]) -> str:
    return f"{_number(sum(key.messages for key in keys), 'message')} of {_number(len(keys), 'key')}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _counts(keys: Sequence[ParkedKey]) -> list[dict[str, object]]:
    return [asdict(key) for key in keys]


def _outcome(skipped: Skipped) -> str:
    lines = [f"skipped {_number(len(skipped.ids), 'message')}"]
    if skipped.released:
        lines.append(f"released {_sum(skipped.released)}")
    if skipped.left:
        lines += [*map(_key, skipped.left), f"still parked: {_sum(skipped.left)}; see outbox-relay parked release"]
    return "\n".join(lines)
