-- Everything of one parked message, field by field as JSON, so that numbers in a payload are printed as they are
-- stored. Of one that was deleted from the outbox there is what outbox_pending says, and message_id is null.
SELECT field.key, field.value::text
FROM (
    SELECT
        pending.sequence_no,
        outbox.message_id,
        pending.aggregate_type,
        outbox.aggregate_id,
        outbox.event_type,
        outbox.created_at,
        pending.since,
        pending.reason_code,
        pending.reason,
        pending.is_unordered,
        outbox.transaction_id::text,
        pending.shard,
        outbox.headers,
        outbox.payload,
        translate(encode(outbox.payload_bytes, 'base64'), E'\n', '') AS payload_base64
    FROM {schema}.outbox_shard
    JOIN {schema}.outbox_pending AS pending
        ON pending.shard = outbox_shard.shard
        AND pending.sequence_no = %(sequence_no)s
        AND pending.state = 'parked'
    LEFT JOIN {schema}.outbox ON outbox.shard = pending.shard AND outbox.sequence_no = pending.sequence_no
) AS message
CROSS JOIN LATERAL json_each(row_to_json(message)) WITH ORDINALITY AS field (key, value, position)
ORDER BY field.position
