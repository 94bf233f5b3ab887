"""Messages as the rows that are inserted: encoded, measured, with the headers of the active trace."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple

from outbox_relay.errors import InvalidMessage, NoTransaction
from outbox_relay.writer.message import TOMBSTONE
from outbox_relay.writer.tracing import trace_headers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from uuid import UUID

    from outbox_relay.writer.message import Message

MAX_MESSAGE_BYTES = 1_000_000  # as message.max.bytes of the relay's producer, by default
_OVERHEAD_BYTES = 500  # what the relay's own headers and Kafka's framing take beyond what is counted below

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # not the six characters of an escaped backslash and u0000


class Row(NamedTuple):
    """One row, by the names of its columns; text is what PostgreSQL casts to the column's type."""

    message_id: UUID
    aggregate_type: str
    aggregate_id: str
    event_type: str
    payload: str | None
    payload_bytes: bytes | None
    headers: str
    created_at: str | None


def encode(messages: Iterable[Message], *, max_message_bytes: int) -> list[Row]:
    """
    Give the rows of *messages*, in their order.

    Raises:
        InvalidMessage: A payload is not JSON, or a message is larger than *max_message_bytes*.
    """
    trace = trace_headers()
    return [_row(message, trace=trace, max_message_bytes=max_message_bytes) for message in messages]


def columns(rows: Sequence[Row]) -> dict[str, list[object]]:
    """Give *rows* as the parameters of `insert_messages.sql`: an array for each column."""
    arrays: dict[str, list[object]] = {
        name: list(values) for name, values in zip(Row._fields, zip(*rows, strict=True), strict=True)
    }
    arrays["message_id"] = [str(row.message_id) for row in rows]
    return arrays


class Pending:
    """
    Messages that are inserted together when their block ends, just before its COMMIT.

    A savepoint that is rolled back inside the block takes back the statements since it began, but no pending message:
    write those of a part that may fail in a block of its own, around that part.
    """

    def __init__(self, *, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._rows: list[Row] = []
        self._has_ended = False

    def write(self, message: Message) -> UUID:
        """
        Keep *message*, as it is now, for the end of the block and give its id.

        Raises:
            InvalidMessage: It could never be published.
            NoTransaction: The block has ended, so nobody would insert it.
        """
        if self._has_ended:
            raise NoTransaction(f"the block of message {message.message_id} has ended: write inside of it")
        self._rows += encode([message], max_message_bytes=self._max_message_bytes)
        return message.message_id

    def end(self) -> list[Row]:
        """Take no more, and give what is to be inserted."""
        self._has_ended = True
        return self._rows


def _row(message: Message, *, trace: Mapping[str, str], max_message_bytes: int) -> Row:
    headers = dict(message.headers)
    if trace.keys().isdisjoint(headers):  # half of another trace would be worse than none
        headers |= trace
    row = Row(
        message.message_id,
        message.aggregate_type,
        message.aggregate_id,
        message.event_type,
        None if message.payload is TOMBSTONE else _json(message.payload),
        message.payload_bytes,
        json.dumps(headers, ensure_ascii=False) if headers else "{}",
        message.created_at.isoformat() if message.created_at else None,
    )
    _check_size(row, max_message_bytes=max_message_bytes)
    return row


def _json(payload: object) -> str:
    try:
        text = json.dumps(payload, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMessage(
            f"payload is no JSON ({error}): convert what JSON lacks, or encode it yourself and give payload_bytes"
        ) from error
    if _NUL.search(text):
        raise InvalidMessage("payload contains a NUL character, which jsonb cannot store: leave it out")
    return text


def _check_size(row: Row, *, max_message_bytes: int) -> None:
    texts = (row.aggregate_type, row.aggregate_id, row.event_type, row.payload or "", row.headers)
    size = _OVERHEAD_BYTES + sum(len(text.encode()) for text in texts) + len(row.payload_bytes or b"")
    if size > max_message_bytes:
        raise InvalidMessage(
            f"message {row.message_id} of {row.aggregate_type} {row.aggregate_id} takes {size:,} bytes, "
            f"max_message_bytes is {max_message_bytes:,}: send a reference instead of the payload, or raise it "
            "together with message.max.bytes of the relay and max.message.bytes of the topic"
        )
