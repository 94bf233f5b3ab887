-- Tells whether a canary is on its way already, or parked. Above the mark of its shard it is looked for among the
-- newest :most messages: with a backlog behind it that is larger, a second relay adds one of its own.
SELECT
    EXISTS (
        SELECT
        FROM (
            SELECT outbox.aggregate_type, outbox.aggregate_id
            FROM {schema}.outbox
            WHERE outbox.shard = (hashtextextended(%(aggregate_type)s || ':' || %(aggregate_id)s, 0) & 15)::smallint
                AND outbox.sequence_no > coalesce((
                    SELECT mark.through
                    FROM {schema}.outbox_published AS mark
                    WHERE mark.shard = (hashtextextended(%(aggregate_type)s || ':' || %(aggregate_id)s, 0) & 15)::smallint
                    ORDER BY mark.through DESC
                    LIMIT 1
                ), 0)
            ORDER BY outbox.sequence_no DESC
            LIMIT %(most)s
        ) AS newest
        WHERE newest.aggregate_type = %(aggregate_type)s AND newest.aggregate_id = %(aggregate_id)s
    )
    OR EXISTS (
        SELECT
        FROM {schema}.outbox_pending
        WHERE key_hash = hashtextextended(%(aggregate_type)s || ':' || %(aggregate_id)s, 0)
            AND aggregate_type = %(aggregate_type)s
    )
