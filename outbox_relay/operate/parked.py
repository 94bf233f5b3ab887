"""Parked messages: find, look at, mend, release and skip them while relays run, and record who did it and why."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from shlex import join
from typing import TYPE_CHECKING

from psycopg import ClientCursor, DataError
from psycopg.errors import CheckViolation, LockNotAvailable

from outbox_relay.database import translated_errors
from outbox_relay.errors import DatabaseConflict, InvalidMessage, OperationRefused
from outbox_relay.sql import statement
from outbox_relay.writer.message import Message
from outbox_relay.writer.rows import encode

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from datetime import datetime

    from psycopg import Connection
    from psycopg.rows import TupleRow

MOST_COUNTED = 10_000


@dataclass(frozen=True, slots=True)
class Selection:
    """
    Which parked messages; all that is given has to apply, and nothing given is all of them.

    Attributes:
        keys: Aggregate types and ids.
        reason: Part of the reason, in any case, with the wildcards of LIKE.
    """

    keys: Sequence[tuple[str, str]] = ()
    aggregate_type: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ParkedMessage:
    """
    One line of the list.

    Attributes:
        is_guilty: It was refused itself; the others wait behind an earlier message of their key.
        waiting: Later parked messages of its key, counted up to `MOST_COUNTED`.
    """

    id: int
    shard: int
    sequence_no: int
    message_id: str
    aggregate_type: str
    aggregate_id: str
    event_type: str
    parked_at: datetime
    reason: str
    is_guilty: bool
    waiting: int


@dataclass(frozen=True, slots=True)
class ParkedKey:
    """A key and how many of its messages are parked, or were until they were released."""

    shard: int
    aggregate_type: str
    aggregate_id: str
    messages: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """What a skip came to: the messages moved, and the keys whose other messages were released or are left parked."""

    ids: list[int] = field(default_factory=list)
    released: list[ParkedKey] = field(default_factory=list)
    left: list[ParkedKey] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Change:
    """
    What an edit replaces; a payload is JSON in UTF-8 or bytes, and None of both keeps the one there is.

    The id of the message, its key and its number stay, so that consumers see the same message.
    """

    payload: bytes | None = None
    payload_bytes: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    removed_headers: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """What the audit record says beside the name that the session logged in with."""

    operator: str | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class _Chosen:
    """One message named by its id; *earlier_id* is parked before it and not named."""

    id: int
    shard: int
    aggregate_type: str
    aggregate_id: str
    earlier_id: int | None


class ParkedMessages:
    """
    The parked messages of one outbox.

    Whatever changes them locks their shard as a relay does, one shard in each transaction, so that relays are held up
    in one shard at most. If a shard cannot be had, what was done in the shards before stays done.

    The methods raise `DatabaseUnavailable` if the connection broke, `SchemaMismatch` if a table or a privilege is
    missing, and those that change something `DatabaseConflict` if a relay does not let go of a shard in time.

    Args:
        connection: In autocommit mode.
        lock_timeout: Seconds to wait for a shard. A relay holds it while it publishes a batch.
    """

    def __init__(self, connection: Connection, *, schema: str, lock_timeout: float) -> None:
        self._connection = connection
        self._schema = schema
        self._lock_timeout = lock_timeout

    def find(
        self, selection: Selection, *, limit: int | None = None, with_waiting: bool = False
    ) -> list[ParkedMessage]:
        """Give the guilty messages and the first one of each key, oldest first, or also those that wait behind."""
        parameters = {
            "key_types": [aggregate_type for aggregate_type, _ in selection.keys] or None,
            "key_ids": [aggregate_id for _, aggregate_id in selection.keys] or None,
            "aggregate_type": selection.aggregate_type,
            "reason": selection.reason,
            "with_waiting": with_waiting,
            "most_counted": MOST_COUNTED,
            "limit": limit,
        }
        with translated_errors():
            return [ParkedMessage(*row) for row in self._rows("list", parameters)]

    def show(self, message: int) -> dict[str, str]:
        """
        Give every field of a message, as the text of a JSON value; payload_bytes is in base64.

        Raises:
            OperationRefused: The message is not parked.
        """
        with translated_errors():
            fields: dict[str, str] = dict(self._rows("show", {"id": message}))
        if not fields:
            raise _not_parked([message])
        return fields

    def edit(self, message: int, *, change: Change, max_message_bytes: int, note: Note) -> None:
        """
        Change what a message carries, if a writer could have written the outcome; it stays parked.

        Raises:
            OperationRefused: The message is not parked.
            InvalidMessage: It could still not be published, as far as a writer can tell. Nothing is changed.
        """
        [chosen] = self._choose([message])
        parameters = {
            "id": message,
            "replaces_payload": change.payload is not None or change.payload_bytes is not None,
            "payload": change.payload,
            "payload_bytes": change.payload_bytes,
            "headers": json.dumps(dict(change.headers)),
            "removed_headers": list(change.removed_headers),
            **_recorded(note),
        }
        with self._locked(chosen.shard):
            try:
                edited = self._rows("edit", parameters)
            except (DataError, CheckViolation) as error:  # PostgreSQL knows best what jsonb is, and how large
                raise InvalidMessage(f"message {message} cannot be stored: {error.diag.message_primary}") from error
            if not edited:
                raise _not_parked([message])
            _check(edited[0], max_message_bytes=max_message_bytes)

    def keys(self, selection: Selection) -> list[ParkedKey]:
        """Give the keys of what `find` finds, with the number of all their parked messages."""
        return self._count((each.shard, each.aggregate_type, each.aggregate_id) for each in self.find(selection))

    def keys_of(self, messages: Collection[int]) -> list[ParkedKey]:
        """
        Give the keys of messages named by their ids.

        Raises:
            OperationRefused: One is not parked, or waits behind one that is not named, so that the caller may not
                mean it.
        """
        chosen = self._choose(messages)
        for each in chosen:
            if each.earlier_id is not None:
                whole_key = join(["--key", each.aggregate_type, each.aggregate_id])
                raise OperationRefused(
                    f"message {each.id} waits behind parked message {each.earlier_id} of its key: "
                    f"name that one as well, or the whole key with {whole_key}"
                )
        return self._count(_keys(chosen))

    def release(self, keys: Sequence[ParkedKey], *, note: Note, are_overtaken: bool) -> list[ParkedKey]:
        """
        Make all parked messages of *keys* unpublished again, in their order, and give what there was.

        Relays find them within their sweep interval.

        Args:
            are_overtaken: Later messages of the keys have been published, as under on_poison = skip; these will carry
                the header `unordered` then.
        """
        released = []
        for shard, group in groupby(sorted(keys, key=attrgetter("shard")), key=attrgetter("shard")):
            names = [(key.aggregate_type, key.aggregate_id) for key in group]
            with self._locked(shard):
                released += self._release(shard, names, note=note, are_overtaken=are_overtaken)
        return released

    def skip(self, messages: Collection[int], *, note: Note, release_rest: bool, are_overtaken: bool) -> Skipped:
        """
        Move messages to the audit table, so that they are never published, and release the rest of their keys if asked.

        Raises:
            OperationRefused: One of them is not parked.
        """
        skipped = Skipped()
        chosen = self._choose(messages)
        for shard, group in groupby(chosen, key=attrgetter("shard")):
            members = list(group)
            names = list({(each.aggregate_type, each.aggregate_id) for each in members})
            with self._locked(shard):
                skipped.ids.extend(self._skip(shard, [each.id for each in members], note=note))
                if release_rest:
                    skipped.released.extend(self._release(shard, names, note=note, are_overtaken=are_overtaken))
        skipped.left.extend(self._count(_keys(chosen)))
        return skipped

    def _choose(self, messages: Collection[int]) -> list[_Chosen]:
        """Find messages by their ids, in the order of their shards."""
        with translated_errors():
            rows = self._rows("chosen", {"ids": sorted(set(messages))})
        missing = [row[0] for row in rows if row[1] is None]
        if missing:
            raise _not_parked(missing)
        return [_Chosen(*row) for row in rows]

    def _count(self, keys: Iterator[tuple[int, str, str]]) -> list[ParkedKey]:
        unique = sorted(set(keys))
        parameters = {
            "shards": [shard for shard, _, _ in unique],
            "key_types": [aggregate_type for _, aggregate_type, _ in unique],
            "key_ids": [aggregate_id for _, _, aggregate_id in unique],
        }
        with translated_errors():
            return [ParkedKey(*row) for row in self._rows("count", parameters)]

    def _release(
        self, shard: int, names: Sequence[tuple[str, str]], *, note: Note, are_overtaken: bool
    ) -> list[ParkedKey]:
        parameters = {
            "shard": shard,
            "key_types": [aggregate_type for aggregate_type, _ in names],
            "key_ids": [aggregate_id for _, aggregate_id in names],
            "are_overtaken": are_overtaken,
            **_recorded(note),
        }
        return [ParkedKey(*row) for row in self._rows("release", parameters)]

    def _skip(self, shard: int, ids: Sequence[int], *, note: Note) -> list[int]:
        skipped = [row[0] for row in self._rows("skip", {"shard": shard, "ids": ids, **_recorded(note)})]
        gone = sorted(set(ids) - set(skipped))
        if gone:
            raise _not_parked(gone)
        return skipped

    @contextmanager
    def _locked(self, shard: int) -> Iterator[None]:
        """
        Open a transaction that holds *shard*, so that no relay claims or parks in it until the end.

        One wait is enough: relays skip a locked shard and never queue behind this one.
        """
        parameters = {"shard": shard, "timeout_ms": round(self._lock_timeout * 1000)}
        with translated_errors(), self._connection.transaction():
            try:
                ClientCursor(self._connection).execute(statement("parked_lock", schema=self._schema), parameters)
            except LockNotAvailable as error:
                raise DatabaseConflict(
                    f"a relay has held shard {shard} for {self._lock_timeout:g} s, as it does while Kafka is slow: "
                    "nothing is changed in this shard, try again"
                ) from error
            yield

    def _rows(self, name: str, parameters: Mapping[str, object]) -> list[TupleRow]:
        return self._connection.execute(statement(f"parked_{name}", schema=self._schema), parameters).fetchall()


def _keys(chosen: Sequence[_Chosen]) -> Iterator[tuple[int, str, str]]:
    return ((each.shard, each.aggregate_type, each.aggregate_id) for each in chosen)


def _recorded(note: Note) -> dict[str, str | None]:
    return {"operator": note.operator, "why": note.why}


def _not_parked(ids: Sequence[int]) -> OperationRefused:
    return OperationRefused(f"not parked, or not any more: {', '.join(map(str, ids))}; see outbox-relay parked list")


def _check(row: TupleRow, *, max_message_bytes: int) -> None:
    """Let the writer's own rules judge a row of `parked_edit.sql`."""
    message_id, aggregate_type, aggregate_id, event_type, value, headers = row
    message = Message(
        aggregate_type=aggregate_type,
        aggregate_id=aggregate_id,
        event_type=event_type,
        payload_bytes=value,
        headers=headers,
        message_id=message_id,
    )
    encode([message], max_message_bytes=max_message_bytes)
