"""Registers the fixture plugins; each is explained in its own file."""

pytest_plugins = [
    "tests.fixtures.postgres",
    "tests.fixtures.kafka",
    "tests.fixtures.shop",
    "tests.fixtures.ledger",
    "tests.fixtures.connect",
    "tests.fixtures.image",
]
