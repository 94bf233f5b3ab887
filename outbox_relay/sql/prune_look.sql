-- What the next :messages rows by id, up to :before, are: up to which id, how many, how many of them may be pruned, and
-- whether one was created within the retention. Ids are drawn in the order of time, so that behind a recent message
-- nothing is old.
--
-- A created_at in the future is not recent: the writer gave it, and it says nothing about when the id was drawn.
SELECT
    max(looked.id) AS through,
    count(*) AS messages,
    count(*) FILTER (
        WHERE looked.published_at < now() - make_interval(secs => %(older_than_seconds)s)
            AND looked.parked_at IS NULL
    ) AS old,
    coalesce(bool_or(
        looked.created_at BETWEEN now() - make_interval(secs => %(older_than_seconds)s) AND clock_timestamp()
    ), false) AS is_recent
FROM (
    SELECT outbox.id, outbox.created_at, outbox.published_at, outbox.parked_at
    FROM {schema}.outbox
    WHERE outbox.id > %(after)s::bigint AND outbox.id < %(before)s::bigint
    ORDER BY outbox.id
    LIMIT %(messages)s
) AS looked
