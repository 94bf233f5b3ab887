-- Removes the messages of a range of ids that were published long enough ago, and commits, in one message: to the
-- horizon this transaction looks like a writer, so nobody may have to wait for its client.
--
-- What is unpublished or parked is never removed, whatever was seen before: the condition is here.
DELETE FROM {schema}.outbox
WHERE id > %(after)s
    AND id <= %(through)s
    AND published_at < now() - make_interval(secs => %(older_than_seconds)s)
    AND parked_at IS NULL;
COMMIT
