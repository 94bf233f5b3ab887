-- Replaces what a parked message carries and keeps what it was; gives the message as it would be published now.
WITH before AS (
    SELECT * FROM {schema}.outbox WHERE id = %(id)s AND parked_at IS NOT NULL
),
recorded AS (
    INSERT INTO {schema}.outbox_audit (
        action, operator, why, outbox_id, message_id, aggregate_type, aggregate_id, sequence_no, parked_reason, content
    )
    SELECT
        'edit',
        %(operator)s,
        %(why)s,
        id,
        message_id,
        aggregate_type,
        aggregate_id,
        sequence_no,
        parked_reason,
        to_jsonb(before)
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
WHERE outbox.id = before.id AND outbox.parked_at IS NOT NULL
RETURNING
    outbox.message_id,
    outbox.aggregate_type,
    outbox.aggregate_id,
    outbox.event_type,
    coalesce(convert_to(outbox.payload::text, 'UTF8'), outbox.payload_bytes) AS value,
    outbox.headers
