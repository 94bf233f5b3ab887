"""Every event of the log: past tense, one name for one thing. docs/operations.md explains each."""

from __future__ import annotations

from typing import Final

RELAY_STARTED: Final = "relay_started"
SCHEMA_IS_NEWER: Final = "schema_is_newer"
RELAY_DRAINING: Final = "relay_draining"
RELAY_STOPPED: Final = "relay_stopped"
BATCH_PUBLISHED: Final = "batch_published"
DELIVERIES_FAILED: Final = "deliveries_failed"
MESSAGES_PARKED: Final = "messages_parked"
LATE_MESSAGES_FOUND: Final = "late_messages_found"
HORIZON_HELD: Final = "horizon_held"
HORIZON_RELEASED: Final = "horizon_released"
WRITER_GIVEN_UP: Final = "writer_given_up"
TOPIC_HELD: Final = "topic_held"
TOPIC_RELEASED: Final = "topic_released"
KAFKA_LOST: Final = "kafka_lost"
KAFKA_RECOVERED: Final = "kafka_recovered"
DATABASE_LOST: Final = "database_lost"
DATABASE_RECOVERED: Final = "database_recovered"
CLAIM_CONFLICTED: Final = "claim_conflicted"
BATCH_PRUNED: Final = "batch_pruned"
PRUNING_FAILED: Final = "pruning_failed"
SURVEY_FAILED: Final = "survey_failed"
CANARY_FAILED: Final = "canary_failed"
THREAD_FAILED: Final = "thread_failed"
