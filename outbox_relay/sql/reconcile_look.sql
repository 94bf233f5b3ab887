-- Compares, for each of the :shards, the next marks above its position with the rows: one line a shard that has such
-- marks.
--
-- The marks of a stretch are compared as one, by the sum of what they counted, so that a row costs one step of an
-- index scan however few rows a mark has; where that differs, reconcile_differences.sql looks at each. A stretch
-- begins at the mark at or below the position, which may have been thinned away since, and at 0 below the lowest mark.
-- It ends before the first mark that is younger than :older_than_seconds, before that which begins at :limit or
-- higher, and after :marks marks or :messages messages. A mark from the future says nothing about its age: clocks
-- differ between servers.
--
-- No row is read: the primary key has all that is asked for. The count ends with the first row too many.
WITH stretch AS MATERIALIZED (
    SELECT
        place.shard,
        place.from_no,
        taken.through,
        taken.messages,
        taken.checksum,
        taken.has_more
    FROM (
        SELECT
            given.shard,
            coalesce((
                SELECT below.through
                FROM {schema}.outbox_published AS below
                WHERE below.shard = given.shard AND below.through <= given.position
                ORDER BY below.through DESC
                LIMIT 1
            ), 0) AS from_no,
            CASE
                WHEN %(leaves_newest)s THEN (
                    SELECT newest.through
                    FROM {schema}.outbox_published AS newest
                    WHERE newest.shard = given.shard
                    ORDER BY newest.through DESC
                    LIMIT 1
                )
            END AS left_no,
            to_timestamp(
                floor((extract(epoch FROM clock_timestamp())::float8 - %(older_than_seconds)s) / %(slot_seconds)s)
                * %(slot_seconds)s
            ) AS recent_since
        FROM unnest(%(shards)s::smallint[], %(positions)s::bigint[]) AS given (shard, position)
    ) AS place
    CROSS JOIN LATERAL (
        SELECT
            max(ready.through) FILTER (WHERE ready.is_taken) AS through,
            sum(ready.messages) FILTER (WHERE ready.is_taken) AS messages,
            bit_xor(ready.checksum) FILTER (WHERE ready.is_taken) AS checksum,
            count(*) = %(marks)s OR NOT bool_and(ready.is_taken) AS has_more
        FROM (
            SELECT
                next.through,
                next.messages,
                next.checksum,
                coalesce(sum(next.messages) OVER before, 0) < %(messages)s AS is_taken,
                coalesce(max(next.through) OVER before, place.from_no) < %(limit)s
                AND NOT bool_or(next.is_recent) OVER (ORDER BY next.through) AS is_ready
            FROM (
                SELECT
                    mark.through,
                    mark.messages,
                    mark.checksum,
                    mark.published_at BETWEEN place.recent_since AND clock_timestamp()
                    OR mark.through >= place.left_no IS TRUE AS is_recent
                FROM {schema}.outbox_published AS mark
                WHERE mark.shard = place.shard AND mark.through > place.from_no
                ORDER BY mark.through
                LIMIT %(marks)s
            ) AS next
            WINDOW before AS (ORDER BY next.through ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
        ) AS ready
        WHERE ready.is_ready
    ) AS taken
    WHERE taken.through IS NOT NULL
)
SELECT
    stretch.shard,
    stretch.from_no,
    stretch.through,
    found.messages AS found_messages,
    found.messages = stretch.messages AND found.checksum = stretch.checksum AS is_equal,
    stretch.has_more
FROM stretch
CROSS JOIN LATERAL (
    SELECT count(*) AS messages, coalesce(bit_xor(counted.sequence_no), 0) AS checksum
    FROM (
        SELECT outbox.sequence_no
        FROM {schema}.outbox
        WHERE outbox.shard = stretch.shard
            AND outbox.sequence_no > stretch.from_no
            AND outbox.sequence_no <= stretch.through
        ORDER BY outbox.sequence_no
        LIMIT least(greatest(stretch.messages, 0), 1000000000)::bigint + 1
    ) AS counted
) AS found
ORDER BY stretch.shard
