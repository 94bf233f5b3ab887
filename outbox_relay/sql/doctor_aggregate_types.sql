-- The aggregate types among the :most newest messages and the :most oldest that wait: a bounded look, since there is no
-- index to find all of them by.
SELECT DISTINCT seen.aggregate_type
FROM (
    (SELECT aggregate_type FROM {schema}.outbox ORDER BY id DESC LIMIT %(most)s)
    UNION ALL
    SELECT waiting.aggregate_type
    FROM {schema}.outbox_shard
    CROSS JOIN LATERAL (
        SELECT outbox.aggregate_type
        FROM {schema}.outbox
        WHERE outbox.shard = outbox_shard.shard
            AND outbox.published_at IS NULL
            AND outbox.parked_at IS NULL
        ORDER BY outbox.sequence_no
        LIMIT %(most)s / 16
    ) AS waiting
) AS seen
ORDER BY seen.aggregate_type
