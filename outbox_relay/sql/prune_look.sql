-- What may go next: for each shard, behind the number that it has come to, the marks that are older than the retention,
-- up to the first that is not and below :before. One line a shard that has some.
--
-- A batch is about :messages, by what the marks have counted, and ends with a mark. A mark that counted more is pruned
-- in parts, the first of which ends at :until_no. Lower numbers go first, for they lie side by side. Hardly a mark
-- counts nothing, so no more of them are read than a batch takes. Where the mark at :after_no is gone, somebody else
-- has pruned: the shard begins with the mark below it.
WITH old AS MATERIALIZED (
    SELECT
        place.shard,
        place.after_no,
        mark.through,
        mark.messages,
        sum(mark.messages) OVER (ORDER BY mark.through, place.shard) AS messages_so_far
    FROM (
        SELECT
            outbox_shard.shard,
            coalesce((
                SELECT mark.through
                FROM {schema}.outbox_published AS mark
                WHERE mark.shard = outbox_shard.shard AND mark.through <= known.after_no
                ORDER BY mark.through DESC
                LIMIT 1
            ), 0) AS after_no
        FROM {schema}.outbox_shard
        LEFT JOIN unnest(%(shards)s::smallint[], %(after_nos)s::bigint[]) AS known (shard, after_no) USING (shard)
    ) AS place
    CROSS JOIN LATERAL (
        SELECT next.through, next.messages, bool_and(next.is_old) OVER (ORDER BY next.through) AS are_old
        FROM (
            SELECT
                mark.through,
                mark.messages,
                mark.published_at < now() - make_interval(secs => %(older_than_seconds)s) AS is_old
            FROM {schema}.outbox_published AS mark
            WHERE mark.shard = place.shard AND mark.through > place.after_no AND mark.through < %(before)s
            ORDER BY mark.through
            LIMIT %(messages)s / 16 + 1
        ) AS next
    ) AS mark
    WHERE mark.are_old
),
chosen AS (
    SELECT old.shard, old.after_no, max(old.through) AS through, sum(old.messages) AS messages
    FROM old
    WHERE old.messages_so_far <= %(messages)s OR old.messages_so_far = old.messages
    GROUP BY old.shard, old.after_no
)
SELECT
    chosen.shard,
    chosen.after_no,
    coalesce(
        CASE
            WHEN chosen.messages > %(messages)s THEN (
                SELECT outbox.sequence_no
                FROM {schema}.outbox
                WHERE outbox.shard = chosen.shard
                    AND outbox.sequence_no > chosen.after_no
                    AND outbox.sequence_no < chosen.through
                ORDER BY outbox.sequence_no
                OFFSET %(messages)s - 1
                LIMIT 1
            )
        END,
        chosen.through
    ) AS until_no,
    chosen.through
FROM chosen
ORDER BY chosen.shard
