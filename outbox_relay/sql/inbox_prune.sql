-- Removes a consumer's oldest records and gives their number; rows that another pruner has taken are left to it.
--
-- The rows are fetched by the places where they were found, so that a batch costs the same in a table of any size;
-- the table's oid tells apart the places of a table that is partitioned.
WITH old AS MATERIALIZED (
    SELECT tableoid, ctid
    FROM {schema}.inbox_message
    WHERE consumer = %(consumer)s AND received_at < now() - %(older_than)s::interval
    ORDER BY received_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
),
pruned AS (
    DELETE FROM {schema}.inbox_message
    WHERE ctid = ANY (ARRAY(SELECT old.ctid FROM old))
        AND (tableoid, ctid) IN (SELECT old.tableoid, old.ctid FROM old)
    RETURNING 1
)
SELECT count(*) FROM pruned
