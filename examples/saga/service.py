"""Runs one service as a process: `python -m examples.saga payment`, configured by its environment."""

from __future__ import annotations

import logging
import os
import signal
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

import psycopg

from examples.saga import orders
from examples.saga.inventory import INVENTORY
from examples.saga.messages import REPLIES, commands_for
from examples.saga.payment import PAYMENT
from examples.saga.shipping import SHIPPING
from outbox_relay.consumer import Inbox
from outbox_relay.consumer.kafka import Consumer
from outbox_relay.errors import CommitOutcomeUnknown
from outbox_relay.transactions import transact

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from examples.saga.participant import Participant
    from outbox_relay.consumer import Message

logger = logging.getLogger(__name__)

TOPIC_TEMPLATE = "saga.{aggregate_type}"
PARTICIPANTS: Mapping[str, Participant] = {"payment": PAYMENT, "inventory": INVENTORY, "shipping": SHIPPING}
PROCESSES = ("orders", "timer", *PARTICIPANTS)

CONNECT_TIMEOUT_SECONDS = 5
TIMER_INTERVAL_SECONDS = 0.5


def topic(aggregate_type: str) -> str:
    """Name the topic that the relays publish messages of this type to."""
    return TOPIC_TEMPLATE.format(aggregate_type=aggregate_type)


def run(name: str) -> None:
    """Be one of PROCESSES until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name} %(levelname)s %(message)s")
    stop = Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    connect = partial(psycopg.connect, os.environ["DATABASE_URL"], connect_timeout=CONNECT_TIMEOUT_SECONDS)
    if name == "timer":
        keep_time(connect, stop=stop)
    elif name == "orders":
        consume(name, topic(REPLIES), orders.handle_replies, connect=connect, stop=stop)
    else:
        consume(name, topic(commands_for(name)), PARTICIPANTS[name].handle_commands, connect=connect, stop=stop)


def consume(
    name: str,
    topic: str,
    handle: Callable[[psycopg.Connection, Sequence[Message]], None],
    *,
    connect: Callable[[], psycopg.Connection],
    stop: Event,
) -> None:
    """Handle each message of *topic* once, in one transaction with its record in the inbox."""
    config = {
        "bootstrap.servers": os.environ["KAFKA_BOOTSTRAP_SERVERS"],
        "group.id": f"saga-{name}",
        # A member of this name gets its partitions back at once when it comes again after a kill -9; each of several
        # processes of a service needs a name of its own.
        "group.instance.id": f"saga-{name}-1",
    }
    Consumer(config, [topic], connect=connect, inbox=Inbox(name), handle=handle).run(stop)


def keep_time(connect: Callable[[], psycopg.Connection], *, stop: Event) -> None:
    """Let overdue sagas time out; only the clock of the database counts."""
    while not stop.is_set():
        try:
            expired = transact(connect, orders.expire)
        except (psycopg.OperationalError, CommitOutcomeUnknown) as error:
            logger.warning("the database is away, what is overdue will be found again: %s", error)
            expired = 0
        if expired:
            logger.info("%d sagas timed out", expired)
        else:
            stop.wait(TIMER_INTERVAL_SECONDS)
