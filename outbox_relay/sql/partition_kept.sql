-- The first number of the oldest partition that is kept as a whole: it was closed within the retention, or a message in
-- it was published within it. Old messages below that number stand in partitions that others keep. A partition in which
-- something stays young or unpublished for longer than its period loses the others, too.
SELECT bounded.first_no
FROM (
    SELECT first_no, lead(first_no) OVER (ORDER BY number) AS end_no, closed_at, open_for
    FROM {schema}.outbox_partition
) AS bounded
CROSS JOIN LATERAL (SELECT make_interval(secs => %(older_than_seconds)s) AS older_than) AS wanted
WHERE bounded.closed_at IS NULL
    OR bounded.closed_at >= now() - wanted.older_than
    OR (
        bounded.closed_at >= now() - wanted.older_than - bounded.open_for
        AND NOT {schema}.outbox_numbers_are_old(bounded.first_no, bounded.end_no, wanted.older_than)
    )
ORDER BY bounded.first_no
LIMIT 1
