-- Removes messages that Kafka has acknowledged, and commits, in one message.
DELETE FROM {schema}.outbox
WHERE id = ANY (%(ids)s::bigint[]);
COMMIT
