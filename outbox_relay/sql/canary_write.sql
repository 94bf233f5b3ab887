-- Writes a canary and commits, in one message: to the horizon this transaction is a writer, so nobody may have to wait
-- for its client. Its number comes back.
INSERT INTO {schema}.outbox (aggregate_type, aggregate_id, event_type)
VALUES (%(aggregate_type)s, %(aggregate_id)s, 'sent')
RETURNING sequence_no;
COMMIT
