-- The next message of each shard, and of each aggregate type the first one that waits there although its mark has
-- passed it: if one of them is away, the others do not stand behind it. Of each comes how old it is, and for how long
-- it has been waiting. Of the types at most 1,000 are looked up, by going from one to the next in the index. A message
-- that waits and was deleted is as old as its entry.
WITH RECURSIVE newest AS MATERIALIZED (
    SELECT
        each.shard,
        coalesce((
            SELECT mark.through
            FROM {schema}.outbox_published AS mark
            WHERE mark.shard = each.shard
            ORDER BY mark.through DESC
            LIMIT 1
        ), 0) AS through
    FROM (SELECT generate_series(0, 15)::smallint AS shard) AS each
),
late AS MATERIALIZED (
    SELECT transaction_id
    FROM {schema}.outbox_unordered
    WHERE to_no IS NULL OR to_no > (SELECT min(through) FROM newest)
),
kind AS (
    SELECT newest.shard, first.type_hash
    FROM newest
    CROSS JOIN LATERAL (
        SELECT hashtextextended(pending.aggregate_type, 0) AS type_hash
        FROM {schema}.outbox_pending AS pending
        WHERE pending.shard = newest.shard AND pending.state = 'waiting'
        ORDER BY hashtextextended(pending.aggregate_type, 0)
        LIMIT 1
    ) AS first
    UNION ALL
    SELECT kind.shard, next.type_hash
    FROM kind
    CROSS JOIN LATERAL (
        SELECT hashtextextended(pending.aggregate_type, 0) AS type_hash
        FROM {schema}.outbox_pending AS pending
        WHERE pending.shard = kind.shard
            AND pending.state = 'waiting'
            AND hashtextextended(pending.aggregate_type, 0) > kind.type_hash
        ORDER BY hashtextextended(pending.aggregate_type, 0)
        LIMIT 1
    ) AS next
),
head AS (
    SELECT newest.shard, next.*
    FROM newest
    CROSS JOIN LATERAL (
        SELECT
            outbox.sequence_no,
            'unpublished' AS state,
            outbox.aggregate_type,
            outbox.created_at,
            NULL::timestamptz AS since
        FROM {schema}.outbox
        WHERE outbox.shard = newest.shard
            AND outbox.sequence_no > newest.through
            AND outbox.transaction_id NOT IN (SELECT late.transaction_id FROM late)
        ORDER BY outbox.sequence_no
        LIMIT 1
    ) AS next
    UNION ALL
    SELECT looked_up.shard, first.*
    FROM (SELECT kind.shard, kind.type_hash FROM kind LIMIT 1000) AS looked_up
    CROSS JOIN LATERAL (
        SELECT
            pending.sequence_no,
            pending.state,
            pending.aggregate_type,
            coalesce(outbox.created_at, pending.since),
            pending.since
        FROM {schema}.outbox_pending AS pending
        LEFT JOIN {schema}.outbox ON outbox.shard = pending.shard AND outbox.sequence_no = pending.sequence_no
        WHERE pending.shard = looked_up.shard
            AND pending.state = 'waiting'
            AND hashtextextended(pending.aggregate_type, 0) = looked_up.type_hash
        ORDER BY pending.sequence_no
        LIMIT 1
    ) AS first
)
SELECT
    head.shard,
    head.sequence_no,
    head.state,
    head.aggregate_type,
    extract(epoch FROM clock_timestamp() - head.created_at)::float8 AS age_seconds,
    coalesce(extract(epoch FROM clock_timestamp() - head.since), 0)::float8 AS waiting_seconds
FROM head
ORDER BY head.shard, head.state, head.sequence_no
