"""What operators do while everything is at work, right and by the book: that too may disturb nothing."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

from outbox_relay.sandbox.history import Hold
from outbox_relay.sandbox.reading import read_ends
from tests.faults.soak.stage import RECOVERY_SECONDS, DidNotFire, TryLater
from tests.fixtures.load import POISON, commit_poison, type_of
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from outbox_relay.sandbox.history import Place
    from tests.faults.soak.stage import Stage

SELECT_PARKED = "SELECT sequence_no FROM outbox_message WHERE message_id = %s AND state = 'parked'"
REPLAYED = 200


@contextmanager
def poison_mended(stage: Stage, chance: Random) -> Iterator[None]:
    """A message is parked with what comes behind it; it is edited, and all of them are released."""
    with parked(stage, key=chance.choice(stage.keys)) as number:
        yield
        edits = [f"--remove-header={name}" for name in POISON]
        stage.command("parked", "edit", number, *edits, dsn=stage.operator_dsn)
    stage.command("parked", "release", number, dsn=stage.operator_dsn)


@contextmanager
def poison_skipped(stage: Stage, chance: Random) -> Iterator[None]:
    """A message is parked with what comes behind it; it is taken out, and the others are released."""
    with parked(stage, key=chance.choice(stage.keys)) as number:
        yield
    stage.command("parked", "skip", number, "--release-rest", "--yes", "--why=soak", dsn=stage.operator_dsn)


@contextmanager
def pruned(stage: Stage, _chance: Random) -> Iterator[None]:
    """What is old goes; not while a relay waits for a frozen broker, when a partition cannot be dropped."""
    yield
    try:
        done = stage.command("prune", "--older-than=5s", "--yes", "--json", dsn=stage.pruner_dsn)
    except TryLater as error:
        raise DidNotFire from error
    if not json.loads(done)["pruned_messages"]:
        raise DidNotFire


@contextmanager
def replayed(stage: Stage, _chance: Random) -> Iterator[None]:
    """The newest of what is published is published once more."""
    yield
    last = stage.pipeline.last_number()
    bounds = f"--from-sequence={max(1, last - REPLAYED)}", f"--through-sequence={last}"
    done = stage.command("replay", *bounds, "--yes", "--json", "--why=soak", dsn=stage.operator_dsn)
    if not json.loads(done)["replayed_messages"]:
        raise DidNotFire


@contextmanager
def migrated(stage: Stage, _chance: Random) -> Iterator[None]:
    """As each deployment does; there is nothing left to migrate."""
    yield
    stage.command("migrate", "apply", dsn=stage.pipeline.database.dsn)


@contextmanager
def parked(stage: Stage, *, key: str) -> Iterator[str]:
    """Write a message that Kafka would refuse, wait until it is parked, and record what lay behind it meanwhile."""
    with stage.pipeline.database.connect(autocommit=True) as connection:
        write = commit_poison(connection, key)
        stage.writes.append(write)
        [(number,)] = eventually(
            lambda: connection.execute(SELECT_PARKED, [write.message_id]).fetchall(),
            timeout=RECOVERY_SECONDS,
            message="it is not parked",
        )
    begins = ends_of(stage)
    yield str(number)
    stage.holds.append(Hold(type_of(key), key, number, begins=begins, ends=ends_of(stage)))


def ends_of(stage: Stage) -> dict[Place, int]:
    return read_ends(stage.kafka.bootstrap_servers, topics=stage.pipeline.topics)


OPERATOR = (poison_mended, poison_skipped, pruned, replayed, migrated)
