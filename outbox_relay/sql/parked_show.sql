-- Everything of one parked message, field by field as JSON, so that numbers in a payload are printed as they are stored.
SELECT field.key, field.value::text
FROM (
    SELECT
        id,
        sequence_no,
        message_id,
        aggregate_type,
        aggregate_id,
        event_type,
        created_at,
        parked_at,
        parked_reason,
        transaction_id::text,
        shard,
        headers,
        payload,
        translate(encode(payload_bytes, 'base64'), E'\n', '') AS payload_base64
    FROM {schema}.outbox
    WHERE id = %(id)s AND parked_at IS NOT NULL
) AS message
CROSS JOIN LATERAL json_each(row_to_json(message)) WITH ORDINALITY AS field (key, value, position)
ORDER BY field.position
