-- Removes messages that Kafka has acknowledged.
DELETE FROM {schema}.outbox
WHERE id = ANY (%(ids)s)
