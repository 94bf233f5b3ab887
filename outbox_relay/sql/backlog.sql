-- What waits and what is parked. Counting stops at :most, so that the cost does not grow with the backlog.
SELECT
    (
        SELECT count(*)
        FROM (
            SELECT FROM {schema}.outbox WHERE published_at IS NULL AND parked_at IS NULL LIMIT %(most)s
        ) AS unpublished
    ) AS unpublished,
    (
        SELECT coalesce(extract(epoch FROM clock_timestamp() - min(first.created_at)), 0)::float8
        FROM {schema}.outbox_shard
        CROSS JOIN LATERAL (
            SELECT outbox.created_at
            FROM {schema}.outbox
            WHERE outbox.shard = outbox_shard.shard
                AND outbox.published_at IS NULL
                AND outbox.parked_at IS NULL
            ORDER BY outbox.sequence_no
            LIMIT 1
        ) AS first
    ) AS oldest_age_seconds,
    (
        SELECT count(*)
        FROM (SELECT FROM {schema}.outbox WHERE parked_at IS NOT NULL LIMIT %(most)s) AS parked
    ) AS parked,
    (
        SELECT count(*)
        FROM (
            SELECT DISTINCT aggregate_type, aggregate_id
            FROM (
                SELECT aggregate_type, aggregate_id
                FROM {schema}.outbox
                WHERE parked_at IS NOT NULL
                LIMIT %(most)s
            ) AS parked
        ) AS keys
    ) AS parked_keys
