-- Sets messages aside until an operator decides, each with its reason, and starts a new generation of their shards:
-- a claim whose snapshot is older must not trust what it knows about parked keys.
WITH parked AS (
    UPDATE {schema}.outbox
    SET parked_at = statement_timestamp(), parked_reason = wanted.reason
    FROM unnest(%(ids)s::bigint[], %(reasons)s::text[]) AS wanted (id, reason)
    WHERE outbox.id = wanted.id
    RETURNING outbox.shard
)
UPDATE {schema}.outbox_shard
SET generation = generation + 1
WHERE shard IN (SELECT shard FROM parked)
RETURNING shard, generation
