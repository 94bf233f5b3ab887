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
_HEADINGS = ("sequence_no", "since", "key", "behind", "reason")
_NUMBER = click.IntRange(min=1, max=2**63 - 1)

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_numbers_argument = click.argument("numbers", nargs=-1, type=_NUMBER, metavar="[SEQUENCE_NO]...")
_number_argument = click.argument("number", type=_NUMBER, metavar="SEQUENCE_NO")


def _selection_options(command: Callable[..., None]) -> Callable[..., None]:
    key = click.option("--key", "keys", nargs=2, multiple=True, metavar="TYPE ID", help="Of this key; may be repeated.")
    aggregate_type = click.option("--type", "aggregate_type", metavar="TYPE", help="Of this aggregate type.")
    reason = click.option(
        "--reason", metavar="TEXT", help="Parked for a reason with TEXT in it, or its code; % and _ are wildcards."
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
    """Decide about messages that Kafka did not take, and the later ones of their keys."""


@parked.command("list")
@_selection_options
@click.option("--behind", "with_behind", is_flag=True, help="Also those that stand behind an earlier one.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Most messages to print.")
@_json_option
@settings_options("schema")
def list_(
    configuration: Configuration,
    *,
    keys: Sequence[tuple[str, str]],
    aggregate_type: str | None,
    reason: str | None,
    with_behind: bool,
    limit: int,
    as_json: bool,
) -> None:
    """Print the messages that were refused, oldest first, and how many stand behind each."""
    selection = Selection(keys=keys, aggregate_type=aggregate_type, reason=reason)
    with _messages(configuration.settings) as messages:
        found = messages.find(selection, limit=limit + 1, with_behind=with_behind)
    shown, has_more = found[:limit], len(found) > limit
    if as_json:
        click.echo(json.dumps({"messages": [_line(each) for each in shown], "has_more": has_more}, indent=2))
        return
    if not shown:
        click.echo("no parked message fits", err=True)
        return
    click.echo(_table([_HEADINGS, *map(_cells, shown)]))
    if has_more:
        click.echo(f"there are more than {limit}: narrow the list, or raise --limit", err=True)


@parked.command()
@_number_argument
@_json_option
@settings_options("schema")
def show(configuration: Configuration, *, number: int, as_json: bool) -> None:
    """Print everything of one parked message; payload_bytes in base64."""
    with _messages(configuration.settings) as messages:
        fields = messages.show(number)
    if as_json:
        click.echo("{\n" + ",\n".join(f'  "{name}": {value}' for name, value in fields.items()) + "\n}")
    else:
        click.echo("\n".join(f"{name:<16}{printable(value)}" for name, value in fields.items() if value != "null"))
    if fields["message_id"] == "null":
        click.echo(f"message {number} was deleted from the outbox: this is what is left of it", err=True)


@parked.command()
@_number_argument
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
    number: int,
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

    Its message_id, key and number stay as they are. The audit table keeps what it was.
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
            number,
            change=change,
            max_message_bytes=int(settings.producer_config().get("message.max.bytes", MAX_MESSAGE_BYTES)),
            note=Note(operator, why),
        )
    click.echo(json.dumps({"edited": number}) if as_json else f"edited {number}")


@parked.command()
@_numbers_argument
@_selection_options
@click.option("--all", "everything", is_flag=True, help="All keys that have parked messages.")
@click.option("--dry-run", is_flag=True, help="Print what would be released.")
@_note_options(needs_why=False)
@_json_option
@settings_options("schema", "on_poison")
def release(
    configuration: Configuration,
    *,
    numbers: Sequence[int],
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

    A message named by its number takes its key along. It has to be the first parked one of its key, or the earlier ones
    have to be named too.
    """
    is_selected = bool(keys or aggregate_type is not None or reason is not None)
    if bool(numbers) + is_selected + everything != 1:
        raise click.UsageError("say what to release: SEQUENCE_NOs, or some of --key, --type and --reason, or --all")
    settings = configuration.settings
    selection = Selection(keys=keys, aggregate_type=aggregate_type, reason=reason)
    with _messages(settings) as messages:
        found = messages.keys_of(numbers) if numbers else messages.keys(selection)
        released = (
            found
            if dry_run
            else messages.release(found, note=Note(operator, why), are_overtaken=settings.on_poison == "skip")
        )
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, "released": _counts(released)}, indent=2))
    else:
        click.echo(
            "\n".join([*map(_key, released), *_released(released, verb="would release" if dry_run else "released")])
        )


@parked.command()
@_numbers_argument
@click.option("--release-rest", is_flag=True, help="Release the other parked messages of the same keys.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_note_options(needs_why=True)
@_json_option
@settings_options("schema", "on_poison")
def skip(
    configuration: Configuration,
    *,
    numbers: Sequence[int],
    release_rest: bool,
    yes: bool,
    operator: str | None,
    why: str,
    as_json: bool,
) -> None:
    """Move parked messages to the audit table, outbox_audit, so that they are never published."""
    if not numbers:
        raise click.UsageError("say which messages: SEQUENCE_NOs of outbox-relay parked list")
    if not yes:
        question = f"Never publish {_number(len(set(numbers)), 'message')}?"
        confirm(question, otherwise="this cannot be undone: confirm it with --yes")
    settings = configuration.settings
    with _messages(settings) as messages:
        skipped = messages.skip(
            numbers,
            note=Note(operator, why),
            release_rest=release_rest,
            are_overtaken=settings.on_poison == "skip",
        )
    if as_json:
        outcome = {
            "skipped": skipped.numbers,
            "deleted_before": skipped.deleted,
            "released": _counts(skipped.released),
            "left": _counts(skipped.left),
        }
        click.echo(json.dumps(outcome, indent=2))
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
            statement_timeout=settings.statement_timeout,
        )


def _content(given: str | None) -> bytes | None:
    """Return the bytes of an argument, or of the file that it names."""
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
    return asdict(message) | {"since": message.since.isoformat()}


def _cells(message: ParkedMessage) -> tuple[str, ...]:
    return (
        str(message.sequence_no),
        message.since.isoformat(timespec="seconds"),
        _key_name(message),
        f"{message.behind:,}{'+' if message.behind == MOST_COUNTED else ''}",
        printable(f"{message.reason_code}: {message.reason}"),
    )


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _key(key: ParkedKey) -> str:
    return f"{_key_name(key)}  {key.messages:,}"


def _key_name(of: ParkedMessage | ParkedKey) -> str:
    aggregate_type = printable(of.aggregate_type, most=_MOST_SHOWN)
    if of.aggregate_id is None:
        return f"{aggregate_type} (deleted)"
    return f"{aggregate_type} {printable(of.aggregate_id, most=_MOST_SHOWN)}"


def _released(keys: Sequence[ParkedKey], *, verb: str) -> list[str]:
    """Say how many messages are released, and of how many nothing is left to release."""
    deleted = sum(key.messages for key in keys if key.aggregate_id is None)
    lines = [f"{verb} {_sum([key for key in keys if key.aggregate_id is not None])}"]
    if deleted:
        lines.append(f"{_number(deleted, 'message')} more had been deleted from the outbox")
    return lines


def _sum(keys: Sequence[ParkedKey]) -> str:
    return f"{_number(sum(key.messages for key in keys), 'message')} of {_number(len(keys), 'key')}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _counts(keys: Sequence[ParkedKey]) -> list[dict[str, object]]:
    return [
        {
            "shard": key.shard,
            "aggregate_type": key.aggregate_type,
            "aggregate_id": key.aggregate_id,
            "messages": key.messages,
        }
        for key in keys
    ]


def _outcome(skipped: Skipped) -> str:
    lines = [f"skipped {_number(len(skipped.numbers), 'message')}"]
    if skipped.deleted:
        lines.append(f"deleted from the outbox before: {', '.join(map(str, skipped.deleted))}")
    if skipped.released:
        lines += _released(skipped.released, verb="released")
    if skipped.left:
        lines += [*map(_key, skipped.left), f"still parked: {_sum(skipped.left)}; see outbox-relay parked release"]
    return "\n".join(lines)
