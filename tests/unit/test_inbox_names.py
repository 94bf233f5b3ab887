from __future__ import annotations

from outbox_relay import consumer


def test_the_public_names_of_the_consumer_are_these() -> None:
    assert consumer.__all__ == ["Batch", "Inbox", "Message", "Record", "SequenceInbox", "message_from"]
    assert [name for name in consumer.__all__ if not hasattr(consumer, name)] == []
