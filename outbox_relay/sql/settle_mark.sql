-- Marks messages that Kafka has acknowledged, and commits, in one message. They stay until retention removes them.
UPDATE {schema}.outbox
SET published_at = statement_timestamp()
WHERE id = ANY (%(ids)s::bigint[]);
COMMIT
