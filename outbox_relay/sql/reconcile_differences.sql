-- The intervals of a stretch of one shard in which there are other rows than their mark counted, with what is there
-- now; all of its intervals if :is_thorough. An interval is what lies between two neighbouring marks.
--
-- Rows of writers that were given up on are left out: no mark counts them, they come through outbox_pending. A row is
-- surely not counted if its transaction had not ended when the mark was written. An id that this cluster has not given
-- away yet is from another one, whose dump was restored here, and says nothing.
WITH between_marks AS MATERIALIZED (
    SELECT
        mark.shard,
        lag(mark.through, 1, %(from_no)s::bigint) OVER (ORDER BY mark.through) AS from_no,
        mark.through,
        mark.messages,
        mark.checksum,
        mark.before_xid
    FROM {schema}.outbox_published AS mark
    WHERE mark.shard = %(shard)s AND mark.through > %(from_no)s AND mark.through <= %(through)s
),
different AS MATERIALIZED (
    SELECT between_marks.*
    FROM between_marks
    CROSS JOIN LATERAL (
        SELECT count(*) AS messages, coalesce(bit_xor(counted.sequence_no), 0) AS checksum
        FROM (
            SELECT outbox.sequence_no
            FROM {schema}.outbox
            WHERE outbox.shard = between_marks.shard
                AND outbox.sequence_no > between_marks.from_no
                AND outbox.sequence_no <= between_marks.through
            ORDER BY outbox.sequence_no
            LIMIT least(greatest(between_marks.messages, 0), 1000000000) + 1
        ) AS counted
    ) AS found
    WHERE %(is_thorough)s
        OR found.messages <> between_marks.messages
        OR found.checksum <> between_marks.checksum
),
late AS MATERIALIZED (
    SELECT transaction_id, from_no, to_no
    FROM {schema}.outbox_unordered
    WHERE from_no < %(through)s AND (to_no IS NULL OR to_no > %(from_no)s)
)
SELECT
    different.shard,
    different.from_no,
    different.through,
    different.messages,
    different.checksum,
    different.before_xid::text,
    found.*
FROM different
CROSS JOIN LATERAL (
    SELECT
        count(*) AS found_messages,
        coalesce(bit_xor(looked.sequence_no), 0) AS found_checksum,
        count(*) FILTER (WHERE looked.is_uncounted) AS uncounted_messages,
        coalesce(bit_xor(looked.sequence_no) FILTER (WHERE looked.is_uncounted), 0) AS uncounted_checksum
    FROM (
        SELECT
            outbox.sequence_no,
            outbox.transaction_id >= different.before_xid
            AND outbox.transaction_id < pg_snapshot_xmax(pg_current_snapshot()) AS is_uncounted
        FROM {schema}.outbox
        WHERE outbox.shard = different.shard
            AND outbox.sequence_no > different.from_no
            AND outbox.sequence_no <= different.through
            AND (
                outbox.transaction_id NOT IN (SELECT late.transaction_id FROM late)
                OR NOT EXISTS (
                    SELECT
                    FROM late
                    WHERE late.transaction_id = outbox.transaction_id
                        AND outbox.sequence_no > late.from_no
                        AND (late.to_no IS NULL OR outbox.sequence_no <= late.to_no)
                )
            )
    ) AS looked
) AS found
ORDER BY different.through
