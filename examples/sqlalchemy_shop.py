"""
A shop with SQLAlchemy: an order leaves through the outbox, and its points arrive once through the inbox.

    python -m examples.sqlalchemy_shop create-tables
    python -m examples.sqlalchemy_shop order ada 1250
    python -m examples.sqlalchemy_shop listen

DATABASE_URL names a database with the tables of the outbox and the inbox (`outbox-relay migrate apply`, with and
without --inbox) and a relay; `listen` takes the messages of the topic `order.events` at KAFKA_BOOTSTRAP_SERVERS.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, cast

from sqlalchemy import Engine, create_engine, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from examples.listen import listen
from outbox_relay.consumer import Inbox, message_from
from outbox_relay.writer import Message
from outbox_relay.writer.sqlalchemy import Outbox

if TYPE_CHECKING:
    from psycopg import Connection

    from outbox_relay.consumer import Record

outbox = Outbox()
inbox = Inbox("loyalty")


class Base(DeclarativeBase):
    """The tables of the shop."""


class Order(Base):
    """What a customer has ordered."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    cents: Mapped[int]


class Account(Base):
    """How many points a customer has: one for every whole euro."""

    __tablename__ = "account"

    customer: Mapped[str] = mapped_column(primary_key=True)
    points: Mapped[int]


def place_order(session: Session, *, customer: str, cents: int) -> int:
    """Take an order and give its number; it is committed together with its message, or neither is."""
    order = Order(customer=customer, cents=cents)
    session.add(order)
    session.flush()  # which gives it its number
    outbox.write(
        session,
        Message(
            aggregate_type="order",
            aggregate_id=str(order.id),
            event_type="order_placed",
            payload={"customer": customer, "cents": cents},
        ),
    )
    return order.id


def grant_points(engine: Engine, record: Record) -> None:
    """Grant the points of an order, once however often its record is delivered."""
    message = message_from(record)
    with Session(engine) as session, session.begin():
        connection = cast("Connection", session.connection().connection.driver_connection)  # psycopg's own
        if inbox.accept(connection, message):
            order = json.loads(message.payload or b"")
            session.execute(insert(Account).values(customer=order["customer"], points=0).on_conflict_do_nothing())
            more = Account.points + order["cents"] // 100
            session.execute(update(Account).where(Account.customer == order["customer"]).values(points=more))


def main() -> None:
    """Do what the command line says."""
    url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://")
    engine = create_engine(url)
    match sys.argv[1:]:
        case ["create-tables"]:
            Base.metadata.create_all(engine)
        case ["order", customer, cents]:
            with Session(engine) as session, session.begin():
                print(place_order(session, customer=customer, cents=int(cents)))
        case ["listen"]:
            listen(partial(grant_points, engine))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
