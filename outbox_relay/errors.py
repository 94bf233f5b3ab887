"""
Every error this project raises on purpose.

    OutboxRelayError
    +-- ConfigurationError      a setting, the schema or a grant is wrong; somebody has to change it
    |   +-- SchemaMismatch      tables, columns or privileges are missing
    +-- DependencyUnavailable   it works again by itself once the other side is back
    |   +-- DatabaseUnavailable
    |   +-- DatabaseConflict    a lock, a deadlock or a time-out rolled the transaction back
    |   +-- KafkaUnavailable
    +-- MigrationError          a migration could not be applied
"""

from __future__ import annotations


class OutboxRelayError(Exception):
    """Base of all errors raised by outbox_relay; the message says what failed and what to do."""


class ConfigurationError(OutboxRelayError):
    """A setting, a grant or the environment is wrong and stays wrong until somebody changes it."""


class SchemaMismatch(ConfigurationError):
    """The database does not have the tables, columns or privileges this version needs."""


class DependencyUnavailable(OutboxRelayError):
    """PostgreSQL or Kafka cannot be used now; trying again later is the remedy."""


class DatabaseUnavailable(DependencyUnavailable):
    """The connection to PostgreSQL broke or cannot be made; whatever was open is rolled back."""


class DatabaseConflict(DependencyUnavailable):
    """A lock, a deadlock or a time-out rolled the transaction back; the connection is still good."""


class KafkaUnavailable(DependencyUnavailable):
    """Kafka does not answer; nothing was acknowledged that was not reported."""


class MigrationError(OutboxRelayError):
    """A migration could not be applied; its transaction is rolled back."""
