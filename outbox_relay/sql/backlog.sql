-- How many messages wait, how many are parked, and of how many keys. Each count stops at :most, so that the cost does not
-- grow with the backlog; keys are counted by jumping from one to the next.
WITH RECURSIVE parked_key AS (
    (
        SELECT shard, aggregate_type, aggregate_id
        FROM {schema}.outbox
        WHERE parked_at IS NOT NULL
        ORDER BY shard, aggregate_type, aggregate_id
        LIMIT 1
    )
    UNION ALL
    SELECT next.*
    FROM parked_key
    CROSS JOIN LATERAL (
        SELECT outbox.shard, outbox.aggregate_type, outbox.aggregate_id
        FROM {schema}.outbox
        WHERE outbox.parked_at IS NOT NULL
            AND (outbox.shard, outbox.aggregate_type, outbox.aggregate_id)
            > (parked_key.shard, parked_key.aggregate_type, parked_key.aggregate_id)
        ORDER BY outbox.shard, outbox.aggregate_type, outbox.aggregate_id
        LIMIT 1
    ) AS next
)
SELECT
    (
        SELECT count(*)
        FROM (
            SELECT FROM {schema}.outbox WHERE published_at IS NULL AND parked_at IS NULL LIMIT %(most)s
        ) AS unpublished
    ) AS unpublished_messages,
    (
        SELECT count(*)
        FROM (SELECT FROM {schema}.outbox WHERE parked_at IS NOT NULL LIMIT %(most)s) AS parked
    ) AS parked_messages,
    (SELECT count(*) FROM (SELECT FROM parked_key LIMIT %(most)s) AS parked_key) AS parked_keys
