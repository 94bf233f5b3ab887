-- Inserts messages in one round trip; their numbers follow the order of the arrays, because defaults are evaluated
-- above the sort. Nothing is returned: a writer may not read the table.
--
-- Parameters are cast by CAST, as a library that names them :like_this cannot read a second colon behind the name.
INSERT INTO {schema}.outbox (
    message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers, created_at
)
SELECT
    message.message_id::uuid,
    message.aggregate_type,
    message.aggregate_id,
    message.event_type,
    message.payload::jsonb,
    message.payload_bytes,
    message.headers::jsonb,
    coalesce(message.created_at::timestamptz, now())
FROM unnest(
    CAST(%(message_id)s AS text[]),
    CAST(%(aggregate_type)s AS text[]),
    CAST(%(aggregate_id)s AS text[]),
    CAST(%(event_type)s AS text[]),
    CAST(%(payload)s AS text[]),
    CAST(%(payload_bytes)s AS bytea[]),
    CAST(%(headers)s AS text[]),
    CAST(%(created_at)s AS text[])
) WITH ORDINALITY AS message (
    message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers, created_at, position
)
ORDER BY message.position
