-- How far each shard has come: its newest mark, that mark's age, and the highest number that is committed. And the
-- transaction that locked it last, whether or not it still runs: the rows are locked and never updated, so xmax is that
-- of a lock.
SELECT
    each.shard,
    newest.through AS published_through,
    extract(epoch FROM clock_timestamp() - newest.published_at)::float8 AS published_seconds_ago,
    (
        SELECT outbox.sequence_no
        FROM {schema}.outbox
        WHERE outbox.shard = each.shard
        ORDER BY outbox.sequence_no DESC
        LIMIT 1
    ) AS last_no,
    coalesce(outbox_shard.xmax::text::bigint, 0) AS last_locker
FROM (SELECT generate_series(0, 15)::smallint AS shard) AS each
LEFT JOIN {schema}.outbox_shard ON outbox_shard.shard = each.shard
LEFT JOIN LATERAL (
    SELECT mark.through, mark.published_at
    FROM {schema}.outbox_published AS mark
    WHERE mark.shard = each.shard
    ORDER BY mark.through DESC
    LIMIT 1
) AS newest ON true
ORDER BY each.shard
