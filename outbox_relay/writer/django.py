"""Write messages with Django, in the transaction of one of its databases."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from django.db import DEFAULT_DB_ALIAS, connections, transaction

from outbox_relay.errors import NoTransaction
from outbox_relay.sql import statement
from outbox_relay.writer.rows import MAX_MESSAGE_BYTES, Pending, columns, encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from uuid import UUID

    from outbox_relay.writer.message import Message
    from outbox_relay.writer.rows import Row


class Outbox:
    """
    The outbox in one of Django's databases; it may be made at import time and shared.

    The database's errors come as Django raises them.

    Args:
        using: Alias of the database in `settings.DATABASES`.
        schema: Where the outbox is; None leaves it to the connection's search_path.
        max_message_bytes: Largest message, with its key and headers; no more than message.max.bytes of the relay,
            which would park it.
    """

    def __init__(
        self,
        *,
        using: str = DEFAULT_DB_ALIAS,
        schema: str | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._using = using
        self._statement = statement("insert_messages", schema=schema).decode()
        self._max_message_bytes = max_message_bytes

    def write(self, message: Message) -> UUID:
        """
        Insert *message* in the open `transaction.atomic` block and give its id.

        Raises:
            InvalidMessage: It could never be published. Nothing was sent to the database.
            NoTransaction: No atomic block is open, so Django commits each statement by itself.
        """
        return self.write_many([message])[0]

    def write_many(self, messages: Iterable[Message]) -> list[UUID]:
        """Insert *messages* in one round trip and in their order, all or none; otherwise as `write`."""
        return self._insert(encode(messages, max_message_bytes=self._max_message_bytes))

    @contextmanager
    def atomic(self) -> Iterator[Pending]:
        """
        Open a `transaction.atomic` block, and insert what was written in it just before COMMIT.

        Numbers are drawn when every row that the block changes is locked, and others wait for them no longer than
        the COMMIT takes. If the block raises, nothing is inserted. Inside another atomic block it is a savepoint:
        messages are inserted when it ends, and the transaction stays open.
        """
        with transaction.atomic(using=self._using):
            pending = Pending(max_message_bytes=self._max_message_bytes)
            yield pending
            self._insert(pending.end())

    def _insert(self, rows: Sequence[Row]) -> list[UUID]:
        connection = connections[self._using]
        if connection.get_autocommit():
            raise NoTransaction(
                "no transaction is open, so a message would be committed apart from the change that it belongs to: "
                "put both into one `with transaction.atomic():`"
            )
        if rows:
            with connection.cursor() as cursor:
                cursor.execute(self._statement, columns(rows))
        return [row.message_id for row in rows]
