-- The first message that waits in each shard, and its age; a shard without any is left out.
SELECT
    head.shard,
    head.sequence_no,
    head.aggregate_type,
    extract(epoch FROM clock_timestamp() - head.created_at)::float8 AS age_seconds
FROM {schema}.outbox_shard
CROSS JOIN LATERAL (
    SELECT outbox.shard, outbox.sequence_no, outbox.aggregate_type, outbox.created_at
    FROM {schema}.outbox
    WHERE outbox.shard = outbox_shard.shard
        AND outbox.published_at IS NULL
        AND outbox.parked_at IS NULL
    ORDER BY outbox.sequence_no
    LIMIT 1
) AS head
ORDER BY head.shard
