-- How many messages are not in Kafka yet, how many of these the marks have passed (waiting), how many are parked, and
-- of how many keys. Each count stops at :most, so that the cost does not grow with the backlog; it does not grow with
-- what is published either, for each shard is read from its newest mark on. Messages of writers that were given up on
-- are no affair of the marks: they are counted once they have been collected.
--
-- And what the relays still have to do: given-up writers that have ended and whose messages nobody has collected, and
-- for how long the oldest mark has not been compared with the rows. The newest mark of a shard is left for later by
-- whoever compares them. A transaction that began after the last one that ended is taken for open.
WITH newest AS MATERIALIZED (
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
unclaimed AS (
    SELECT count(*) AS messages
    FROM (
        SELECT
        FROM newest
        CROSS JOIN LATERAL (
            SELECT
            FROM {schema}.outbox
            WHERE outbox.shard = newest.shard
                AND outbox.sequence_no > newest.through
                AND outbox.transaction_id NOT IN (SELECT late.transaction_id FROM late)
            ORDER BY outbox.sequence_no
            LIMIT %(most)s
        ) AS message
        LIMIT %(most)s
    ) AS message
),
waiting AS (
    SELECT count(*) AS messages
    FROM (SELECT FROM {schema}.outbox_pending WHERE state = 'waiting' LIMIT %(most)s) AS message
),
parked AS (
    SELECT count(*) AS messages, count(DISTINCT message.key_hash) AS keys
    FROM (SELECT key_hash FROM {schema}.outbox_pending WHERE state = 'parked' LIMIT %(most)s) AS message
)
SELECT
    least(unclaimed.messages + waiting.messages, %(most)s) AS unpublished_messages,
    waiting.messages AS waiting_messages,
    parked.messages AS parked_messages,
    parked.keys AS parked_keys,
    (
        SELECT count(*)
        FROM {schema}.outbox_unordered
        WHERE collected_at IS NULL AND pg_visible_in_snapshot(transaction_id, pg_current_snapshot())
    ) AS uncollected_writers,
    (
        SELECT coalesce(max(extract(epoch FROM clock_timestamp() - unchecked.published_at)), 0)
        FROM newest
        CROSS JOIN LATERAL (
            SELECT mark.published_at
            FROM {schema}.outbox_published AS mark
            WHERE mark.shard = newest.shard
                AND mark.through > coalesce((
                    SELECT greatest(reconciled.checked_through, reconciled.thinned_through)
                    FROM {schema}.outbox_reconciled AS reconciled
                    WHERE reconciled.shard = newest.shard
                ), 0)
                AND mark.through < newest.through
            ORDER BY mark.through
            LIMIT 1
        ) AS unchecked
    )::float8 AS unreconciled_seconds
FROM unclaimed
CROSS JOIN waiting
CROSS JOIN parked
