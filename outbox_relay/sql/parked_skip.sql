-- Moves parked messages of one shard to the audit table, in a transaction that has locked the shard: a row that is marked
-- published is always in Kafka, and these never will be.
WITH skipped AS (
    DELETE FROM {schema}.outbox
    WHERE id = ANY (%(ids)s::bigint[]) AND parked_at IS NOT NULL
    RETURNING outbox.*
),
recorded AS (
    INSERT INTO {schema}.outbox_audit (
        action, operator, why, outbox_id, message_id, aggregate_type, aggregate_id, sequence_no, parked_reason, content
    )
    SELECT
        'skip',
        %(operator)s,
        %(why)s,
        id,
        message_id,
        aggregate_type,
        aggregate_id,
        sequence_no,
        parked_reason,
        to_jsonb(skipped)
    FROM skipped
    ORDER BY sequence_no
),
renewed AS (
    UPDATE {schema}.outbox_shard
    SET generation = generation + 1
    WHERE shard = %(shard)s AND EXISTS (SELECT FROM skipped)
)
SELECT id FROM skipped ORDER BY id
