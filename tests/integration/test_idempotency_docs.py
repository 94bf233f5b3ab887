"""The snippets of the documentation do what it says."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from fastapi import FastAPI

from outbox_relay.idempotency import IdempotencyKeys

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.rows import TupleRow

    from tests.fixtures.postgres import Database

DOCS = Path(__file__).parents[2] / "docs"


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(snippet: str, **names: object) -> dict[str, object]:
    """Execute *snippet* and give the names it has defined."""
    exec(compile(snippet, "<snippet>", "exec", dont_inherit=True), names)  # noqa: S102 -- our own documentation
    return names


@pytest.fixture
def shop(inbox_database: Database) -> Database:
    with inbox_database.connect(autocommit=True) as connection:
        connection.execute("CREATE TABLE charge (id bigint GENERATED ALWAYS AS IDENTITY, amount integer)")
        connection.execute("CREATE TABLE account (name text, balance integer)")
        connection.execute("INSERT INTO account VALUES ('alice', 100)")
    return inbox_database


def rows(shop: Database, query: str) -> list[TupleRow]:
    with shop.connect() as connection:
        return connection.execute(query.encode()).fetchall()


def test_snippet_withdraws_in_one_transaction(shop: Database) -> None:
    [snippet] = snippets("transactions.md")
    assert run(snippet, DATABASE_URL=shop.dsn)["left"] == 90
    assert rows(shop, "SELECT balance FROM account") == [(90,)]


def post(app: object, *requests: tuple[int, dict[str, str]]) -> list[httpx.Response]:
    """Send charges of so much, with these headers, one after the other."""
    assert isinstance(app, FastAPI)

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://shop") as client:
            return [
                await client.post("/charges", json={"amount": amount}, headers=headers) for amount, headers in requests
            ]

    return asyncio.run(main())


def test_fastapi_snippet_charges_once_per_key(shop: Database) -> None:
    app = run(snippets("idempotency.md")[0], DATABASE_URL=shop.dsn)["app"]
    first, second = {"Idempotency-Key": "a"}, {"Idempotency-Key": "b"}
    answers = post(app, (10, first), (10, first), (11, first), (10, second), (10, {}))
    assert [answer.status_code for answer in answers] == [200, 200, 422, 200, 422]
    assert [answers[number].json() for number in (0, 1, 3)] == [{"id": 1}, {"id": 1}, {"id": 2}]
    assert rows(shop, "SELECT amount FROM charge") == [(10,), (10,)]


def test_fastapi_snippet_tells_of_a_twin_at_work(shop: Database) -> None:
    impatient = snippets("idempotency.md")[0].replace('Keys("charges")', 'Keys("charges", wait_seconds=0.1)')
    app = run(impatient, DATABASE_URL=shop.dsn)["app"]
    with shop.connect() as twin:
        IdempotencyKeys("charges").answer(twin, "a", lambda _: {"id": 1}, fingerprint="")
        [answer] = post(app, (10, {"Idempotency-Key": "a"}))
    assert (answer.status_code, "wait_seconds=0.1" in impatient) == (409, True)


def test_snippet_in_steps_goes_on_where_it_failed(shop: Database) -> None:
    charged: list[str] = []

    class Provider:
        @staticmethod
        def charge(_total: int, *, idempotency_key: str) -> str:
            charged.append(idempotency_key)
            if len(charged) == 1:
                raise ConnectionError("the provider does not answer")
            return "payment 1"

    def reserve(connection: Connection[TupleRow]) -> dict[str, int]:
        [(number,)] = connection.execute("INSERT INTO charge (amount) VALUES (80) RETURNING id")
        return {"id": number, "total": 80}

    def record_payment(connection: Connection[TupleRow], order: dict[str, int], payment: str) -> None:
        assert payment == "payment 1"
        connection.execute("UPDATE charge SET amount = 0 WHERE id = %s", [order["id"]])

    names = run(snippets("idempotency.md")[0], DATABASE_URL=shop.dsn) | {
        "provider": Provider,
        "reserve": reserve,
        "record_payment": record_payment,
        "key": "k",
        "fingerprint": "f",
    }
    with pytest.raises(ConnectionError):
        run(snippets("idempotency.md")[1], **names)
    assert run(snippets("idempotency.md")[1], **names)["response"] == {"order": 1}
    assert (rows(shop, "SELECT id, amount FROM charge"), charged) == ([(1, 0)], ["order-1", "order-1"])


def test_snippet_prunes_what_has_expired(shop: Database) -> None:
    names = run(snippets("idempotency.md")[0], DATABASE_URL=shop.dsn)
    with shop.connect(autocommit=True) as connection:
        connection.execute(
            "INSERT INTO idempotency_key (scope, key, fingerprint, locked_until, expires_at)"
            " SELECT 'charges', number::text, '', now(), now() FROM generate_series(1, 1500) AS number"
        )
    run(snippets("idempotency.md")[2], **names)
    assert rows(shop, "SELECT count(*) FROM idempotency_key") == [(0,)]
