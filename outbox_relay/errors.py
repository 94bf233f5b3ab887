"""
Every error this project raises on purpose.

    OutboxRelayError
    +-- ConfigurationError      a setting, the schema or a grant is wrong; somebody has to change it
    |   +-- SchemaMismatch      tables, columns or privileges are missing
    +-- DependencyUnavailable   it works again by itself once the other side is back
    |   +-- DatabaseUnavailable
    |   +-- DatabaseConflict    a lock, a deadlock or a time-out rolled the transaction back
    |   |   +-- AnswerTooLarge  the server cannot make the answer; asking for less is the remedy
    |   +-- KafkaUnavailable
    +-- MigrationError          a migration could not be applied
    +-- OperationRefused        what an operator asked for would break a promise, or names what is not there
    +-- InvalidMessage          what is to be written could never be published as it is
    +-- NoTransaction           called outside a transaction, where it would be a dual write again
    +-- ForeignRecord           a Kafka record that no relay has written
    +-- PoisonMessage           a handler failed on one message again and again
    +-- TransactionError
    |   +-- CommitOutcomeUnknown    the connection broke at COMMIT and nobody can tell what became of it
    |   +-- ConnectionReplaced      the statements did not all run in the one transaction
    +-- IdempotencyError
        +-- RequestMismatch         a key was used before, for another request
        +-- RequestInFlight         the first request with this key is still at work
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


class AnswerTooLarge(DatabaseConflict):
    """The server cannot make an answer as large as what was asked for; asking for less is the remedy."""


class KafkaUnavailable(DependencyUnavailable):
    """Kafka does not answer; nothing was acknowledged that was not reported."""


class MigrationError(OutboxRelayError):
    """A migration could not be applied; its transaction is rolled back."""


class OperationRefused(OutboxRelayError):
    """What an operator asked for cannot be done as asked; nothing was changed for it."""


class InvalidMessage(OutboxRelayError, ValueError):
    """A message could never be published as it is; nothing was written."""


class NoTransaction(OutboxRelayError):
    """No transaction is open, and the connection would commit each statement by itself."""


class ForeignRecord(OutboxRelayError, ValueError):
    """A Kafka record lacks what a relay writes, so it cannot be told whether it came before."""


class PoisonMessage(OutboxRelayError):
    """A handler failed on the same message in every attempt; its transaction is rolled back."""


class TransactionError(OutboxRelayError):
    """A transaction did not end as its caller may assume."""


class CommitOutcomeUnknown(TransactionError):
    """The connection broke at COMMIT and the server cannot be asked; the effects may or may not be there."""


class ConnectionReplaced(TransactionError):
    """The session is not the one that the transaction began on, so part of its statements ran outside it."""


class IdempotencyError(OutboxRelayError):
    """A request cannot be carried out, or answered again, under its idempotency key."""


class RequestMismatch(IdempotencyError):
    """The key belongs to a request with another fingerprint."""


class RequestInFlight(IdempotencyError):
    """The first request with this key has not been answered yet; the same request may be sent again later."""
