-- Removes messages that were published long enough ago, and commits, in one message: to the horizon this transaction
-- looks like a writer, so nobody may have to wait for its client. Of each shard, those above :after_no up to :until_no
-- may go; the marks up to :through have counted them, and perhaps others above.
--
-- Nothing is removed in a shard where the marks have counted other rows than there are, for one may have been skipped:
-- it has to be reconciled first. After that rows may be missing, for somebody may delete published messages. What is
-- pending stays, and what belongs to a writer that was given up on and is not collected.
--
-- The marks of the range, and the one at :after_no, become one at :until_no that counts what is left. So the newest
-- mark of a shard is never lost, and the marks agree with the rows whenever a relay crashes.
WITH chosen AS MATERIALIZED (
    SELECT *
    FROM unnest(
        %(shards)s::smallint[],
        %(after_nos)s::bigint[],
        %(until_nos)s::bigint[],
        %(throughs)s::bigint[],
        %(are_reconciled)s::boolean[]
    ) AS chosen (shard, after_no, until_no, through, is_reconciled)
),
late AS MATERIALIZED (
    SELECT transaction_id, from_no, to_no, collected_at IS NULL AS is_open
    FROM {schema}.outbox_unordered
    WHERE from_no < (SELECT max(chosen.through) FROM chosen)
        AND (to_no IS NULL OR to_no > (SELECT min(chosen.after_no) FROM chosen))
),
agreed AS MATERIALIZED (
    SELECT
        chosen.*,
        said.published_at,
        counted.gone_messages,
        counted.gone_checksum,
        coalesce(base.messages, 0) AS base_messages,
        coalesce(base.checksum, 0) AS base_checksum
    FROM chosen
    LEFT JOIN {schema}.outbox_published AS base ON base.shard = chosen.shard AND base.through = chosen.after_no
    CROSS JOIN LATERAL (
        SELECT
            count(*) AS messages,
            coalesce(bit_xor(outbox.sequence_no), 0) AS checksum,
            count(*) FILTER (WHERE outbox.sequence_no <= chosen.until_no) AS gone_messages,
            coalesce(bit_xor(outbox.sequence_no) FILTER (WHERE outbox.sequence_no <= chosen.until_no), 0)
                AS gone_checksum
        FROM {schema}.outbox
        WHERE outbox.shard = chosen.shard
            AND outbox.sequence_no > chosen.after_no
            AND outbox.sequence_no <= chosen.through
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
    ) AS counted
    CROSS JOIN LATERAL (
        SELECT
            sum(mark.messages) AS messages,
            bit_xor(mark.checksum) AS checksum,
            max(mark.published_at) FILTER (WHERE mark.through = chosen.through) AS published_at
        FROM {schema}.outbox_published AS mark
        WHERE mark.shard = chosen.shard AND mark.through > chosen.after_no AND mark.through <= chosen.through
    ) AS said
    WHERE (base.through IS NOT NULL OR chosen.after_no = 0)
        AND (
            (counted.messages = said.messages AND counted.checksum = said.checksum)
            OR (counted.messages < said.messages AND chosen.is_reconciled)
        )
),
pending AS MATERIALIZED (
    SELECT pending.shard, pending.sequence_no
    FROM agreed
    JOIN {schema}.outbox_pending AS pending
        ON pending.shard = agreed.shard
        AND pending.sequence_no > agreed.after_no
        AND pending.sequence_no <= agreed.until_no
),
removed AS (
    DELETE FROM {schema}.outbox
    USING agreed
    WHERE outbox.shard = agreed.shard
        AND outbox.sequence_no > agreed.after_no
        AND outbox.sequence_no <= agreed.until_no
        AND outbox.sequence_no NOT IN (SELECT pending.sequence_no FROM pending)
        AND outbox.transaction_id NOT IN (SELECT late.transaction_id FROM late WHERE late.is_open)
    RETURNING outbox.shard
),
stays AS (
    SELECT pending.shard, count(*) AS messages, bit_xor(pending.sequence_no) AS checksum
    FROM pending
    JOIN {schema}.outbox USING (shard, sequence_no)
    WHERE NOT EXISTS (
        SELECT
        FROM late
        WHERE late.transaction_id = outbox.transaction_id
            AND outbox.sequence_no > late.from_no
            AND (late.to_no IS NULL OR outbox.sequence_no <= late.to_no)
    )
    GROUP BY pending.shard
),
merged AS (
    DELETE FROM {schema}.outbox_published AS mark
    USING agreed
    WHERE mark.shard = agreed.shard AND mark.through >= agreed.after_no AND mark.through < agreed.until_no
),
shortened AS (
    UPDATE {schema}.outbox_published AS mark
    SET messages = mark.messages - agreed.gone_messages,
        checksum = mark.checksum # agreed.gone_checksum
    FROM agreed
    WHERE mark.shard = agreed.shard AND mark.through = agreed.through AND agreed.until_no < agreed.through
),
base AS (
    INSERT INTO {schema}.outbox_published (shard, through, published_at, messages, checksum)
    SELECT
        agreed.shard,
        agreed.until_no,
        agreed.published_at,
        agreed.base_messages + coalesce(stays.messages, 0),
        agreed.base_checksum # coalesce(stays.checksum, 0)
    FROM agreed
    LEFT JOIN stays USING (shard)
    ON CONFLICT (shard, through) DO UPDATE
    SET messages = excluded.messages,
        checksum = excluded.checksum,
        before_xid = greatest(outbox_published.before_xid, excluded.before_xid)
)
SELECT
    (SELECT count(*) FROM removed) AS messages,
    (SELECT array_agg(agreed.shard) FROM agreed) AS shards;
COMMIT
