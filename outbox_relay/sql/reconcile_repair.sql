-- Takes skipped messages of one interval into outbox_pending and lets its mark say what is there now, in one message
-- with the lock on the shard and the COMMIT: to the horizon this transaction looks like a writer, so nobody may have
-- to wait for its client. Without :is_whole only messages are taken that the mark surely did not count.
--
-- Nothing happens if the interval is not as it was when it was looked at: somebody has repaired, thinned or pruned it.
-- The second statement sees all that the previous holder of the shard has committed.
--
-- An interval of more than :most messages is cut: its lower part gets a mark of its own, and the mark above keeps what
-- is not accounted for yet, so that whoever goes on, also after a crash, finds the rest. The new before_xid says that
-- whatever is not here now was not counted.
SELECT outbox_shard.shard
FROM {schema}.outbox_shard
WHERE outbox_shard.shard = %(shard)s
FOR UPDATE;
WITH repaired AS MATERIALIZED (
    SELECT mark.shard, mark.through, mark.published_at, mark.messages, mark.checksum, mark.before_xid
    FROM {schema}.outbox_published AS mark
    WHERE mark.shard = %(shard)s
        AND mark.through = %(through)s
        AND mark.messages = %(messages)s
        AND mark.checksum = %(checksum)s
        AND mark.before_xid = %(before_xid)s::xid8
        AND coalesce((
            SELECT below.through
            FROM {schema}.outbox_published AS below
            WHERE below.shard = mark.shard AND below.through < mark.through
            ORDER BY below.through DESC
            LIMIT 1
        ), 0) = %(from_no)s
    FOR UPDATE
),
late AS MATERIALIZED (
    SELECT transaction_id, from_no, to_no
    FROM {schema}.outbox_unordered
    WHERE from_no < %(through)s AND (to_no IS NULL OR to_no > %(from_no)s)
),
part AS MATERIALIZED (
    SELECT looked.*
    FROM repaired
    CROSS JOIN LATERAL (
        SELECT
            outbox.shard,
            outbox.sequence_no,
            hashtextextended(outbox.aggregate_type || ':' || outbox.aggregate_id, 0) AS key_hash,
            outbox.aggregate_type,
            outbox.transaction_id >= repaired.before_xid
            AND outbox.transaction_id < pg_snapshot_xmax(pg_current_snapshot()) AS is_uncounted
        FROM {schema}.outbox
        WHERE outbox.shard = repaired.shard
            AND outbox.sequence_no > %(from_no)s
            AND outbox.sequence_no <= repaired.through
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
        ORDER BY outbox.sequence_no
        LIMIT %(most)s
    ) AS looked
),
total AS MATERIALIZED (
    SELECT
        CASE WHEN count(part.sequence_no) = %(most)s THEN max(part.sequence_no) ELSE repaired.through END AS through,
        count(part.sequence_no) AS messages,
        coalesce(bit_xor(part.sequence_no), 0) AS checksum,
        count(part.sequence_no) FILTER (WHERE NOT part.is_uncounted) AS counted_messages,
        coalesce(bit_xor(part.sequence_no) FILTER (WHERE NOT part.is_uncounted), 0) AS counted_checksum
    FROM repaired
    LEFT JOIN part ON true
    GROUP BY repaired.through
),
pending AS (
    INSERT INTO {schema}.outbox_pending (
        shard, sequence_no, key_hash, aggregate_type, state, reason_code, reason, is_unordered
    )
    SELECT
        part.shard,
        part.sequence_no,
        part.key_hash,
        part.aggregate_type,
        'waiting',
        'skipped',
        CASE
            WHEN part.is_uncounted THEN 'it appeared below the marks, after they had passed its number'
            ELSE 'its mark counted other messages than there are, so that it may have been skipped'
        END,
        true
    FROM part
    WHERE part.is_uncounted OR %(is_whole)s
    ON CONFLICT DO NOTHING
    RETURNING 1
),
cut AS (
    INSERT INTO {schema}.outbox_published (shard, through, published_at, messages, checksum)
    SELECT repaired.shard, total.through, repaired.published_at, total.messages, total.checksum
    FROM repaired
    CROSS JOIN total
    WHERE total.through < repaired.through
)
UPDATE {schema}.outbox_published AS mark
SET messages = CASE
        WHEN total.through = repaired.through THEN total.messages
        WHEN %(is_whole)s THEN 0
        ELSE repaired.messages - total.counted_messages
    END,
    checksum = CASE
        WHEN total.through = repaired.through THEN total.checksum
        WHEN %(is_whole)s THEN 0
        ELSE repaired.checksum # total.counted_checksum
    END,
    before_xid = CASE
        WHEN total.through = repaired.through
            THEN greatest(repaired.before_xid, pg_snapshot_xmax(pg_current_snapshot()))
        ELSE repaired.before_xid
    END
FROM repaired
CROSS JOIN total
WHERE mark.shard = repaired.shard AND mark.through = repaired.through
RETURNING
    total.through AS repaired_through,
    (SELECT count(*) FROM pending) AS skipped_messages,
    mark.messages,
    mark.checksum;
COMMIT
