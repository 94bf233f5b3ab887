-- How many partitions there are, how many of them lie ahead, and for how long the next one should have been open.
SELECT
    count(*) AS partitions,
    count(*) FILTER (WHERE opened_at IS NULL) AS ahead,
    coalesce(
        extract(epoch FROM clock_timestamp() - max(opened_at + open_for) FILTER (WHERE closed_at IS NULL)), 0
    )::float8 AS overdue_seconds
FROM {schema}.outbox_partition
