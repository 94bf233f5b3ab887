-- The aggregate types among about :most newest messages and as many of the oldest that are not published: a bounded
-- look, since there is no index to find all of them by.
SELECT DISTINCT seen.aggregate_type
FROM {schema}.outbox_shard
CROSS JOIN LATERAL (
    SELECT coalesce((
        SELECT mark.through
        FROM {schema}.outbox_published AS mark
        WHERE mark.shard = outbox_shard.shard
        ORDER BY mark.through DESC
        LIMIT 1
    ), 0) AS through
) AS newest
CROSS JOIN LATERAL (
    (
        SELECT outbox.aggregate_type
        FROM {schema}.outbox
        WHERE outbox.shard = outbox_shard.shard
        ORDER BY outbox.sequence_no DESC
        LIMIT %(most)s / 16
    )
    UNION ALL
    (
        SELECT outbox.aggregate_type
        FROM {schema}.outbox
        WHERE outbox.shard = outbox_shard.shard AND outbox.sequence_no > newest.through
        ORDER BY outbox.sequence_no
        LIMIT %(most)s / 16
    )
    UNION ALL
    (
        SELECT pending.aggregate_type
        FROM {schema}.outbox_pending AS pending
        WHERE pending.shard = outbox_shard.shard
        ORDER BY pending.sequence_no
        LIMIT %(most)s / 16
    )
) AS seen
ORDER BY seen.aggregate_type
