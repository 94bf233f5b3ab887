-- Moves parked messages of one shard to the audit table, in a transaction that has locked the shard, so that they are
-- never published. A message that was deleted from the outbox leaves a record without message_id.
WITH skipped AS (
    DELETE FROM {schema}.outbox_pending
    WHERE shard = %(shard)s AND sequence_no = ANY (%(numbers)s::bigint[]) AND state = 'parked'
    RETURNING shard, sequence_no, aggregate_type, reason_code || ': ' || reason AS parked_reason
),
moved AS (
    DELETE FROM {schema}.outbox
    USING skipped
    WHERE outbox.shard = skipped.shard AND outbox.sequence_no = skipped.sequence_no
    RETURNING outbox.*
),
recorded AS (
    INSERT INTO {schema}.outbox_audit (
        action,
        operator,
        why,
        sequence_no,
        message_id,
        aggregate_type,
        aggregate_id,
        event_type,
        payload,
        payload_bytes,
        headers,
        created_at,
        parked_reason
    )
    SELECT
        'skip',
        %(operator)s,
        %(why)s,
        skipped.sequence_no,
        moved.message_id,
        skipped.aggregate_type,
        moved.aggregate_id,
        moved.event_type,
        moved.payload,
        moved.payload_bytes,
        moved.headers,
        moved.created_at,
        skipped.parked_reason
    FROM skipped
    LEFT JOIN moved ON moved.sequence_no = skipped.sequence_no
    ORDER BY skipped.sequence_no
)
SELECT sequence_no FROM skipped ORDER BY sequence_no
