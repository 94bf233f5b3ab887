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

MOST_COUNTED = 1_000  # a list of a hundred messages counts so many for each of them


@dataclass(frozen=True, slots=True)
class Selection:
    """
    Which parked messages; all that is given has to apply, and nothing given is all of them.

    Attributes:
        keys: Aggregate types and ids.
        reason: Part of the reason or its code, in any case, with the wildcards of LIKE.
    """

    keys: Sequence[tuple[str, str]] = ()
    aggregate_type: str | None = None
    reason: str | None = None

    def parameters(self) -> dict[str, object]:
        """Return what `parked_list.sql` and `parked_keys.sql` take for it."""
        return {
            "key_types": [aggregate_type for aggregate_type, _ in self.keys] or None,
            "key_ids": [aggregate_id for _, aggregate_id in self.keys] or None,
            "aggregate_type": self.aggregate_type,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class ParkedMessage:
    """
    One line of the list. A message that somebody has deleted from the outbox has no id, key and event type any more.

    Attributes:
        since: When it was parked.
        is_guilty: It was refused itself; the others stand behind an earlier message of their key.
        behind: Later parked messages of its key, counted up to `MOST_COUNTED`.
    """

    sequence_no: int
    shard: int
    message_id: str | None
    aggregate_type: str
    aggregate_id: str | None
    event_type: str | None
    since: datetime
    reason_code: str
    reason: str
    is_guilty: bool
    behind: int


@dataclass(frozen=True, slots=True)
class ParkedKey:
    """
    A key and how many of its messages are parked, or were until they were released.

    Attributes:
        aggregate_id: None for messages that somebody has deleted from the outbox: only the hash of their key is left.
    """

    shard: int
    key_hash: int
    aggregate_type: str
    aggregate_id: str | None
    messages: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """
    What a skip came to.

    Attributes:
        numbers: Of the messages that will never be published.
        deleted: Those of them that somebody had deleted from the outbox before.
        released: Keys whose other messages were released.
        left: Keys whose other messages are parked still.
    """

    numbers: list[int] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
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

    def parameters(self) -> dict[str, object]:
        """Return what the statements that record something take for it."""
        return {"operator": self.operator, "why": self.why}


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A message named by its number; *earlier_no* is parked before it and not named."""

    sequence_no: int
    shard: int
    message_id: str | None
    aggregate_type: str
    aggregate_id: str | None
    earlier_no: int | None


class ParkedMessages:
    """
    The parked messages of one outbox.

    Whatever changes them locks their shard as a relay does, one shard in each transaction, so that relays are held up
    in one shard at most. If a shard cannot be had, what was done in the shards before stays done.

    The methods raise `DatabaseUnavailable` if the connection broke, `SchemaMismatch` if a table or a privilege is
    missing or a policy hides rows, and `DatabaseConflict` if a statement or a lock, such as a relay's on a shard, takes
    too long.

    Args:
        connection: In autocommit mode.
        lock_timeout: Seconds to wait for a shard. A relay holds it while it publishes.
        statement_timeout: Seconds that one statement may take, without the wait for a shard.
    """

    def __init__(self, connection: Connection, *, schema: str, lock_timeout: float, statement_timeout: float) -> None:
        self._connection = connection
        self._schema = schema
        self._lock_timeout = lock_timeout
        self._timeouts = {
            "lock_timeout_ms": round(lock_timeout * 1000),
            "statement_timeout_ms": round(statement_timeout * 1000),
        }

    def find(self, selection: Selection, *, limit: int | None = None, with_behind: bool = False) -> list[ParkedMessage]:
        """Return the guilty messages and the first one of each key, oldest first, or also those behind them."""
        parameters = {"with_behind": with_behind, "most_counted": MOST_COUNTED, "limit": limit}
        with self._begun():
            return [ParkedMessage(*row) for row in self._rows("list", selection.parameters() | parameters)]

    def show(self, number: int) -> dict[str, str]:
        """
        Return every field of a message, as the text of a JSON value; payload_bytes is in base64.

        The message_id of one that somebody has deleted from the outbox is `null`.

        Raises:
            OperationRefused: The message is not parked.
        """
        with self._begun():
            fields: dict[str, str] = dict(self._rows("show", {"sequence_no": number}))
        if not fields:
            raise _not_parked([number])
        return fields

    def edit(self, number: int, *, change: Change, max_message_bytes: int, note: Note) -> None:
        """
        Change what a message carries, if a writer could have written the outcome; it stays parked.

        Raises:
            OperationRefused: The message is not parked, or was deleted from the outbox.
            InvalidMessage: It could still not be published, as far as a writer can tell. Nothing is changed.
        """
        [chosen] = self._choose([number])
        if chosen.message_id is None:
            raise OperationRefused(f"message {number} was deleted from the outbox: only skip and release can take it")
        parameters = {
            "shard": chosen.shard,
            "sequence_no": number,
            "replaces_payload": change.payload is not None or change.payload_bytes is not None,
            "payload": change.payload,
            "payload_bytes": change.payload_bytes,
            "headers": json.dumps(dict(change.headers)),
            "removed_headers": list(change.removed_headers),
        }
        with self._locked(chosen.shard):
            try:
                edited = self._rows("edit", parameters | note.parameters())
            except (DataError, CheckViolation) as error:  # PostgreSQL knows best what jsonb is, and how large
                raise InvalidMessage(f"message {number} cannot be stored: {error.diag.message_primary}") from error
            if not edited:
                raise _not_parked([number])
            _check(edited[0], max_message_bytes=max_message_bytes)

    def keys(self, selection: Selection) -> list[ParkedKey]:
        """Return the keys of the messages that *selection* applies to, with the number of all their parked messages."""
        return self._keys(selection)

    def keys_of(self, numbers: Collection[int]) -> list[ParkedKey]:
        """
        Return the keys of messages named by their numbers.

        Raises:
            OperationRefused: One is not parked, or stands behind one that is not named, so that the caller may not
                mean it.
        """
        for chosen in self._choose(numbers):
            if chosen.earlier_no is not None:
                raise _is_behind(chosen)
        return self._keys(Selection(), numbers=numbers)

    def release(self, keys: Sequence[ParkedKey], *, note: Note, are_overtaken: bool) -> list[ParkedKey]:
        """
        Let relays send all parked messages of *keys*, in their order, and return what there was.

        What somebody has deleted from the outbox is no longer parked, and never sent.

        Args:
            are_overtaken: Later messages of the keys have been published, as under on_poison = skip; these will carry
                the header `unordered` then.
        """
        released = []
        for shard, group in groupby(sorted(keys, key=attrgetter("shard")), key=attrgetter("shard")):
            with self._locked(shard):
                released += self._release(list(group), note=note, are_overtaken=are_overtaken)
        return released

    def skip(self, numbers: Collection[int], *, note: Note, release_rest: bool, are_overtaken: bool) -> Skipped:
        """
        Move messages to the audit table, so that they are never published, and release the rest of their keys if asked.

        Raises:
            OperationRefused: One of them is not parked.
        """
        skipped = Skipped()
        chosen = self._choose(numbers)
        keys = self._keys(Selection(), numbers=numbers)
        for shard, group in groupby(chosen, key=attrgetter("shard")):
            with self._locked(shard):
                skipped.numbers.extend(self._skip(shard, [each.sequence_no for each in group], note=note))
                if release_rest:
                    rest = [key for key in keys if key.shard == shard]
                    skipped.released.extend(self._release(rest, note=note, are_overtaken=are_overtaken))
        skipped.deleted.extend(each.sequence_no for each in chosen if each.message_id is None)
        names = [(key.aggregate_type, key.aggregate_id) for key in keys if key.aggregate_id is not None]
        skipped.left.extend(self._keys(Selection(keys=names)) if names else ())
        return skipped

    def _choose(self, numbers: Collection[int]) -> list[_Chosen]:
        """Find messages by their numbers, in the order of their shards."""
        with self._begun():
            rows = self._rows("chosen", {"numbers": sorted(set(numbers))})
        missing = [number for number, shard, *_ in rows if shard is None]
        if missing:
            raise _not_parked(missing)
        return [_Chosen(*row) for row in rows]

    def _keys(self, selection: Selection, *, numbers: Collection[int] | None = None) -> list[ParkedKey]:
        parameters = {"numbers": None if numbers is None else list(numbers)}
        with self._begun():
            return [ParkedKey(*row) for row in self._rows("keys", selection.parameters() | parameters)]

    def _release(self, keys: Sequence[ParkedKey], *, note: Note, are_overtaken: bool) -> list[ParkedKey]:
        """Release *keys*, which are of the one shard that is locked."""
        parameters = {
            "shard": keys[0].shard,
            "key_hashes": [key.key_hash for key in keys],
            "key_types": [key.aggregate_type for key in keys],
            "key_ids": [key.aggregate_id for key in keys],
            "are_overtaken": are_overtaken,
        }
        return [ParkedKey(*row) for row in self._rows("release", parameters | note.parameters())]

    def _skip(self, shard: int, numbers: Sequence[int], *, note: Note) -> list[int]:
        parameters = {"shard": shard, "numbers": numbers}
        skipped = [number for (number,) in self._rows("skip", parameters | note.parameters())]
        gone = sorted(set(numbers) - set(skipped))
        if gone:
            raise _not_parked(gone)
        return skipped

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """Open a transaction with settings of its own."""
        with translated_errors(), self._connection.transaction():
            self._set("parked_begin", self._timeouts)
            yield

    @contextmanager
    def _locked(self, shard: int) -> Iterator[None]:
        """
        Open a transaction that holds *shard*, so that no relay publishes or parks in it until the end.

        One wait is enough: relays skip a locked shard and never queue behind this one.
        """
        with self._begun():
            try:
                self._set("parked_lock", self._timeouts | {"shard": shard})
            except LockNotAvailable as error:
                raise DatabaseConflict(
                    f"somebody has held shard {shard} for {self._lock_timeout:g} s, as a relay does while Kafka is "
                    "slow: nothing is changed in this shard, try again"
                ) from error
            yield

    def _set(self, name: str, parameters: Mapping[str, object]) -> None:
        """Execute several statements, which the client fills in."""
        ClientCursor(self._connection).execute(statement(name, schema=self._schema), parameters)

    def _rows(self, name: str, parameters: Mapping[str, object]) -> list[TupleRow]:
        return self._connection.execute(statement(f"parked_{name}", schema=self._schema), parameters).fetchall()


def _not_parked(numbers: Sequence[int]) -> OperationRefused:
    return OperationRefused(
        f"not parked, or not any more: {', '.join(map(str, numbers))}; see outbox-relay parked list"
    )


def _is_behind(chosen: _Chosen) -> OperationRefused:
    whole_key = "" if chosen.aggregate_id is None else join(["--key", chosen.aggregate_type, chosen.aggregate_id])
    return OperationRefused(
        f"message {chosen.sequence_no} stands behind parked message {chosen.earlier_no} of its key: "
        f"name that one as well{whole_key and f', or the whole key with {whole_key}'}"
    )


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
