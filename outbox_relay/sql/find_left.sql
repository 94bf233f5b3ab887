-- Whether anything up to a number is still to be published: above the marks, waiting, or of a writer that was given up
-- on and has ended since, whose messages nobody has collected yet.
SELECT
    (
        SELECT true
        FROM {schema}.outbox_shard
        CROSS JOIN LATERAL (
            SELECT outbox.sequence_no
            FROM {schema}.outbox
            WHERE outbox.shard = outbox_shard.shard
                AND outbox.sequence_no > coalesce((
                    SELECT mark.through
                    FROM {schema}.outbox_published AS mark
                    WHERE mark.shard = outbox_shard.shard
                    ORDER BY mark.through DESC
                    LIMIT 1
                ), 0)
                AND outbox.sequence_no <= %(through)s
            ORDER BY outbox.sequence_no
            LIMIT 1
        ) AS unpublished
        LIMIT 1
    ) IS TRUE
    OR EXISTS (SELECT FROM {schema}.outbox_pending WHERE state = 'waiting')
    OR EXISTS (
        SELECT
        FROM {schema}.outbox_unordered
        WHERE collected_at IS NULL AND pg_visible_in_snapshot(transaction_id, pg_current_snapshot())
    )
