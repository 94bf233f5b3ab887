"""What a failed delivery means for the message, its topic and the lane: one table, and the back-off that follows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from outbox_relay.errors import OutboxRelayError

if TYPE_CHECKING:
    import random


_MOST_QUOTED = 300


class Unpublishable(OutboxRelayError):
    """Kafka could never accept this message as it is; the text is the reason that an operator reads."""

    code = "unpublishable"


class TooLarge(Unpublishable):
    """The message is larger than anything that Kafka accepts, under the code that Kafka has for it."""

    code = "MSG_SIZE_TOO_LARGE"


def quoted(text: str) -> str:
    """Give *text* of a message as an operator reads it: in quotes, on one line, and not without end."""
    return f'"{repr(text[:_MOST_QUOTED])[1:-1][:_MOST_QUOTED]}"'


class Scope(Enum):
    """How far a failure reaches."""

    MESSAGE = "message"
    """Kafka refuses this message whatever the time; it is parked."""

    BATCH = "batch"
    """The batch that the message was in was refused or withdrawn; the next stint sends it again."""

    TOPIC = "topic"
    """Nothing goes to this topic now; its messages are held while other topics flow."""

    CONNECTION = "connection"
    """Kafka cannot be used now; the lane waits. Also the scope of an unknown outcome."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a message was not acknowledged. `code` is Kafka's name of the error, with bounded values."""

    scope: Scope
    code: str
    reason: str

    @property
    def text(self) -> str:
        """What an operator reads."""
        return f"{self.code}: {self.reason}"


Outcome = Failure | None
"""What became of a message; None = acknowledged by all in-sync replicas."""

NO_REPORT = Failure(Scope.CONNECTION, "no_report", "Kafka did not answer before the publish deadline")
WITHDRAWN = Failure(Scope.BATCH, "withdrawn", "withdrawn because a message before it was refused")
BEHIND_WAITING = Failure(Scope.TOPIC, "behind_waiting", "an earlier message of the key waits")
BEHIND_PARKED = Failure(Scope.MESSAGE, "behind_parked", "an earlier message of the key is parked")
TOPIC_HELD = Failure(Scope.TOPIC, "topic_held", "its topic cannot be written to now")
HELD_BACK = frozenset({BEHIND_WAITING, BEHIND_PARKED, TOPIC_HELD})

# By librdkafka's names of error codes, which are the protocol's for what a broker says and begin with an underscore for
# what the client found. Its own "retriable" flag is false in every delivery report, hence this table. Whatever is not
# listed is the connection's: the message waits, and nothing is parked for a reason we do not know.
_SCOPES = {
    Scope.MESSAGE: (
        "MSG_SIZE_TOO_LARGE",
        "INVALID_MSG_SIZE",
        "RECORD_LIST_TOO_LARGE",
        "INVALID_RECORD",
        "INVALID_TIMESTAMP",
        "UNSUPPORTED_FOR_MESSAGE_FORMAT",
        "_BAD_MSG",
        "_INVALID_ARG",
        "_BAD_COMPRESSION",
    ),
    Scope.BATCH: (  # another record of the batch is refused, or the producer has failed and a new one takes the batch
        "_INVALID_DIFFERENT_RECORD",
        "INVALID_PRODUCER_EPOCH",
        "PRODUCER_FENCED",
        "OUT_OF_ORDER_SEQUENCE_NUMBER",
        "UNKNOWN_PRODUCER_ID",
        "INVALID_PRODUCER_ID_MAPPING",
    ),
    Scope.TOPIC: (
        "UNKNOWN_TOPIC_OR_PART",
        "TOPIC_AUTHORIZATION_FAILED",
        "TOPIC_EXCEPTION",
        "POLICY_VIOLATION",
        "INVALID_REQUIRED_ACKS",
        "_UNKNOWN_TOPIC",
        "_UNKNOWN_PARTITION",
    ),
}
_SCOPE_BY_CODE = {code: scope for scope, codes in _SCOPES.items() for code in codes}


def scope_of(code: str) -> Scope:
    """Tell how far an error with Kafka's name *code* reaches."""
    return _SCOPE_BY_CODE.get(code, Scope.CONNECTION)


@dataclass(slots=True)
class Backoff:
    """
    Pauses that double up to a cap, each drawn between nothing and its limit ("full jitter").

    So many relays that lost the same server do not come back at the same moment. Source: AWS Architecture Blog,
    "Exponential Backoff And Jitter" (2015).
    """

    first_seconds: float = 0.1
    most_seconds: float = 5.0
    failures: int = 0

    def next_pause(self, chance: random.Random) -> float:
        """Count one more failure and give the seconds to wait, at least a tenth of the first pause."""
        limit = min(self.most_seconds, self.first_seconds * 2**self.failures)
        self.failures = min(self.failures + 1, 32)
        return max(self.first_seconds / 10, chance.uniform(0, limit))

    def reset(self) -> None:
        """Start again from the first pause, after a success."""
        self.failures = 0
