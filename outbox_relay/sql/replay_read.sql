-- Messages to replay, whole, in the shape of a claim's and in sequence order. One that was pruned since is left out, and
-- one of more than :readable_bytes, in the table or as text, comes without its contents; see claim.sql.
SELECT
    outbox.id,
    outbox.sequence_no,
    outbox.shard,
    outbox.message_id::text,
    outbox.aggregate_type,
    outbox.aggregate_id,
    outbox.event_type,
    CASE WHEN text.bytes <= %(readable_bytes)s THEN text.payload END AS payload,
    CASE WHEN text.bytes <= %(readable_bytes)s THEN outbox.payload_bytes END AS payload_bytes,
    CASE WHEN text.bytes <= %(readable_bytes)s THEN text.headers END AS headers,
    (extract(epoch FROM outbox.created_at) * 1000)::bigint AS created_at_ms,
    greatest(size.stored_bytes, text.bytes) AS stored_bytes,
    outbox.transaction_id IN (SELECT transaction_id FROM {schema}.outbox_unordered) AS is_unordered,
    false AS is_behind_parked
FROM {schema}.outbox
CROSS JOIN LATERAL (
    SELECT
        coalesce(pg_column_size(outbox.payload), 0)
        + coalesce(pg_column_size(outbox.payload_bytes), 0)
        + pg_column_size(outbox.headers) AS stored_bytes
) AS size
CROSS JOIN LATERAL (
    SELECT
        made.payload,
        made.headers,
        greatest(octet_length(made.payload), octet_length(made.headers)) AS bytes
    FROM (
        SELECT
            CASE WHEN size.stored_bytes <= %(readable_bytes)s THEN outbox.payload::text END AS payload,
            CASE WHEN size.stored_bytes <= %(readable_bytes)s THEN outbox.headers::text END AS headers
        OFFSET 0
    ) AS made
) AS text
WHERE outbox.id = ANY (%(ids)s::bigint[])
ORDER BY outbox.sequence_no
