-- How many marks there are that nobody has thinned yet, counted up to :most.
SELECT count(*) AS marks
FROM (
    SELECT
    FROM {schema}.outbox_shard
    LEFT JOIN {schema}.outbox_reconciled AS reconciled ON reconciled.shard = outbox_shard.shard
    CROSS JOIN LATERAL (
        SELECT
        FROM {schema}.outbox_published AS mark
        WHERE mark.shard = outbox_shard.shard AND mark.through > coalesce(reconciled.thinned_through, 0)
        ORDER BY mark.through DESC
        LIMIT %(most)s
    ) AS unthinned
    LIMIT %(most)s
) AS unthinned
