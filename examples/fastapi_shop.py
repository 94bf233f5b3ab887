"""
A shop with FastAPI: a request that a client repeats is answered as it was the first time, and is one order.

    uvicorn examples.fastapi_shop:app
    curl -H 'Idempotency-Key: 7b0c' -H 'Content-Type: application/json' \
        -d '{"customer": "ada", "cents": 1250}' localhost:8000/orders

DATABASE_URL names a database with the tables of the outbox and of the idempotency keys (`outbox-relay migrate apply`,
with and without --inbox); the shop's own table is made here.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

from fastapi import FastAPI, Header, HTTPException, Request
from psycopg_pool import ConnectionPool
from pydantic import BaseModel

from outbox_relay.errors import RequestInFlight, RequestMismatch
from outbox_relay.idempotency import IdempotencyKeys, fingerprint_of
from outbox_relay.transactions import transact
from outbox_relay.writer import Message, Outbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from psycopg import Connection

CREATE_ORDERS = """
CREATE TABLE IF NOT EXISTS orders (
    id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer text NOT NULL,
    cents    bigint NOT NULL
)
"""

INSERT_ORDER = """
INSERT INTO orders (customer, cents)
VALUES (%(customer)s, %(cents)s)
RETURNING id
"""

outbox = Outbox()
keys = IdempotencyKeys("POST /orders")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep a pool of connections while the application runs."""
    with ConnectionPool(os.environ["DATABASE_URL"]) as pool:
        with pool.connection() as connection:
            connection.execute(CREATE_ORDERS)
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


class NewOrder(BaseModel):
    """What a client sends."""

    customer: str
    cents: int


class PlacedOrder(NewOrder):
    """What it gets back."""

    id: int


@app.post("/orders", status_code=201)
def place_order(order: NewOrder, request: Request, idempotency_key: Annotated[str, Header()]) -> PlacedOrder:
    """Take an order: the key, the order, its message and the response are one transaction."""
    wanted = order.model_dump()

    def place(connection: Connection) -> dict[str, object]:
        [(number,)] = connection.execute(INSERT_ORDER, wanted).fetchall()
        outbox.write(
            connection,
            Message(aggregate_type="order", aggregate_id=str(number), event_type="order_placed", payload=wanted),
        )
        return {"id": number, **wanted}

    fingerprint = fingerprint_of("POST", "/orders", wanted)
    pool: ConnectionPool = request.app.state.pool
    try:
        response = transact(
            pool, lambda connection: keys.answer(connection, idempotency_key, place, fingerprint=fingerprint)
        )
    except RequestMismatch as error:
        raise HTTPException(422, str(error)) from error
    except RequestInFlight as error:
        raise HTTPException(409, str(error), headers={"Retry-After": "1"}) from error
    return PlacedOrder.model_validate(response)
