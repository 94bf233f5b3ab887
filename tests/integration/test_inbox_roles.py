"""What the consumers' group role may do, asked from the catalog in whole, and what it takes to create it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from outbox_relay.errors import ConfigurationError
from outbox_relay.operate import migrate
from tests.integration.test_roles import PRIVILEGES

if TYPE_CHECKING:
    from tests.fixtures.postgres import Database

TABLES = {"inbox_message", "inbox_sequence", "inbox_offset", "schema"}
EXPECTED = {
    "schema USAGE",
    "inbox_message SELECT",
    "inbox_message DELETE",
    "inbox_message INSERT consumer",
    "inbox_message INSERT message_id",
    "inbox_message INSERT created_at",
    "inbox_message UPDATE result",
    "inbox_sequence SELECT",
    "inbox_sequence INSERT",
    "inbox_sequence UPDATE sequence_no",
    "inbox_sequence UPDATE previous_sequence_no",
    "inbox_offset SELECT",
    "inbox_offset INSERT",
    "inbox_offset UPDATE next_offset",
}


@pytest.mark.every_postgres
def test_a_consumer_has_these_privileges_and_no_other(database: Database) -> None:
    with database.connect() as connection:
        migrate.apply(connection, schema="shop", line="inbox")
        found = {privilege for (privilege,) in connection.execute(PRIVILEGES, {"role": "inbox_consumer"})}
    assert {privilege for privilege in found if privilege.split()[0] in TABLES} == EXPECTED


def test_an_administrator_is_asked_for_the_role_if_it_cannot_be_created(own_database: Database) -> None:
    with own_database.connect(autocommit=True) as admin:
        admin.execute("ALTER ROLE inbox_consumer RENAME TO another_consumer")
        admin.execute("CREATE ROLE deployer LOGIN")
        admin.execute("CREATE SCHEMA shop AUTHORIZATION deployer")
    with own_database.connect(user="deployer") as connection, pytest.raises(ConfigurationError) as raised:
        migrate.apply(connection, schema="shop", line="inbox")
    assert str(raised.value) == (
        "migration 0002_grant_roles is rolled back: role inbox_consumer does not exist and deployer may not create it. "
        "Let an administrator run: CREATE ROLE inbox_consumer NOLOGIN;"
    )
