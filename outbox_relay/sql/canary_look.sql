-- Tells whether a canary is on its way already, or parked. It is looked for among the newest :most messages that wait in
-- its shard: with a backlog behind it that is larger, a second relay adds one of its own.
SELECT
    EXISTS (
        SELECT
        FROM (
            SELECT outbox.aggregate_type, outbox.aggregate_id
            FROM {schema}.outbox
            WHERE outbox.shard = (hashtextextended(%(aggregate_type)s || ':' || %(aggregate_id)s, 0) & 15)::smallint
                AND outbox.published_at IS NULL
                AND outbox.parked_at IS NULL
            ORDER BY outbox.sequence_no DESC
            LIMIT %(most)s
        ) AS newest
        WHERE newest.aggregate_type = %(aggregate_type)s AND newest.aggregate_id = %(aggregate_id)s
    )
    OR EXISTS (
        SELECT
        FROM {schema}.outbox
        WHERE shard = (hashtextextended(%(aggregate_type)s || ':' || %(aggregate_id)s, 0) & 15)::smallint
            AND aggregate_type = %(aggregate_type)s
            AND aggregate_id = %(aggregate_id)s
            AND parked_at IS NOT NULL
    )
