-- Joins neighbouring marks of a shard that were written in the same :slot_seconds: the last of them stays and counts
-- for all. Remembers how far that came, and commits, in one message: to the horizon this transaction looks like a
-- writer, so nobody may have to wait for its client.
--
-- No shard is locked: lanes read the newest mark of a shard only, which is not among these. Whoever has changed a mark
-- meanwhile is waited for, and the sums are made of what is deleted then. There is no max() of xid8 before PostgreSQL
-- 15.
WITH joined AS MATERIALIZED (
    SELECT
        slot.shard,
        slot.through,
        min(slot.through) FILTER (WHERE slot.is_last)
            OVER (PARTITION BY slot.shard ORDER BY slot.through DESC) AS last_no
    FROM (
        SELECT
            mark.shard,
            mark.through,
            floor(extract(epoch FROM mark.published_at) / %(slot_seconds)s)
            IS DISTINCT FROM lag(floor(extract(epoch FROM mark.published_at) / %(slot_seconds)s))
                OVER (PARTITION BY mark.shard ORDER BY mark.through DESC)
            AS is_last
        FROM unnest(%(shards)s::smallint[], %(from_nos)s::bigint[], %(throughs)s::bigint[])
            AS stretch (shard, from_no, through)
        JOIN {schema}.outbox_published AS mark
            ON mark.shard = stretch.shard
            AND mark.through > stretch.from_no
            AND mark.through <= stretch.through
    ) AS slot
),
inner_marks AS (
    DELETE FROM {schema}.outbox_published AS mark
    USING joined
    WHERE mark.shard = joined.shard AND mark.through = joined.through AND joined.through < joined.last_no
    RETURNING joined.shard, joined.last_no, mark.messages, mark.checksum, mark.before_xid
),
total AS (
    SELECT
        shard,
        last_no,
        sum(messages) AS messages,
        bit_xor(checksum) AS checksum,
        max(before_xid::text::bigint)::text::xid8 AS before_xid
    FROM inner_marks
    GROUP BY shard, last_no
)
UPDATE {schema}.outbox_published AS mark
SET messages = least(mark.messages + total.messages, 9223372036854775807),
    checksum = mark.checksum # total.checksum,
    before_xid = greatest(mark.before_xid, total.before_xid)
FROM total
WHERE mark.shard = total.shard AND mark.through = total.last_no;
INSERT INTO {schema}.outbox_reconciled (shard, thinned_through)
SELECT *
FROM unnest(%(shards)s::smallint[], %(throughs)s::bigint[])
ON CONFLICT (shard) DO UPDATE
SET thinned_through = excluded.thinned_through;
COMMIT
