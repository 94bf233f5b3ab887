-- Takes messages of one writer that was given up on and has ended into outbox_pending, those of the next :numbers
-- numbers, and remembers how far it came; no row comes back when there is no such writer. The range is read by its
-- numbers, for no index has transaction ids; it begins at the next message, for numbers leap where a partition was
-- opened. It ends at the last number drawn: the writer draws no more.
--
-- No shard is locked: no mark counts these messages, so whoever holds the shard leaves them alone. A transaction id
-- that this cluster has not given away yet is from another cluster, whose dump was restored here; its writer has ended.
WITH writer AS MATERIALIZED (
    SELECT
        chosen.transaction_id,
        coalesce(chosen.collected_through, chosen.from_no) AS after_no,
        chosen.to_no
    FROM {schema}.outbox_unordered AS chosen
    WHERE chosen.collected_at IS NULL
        AND (
            pg_visible_in_snapshot(chosen.transaction_id, pg_current_snapshot())
            OR chosen.transaction_id::text::bigint >= (
                SELECT newest.xid + mod(3 + age('3'::xid)::bigint - mod(newest.xid, 4294967296) + 4294967296, 4294967296)
                FROM (SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS xid) AS newest
            )
        )
    ORDER BY chosen.transaction_id
    LIMIT 1
    FOR UPDATE SKIP LOCKED
),
span AS MATERIALIZED (
    SELECT
        writer.transaction_id,
        writer.after_no,
        coalesce(writer.to_no, drawn.last_value) AS to_no,
        least(next.sequence_no - 1 + %(numbers)s, coalesce(writer.to_no, drawn.last_value)) AS through
    FROM writer
    CROSS JOIN {schema}.outbox_sequence_no_seq AS drawn
    CROSS JOIN LATERAL (
        SELECT min(first.sequence_no) AS sequence_no
        FROM {schema}.outbox_shard
        CROSS JOIN LATERAL (
            SELECT outbox.sequence_no
            FROM {schema}.outbox
            WHERE outbox.shard = outbox_shard.shard AND outbox.sequence_no > writer.after_no
            ORDER BY outbox.sequence_no
            LIMIT 1
        ) AS first
    ) AS next
),
collected AS (
    INSERT INTO {schema}.outbox_pending (
        shard, sequence_no, key_hash, aggregate_type, state, reason_code, reason, is_unordered
    )
    SELECT
        found.shard,
        found.sequence_no,
        hashtextextended(found.aggregate_type || ':' || found.aggregate_id, 0),
        found.aggregate_type,
        'waiting',
        'late',
        'its transaction stayed open beyond the ordering timeout',
        true
    FROM span
    CROSS JOIN {schema}.outbox_shard
    CROSS JOIN LATERAL (
        SELECT outbox.shard, outbox.sequence_no, outbox.aggregate_type, outbox.aggregate_id
        FROM {schema}.outbox
        WHERE outbox.shard = outbox_shard.shard
            AND outbox.sequence_no > span.after_no
            AND outbox.sequence_no <= span.through
            AND outbox.transaction_id = span.transaction_id
        OFFSET 0
    ) AS found
    ON CONFLICT DO NOTHING
    RETURNING 1
)
UPDATE {schema}.outbox_unordered
SET to_no = span.to_no,
    collected_through = span.through,
    collected_at = CASE WHEN span.through >= span.to_no THEN clock_timestamp() END
FROM span
WHERE outbox_unordered.transaction_id = span.transaction_id
RETURNING (SELECT count(*) FROM collected) AS messages;
COMMIT
