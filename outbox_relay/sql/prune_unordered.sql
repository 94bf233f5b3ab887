-- Removes the records of writers that were given up on, once they are collected and none of their messages is left, and
-- returns how many. Until then a record says that no mark has counted these messages.
--
-- Pruning has to come by first: above the lowest mark of a shard there may be as many messages as the outbox has, and
-- no index has their writers. Below it only those are left that somebody still needs.
WITH gone AS MATERIALIZED (
    SELECT late.transaction_id
    FROM {schema}.outbox_unordered AS late
    WHERE late.collected_at IS NOT NULL
        AND NOT EXISTS (
            SELECT
            FROM {schema}.outbox_shard
            CROSS JOIN LATERAL (
                SELECT coalesce((
                    SELECT mark.through
                    FROM {schema}.outbox_published AS mark
                    WHERE mark.shard = outbox_shard.shard
                    ORDER BY mark.through
                    LIMIT 1
                ), 0) AS through
            ) AS lowest
            WHERE (
                SELECT true
                FROM {schema}.outbox
                WHERE outbox.shard = outbox_shard.shard
                    AND outbox.sequence_no > greatest(late.from_no, lowest.through)
                    AND outbox.sequence_no <= late.to_no
                ORDER BY outbox.sequence_no
                LIMIT 1
            )
            OR (
                SELECT true
                FROM {schema}.outbox
                WHERE outbox.shard = outbox_shard.shard
                    AND outbox.sequence_no > late.from_no
                    AND outbox.sequence_no <= least(late.to_no, lowest.through)
                    AND outbox.transaction_id = late.transaction_id
                ORDER BY outbox.sequence_no
                LIMIT 1
            )
        )
    ORDER BY late.transaction_id
    LIMIT %(most)s
),
pruned AS (
    DELETE FROM {schema}.outbox_unordered
    WHERE transaction_id IN (SELECT gone.transaction_id FROM gone)
    RETURNING 1
)
SELECT count(*) FROM pruned
