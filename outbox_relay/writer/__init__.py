"""
The application's side: write messages in the transaction of the change that they tell of.

`Outbox` is for psycopg; `outbox_relay.writer.sqlalchemy` and `outbox_relay.writer.django` have one each for their
library, and every other language calls the SQL function `outbox_write`.
"""

from outbox_relay.writer.message import TOMBSTONE, Message
from outbox_relay.writer.outbox import Outbox
from outbox_relay.writer.rows import Pending

__all__ = ["TOMBSTONE", "Message", "Outbox", "Pending"]
