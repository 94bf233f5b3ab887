-- Remembers up to which marks the shards are compared with their rows, and commits, in one message.
INSERT INTO {schema}.outbox_reconciled (shard, checked_through)
SELECT *
FROM unnest(%(shards)s::smallint[], %(throughs)s::bigint[])
ON CONFLICT (shard) DO UPDATE
SET checked_through = excluded.checked_through;
COMMIT
