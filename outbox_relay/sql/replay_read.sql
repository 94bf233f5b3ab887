-- Messages to replay, whole, in the shape of a claim's and in sequence order. One that was pruned since is left out.
SELECT
    outbox.id,
    outbox.sequence_no,
    outbox.shard,
    outbox.message_id::text,
    outbox.aggregate_type,
    outbox.aggregate_id,
    outbox.event_type,
    CASE WHEN size.stored_bytes <= %(readable_bytes)s THEN outbox.payload::text END AS payload,
    CASE WHEN size.stored_bytes <= %(readable_bytes)s THEN outbox.payload_bytes END AS payload_bytes,
    outbox.headers::text,
    (extract(epoch FROM outbox.created_at) * 1000)::bigint AS created_at_ms,
    size.stored_bytes,
    outbox.transaction_id IN (SELECT transaction_id FROM {schema}.outbox_unordered) AS is_unordered,
    false AS is_behind_parked
FROM {schema}.outbox
CROSS JOIN LATERAL (
    SELECT
        coalesce(pg_column_size(outbox.payload), 0)
        + coalesce(pg_column_size(outbox.payload_bytes), 0)
        + pg_column_size(outbox.headers) AS stored_bytes
) AS size
WHERE outbox.id = ANY (%(ids)s::bigint[])
ORDER BY outbox.sequence_no
