-- Remembers writers that are given up on, before anything overtakes their messages. Several relays may agree.
--
-- No mark is above the horizon that such a writer has held up, so all of its numbers are above every mark that there
-- is.
INSERT INTO {schema}.outbox_unordered (transaction_id, from_no)
SELECT
    unnest(%(xids)s::text[])::xid8,
    (
        SELECT coalesce(max(newest.through), 0)
        FROM {schema}.outbox_shard
        CROSS JOIN LATERAL (
            SELECT mark.through
            FROM {schema}.outbox_published AS mark
            WHERE mark.shard = outbox_shard.shard
            ORDER BY mark.through DESC
            LIMIT 1
        ) AS newest
    )
ON CONFLICT DO NOTHING
