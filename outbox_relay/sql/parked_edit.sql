-- Replaces what a parked message carries, in a transaction that has locked its shard, and keeps what it was; returns
-- the message as it would be published now. No other row of the outbox is ever changed.
WITH before AS (
    SELECT
        outbox.*,
        pending.reason_code || ': ' || pending.reason AS parked_reason
    FROM {schema}.outbox_pending AS pending
    JOIN {schema}.outbox ON outbox.shard = pending.shard AND outbox.sequence_no = pending.sequence_no
    WHERE pending.shard = %(shard)s AND pending.sequence_no = %(sequence_no)s AND pending.state = 'parked'
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
        'edit',
        %(operator)s,
        %(why)s,
        before.sequence_no,
        before.message_id,
        before.aggregate_type,
        before.aggregate_id,
        before.event_type,
        before.payload,
        before.payload_bytes,
        before.headers,
        before.created_at,
        before.parked_reason
    FROM before
)
UPDATE {schema}.outbox
SET
    payload = CASE
        WHEN %(replaces_payload)s THEN convert_from(%(payload)s::bytea, 'UTF8')::jsonb
        ELSE outbox.payload
    END,
    payload_bytes = CASE WHEN %(replaces_payload)s THEN %(payload_bytes)s::bytea ELSE outbox.payload_bytes END,
    headers = (outbox.headers - %(removed_headers)s::text[]) || %(headers)s::jsonb
FROM before
WHERE outbox.shard = before.shard AND outbox.sequence_no = before.sequence_no
RETURNING
    outbox.message_id,
    outbox.aggregate_type,
    outbox.aggregate_id,
    outbox.event_type,
    coalesce(convert_to(outbox.payload::text, 'UTF8'), outbox.payload_bytes) AS value,
    outbox.headers
