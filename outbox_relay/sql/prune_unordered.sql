-- Removes the records of overtaken transactions that nobody needs any more, and gives their number.
--
-- A message of such a transaction must not be published without the header "unordered". So a record goes only when the
-- transaction has ended before this statement's snapshot, which then shows all of its messages, and none of them is
-- unpublished or parked. There is no index to find them by: with more than :most open messages, no record goes.
WITH old AS MATERIALIZED (
    SELECT transaction_id
    FROM {schema}.outbox_unordered
    WHERE recorded_at < now() - make_interval(secs => %(older_than_seconds)s)
        AND transaction_id < pg_snapshot_xmin(pg_current_snapshot())
    ORDER BY transaction_id
    LIMIT %(most)s
),
open AS MATERIALIZED (
    SELECT message.transaction_id
    FROM (
        SELECT outbox.transaction_id
        FROM {schema}.outbox
        WHERE outbox.published_at IS NULL AND outbox.parked_at IS NULL
        UNION ALL
        SELECT outbox.transaction_id
        FROM {schema}.outbox
        WHERE outbox.parked_at IS NOT NULL
    ) AS message
    WHERE EXISTS (SELECT FROM old)
    LIMIT %(most)s + 1
),
pruned AS (
    DELETE FROM {schema}.outbox_unordered
    WHERE transaction_id IN (SELECT old.transaction_id FROM old)
        AND transaction_id NOT IN (SELECT open.transaction_id FROM open)
        AND (SELECT count(*) FROM open) <= %(most)s
    RETURNING 1
)
SELECT count(*) FROM pruned
