-- The oldest messages that wait in shards that this transaction holds, an equal part of the limit from each shard and
-- aggregate type, in the shape of read_messages.sql. Those of :held_types stay, and are passed over as in
-- claim_shards.sql. A pending row whose message somebody has deleted comes with nothing but its number, and an empty
-- id.
--
-- A message that waits behind a parked one of its key comes too, and says so: the caller parks it, and does not meet it
-- again.
WITH RECURSIVE kind (shard, type_hash) AS (
    SELECT held.shard, first.type_hash
    FROM unnest(%(shards)s::smallint[]) AS held (shard)
    CROSS JOIN LATERAL (
        SELECT hashtextextended(pending.aggregate_type, 0) AS type_hash
        FROM {schema}.outbox_pending AS pending
        WHERE pending.shard = held.shard AND pending.state = 'waiting'
        ORDER BY hashtextextended(pending.aggregate_type, 0)
        LIMIT 1
    ) AS first
    UNION ALL
    SELECT kind.shard, next.type_hash
    FROM kind
    CROSS JOIN LATERAL (
        SELECT hashtextextended(pending.aggregate_type, 0) AS type_hash
        FROM {schema}.outbox_pending AS pending
        WHERE pending.shard = kind.shard
            AND pending.state = 'waiting'
            AND hashtextextended(pending.aggregate_type, 0) > kind.type_hash
        ORDER BY hashtextextended(pending.aggregate_type, 0)
        LIMIT 1
    ) AS next
),
wanted AS MATERIALIZED (
    SELECT kind.shard, kind.type_hash
    FROM kind
    WHERE kind.type_hash NOT IN (
        SELECT hashtextextended(held.aggregate_type, 0)
        FROM unnest(%(held_types)s::text[]) AS held (aggregate_type)
    )
),
chosen AS MATERIALIZED (
    SELECT oldest.shard, oldest.sequence_no, oldest.key_hash, oldest.is_unordered
    FROM wanted
    CROSS JOIN LATERAL (
        SELECT pending.shard, pending.sequence_no, pending.key_hash, pending.is_unordered
        FROM {schema}.outbox_pending AS pending
        WHERE pending.shard = wanted.shard
            AND pending.state = 'waiting'
            AND hashtextextended(pending.aggregate_type, 0) = wanted.type_hash
        ORDER BY pending.sequence_no
        LIMIT (
            SELECT ceil(%(batch_size)s::numeric / greatest(count(*), 1))
            FROM wanted
        )
    ) AS oldest
)
SELECT
    message.sequence_no,
    message.shard,
    coalesce(message.message_id::text, '') AS message_id,
    message.aggregate_type,
    message.aggregate_id,
    message.event_type,
    CASE WHEN contents.are_given THEN message.payload_text END AS payload,
    CASE WHEN contents.are_given THEN message.payload_bytes END AS payload_bytes,
    CASE WHEN contents.are_given THEN message.headers_text END AS headers,
    (extract(epoch FROM message.created_at) * 1000)::bigint AS created_at_ms,
    coalesce(greatest(message.stored_bytes, text.bytes), 0) AS stored_bytes,
    message.is_unordered,
    NOT message.is_unordered AND (
        SELECT true
        FROM {schema}.outbox_pending AS earlier
        WHERE earlier.key_hash = message.key_hash
            AND NOT earlier.is_unordered
            AND earlier.state = 'parked'
            AND earlier.sequence_no < message.sequence_no
        LIMIT 1
    ) IS TRUE AS is_behind_parked,
    false AS is_behind_waiting
FROM (
    SELECT
        bounded.*,
        CASE WHEN bounded.stored_bytes <= %(readable_bytes)s THEN bounded.payload::text END AS payload_text,
        CASE WHEN bounded.stored_bytes <= %(readable_bytes)s THEN bounded.headers::text END AS headers_text
    FROM (
        SELECT
            found.*,
            sum(found.stored_bytes)
                OVER (ORDER BY found.sequence_no ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
        FROM (
            SELECT
                chosen.sequence_no,
                chosen.shard,
                chosen.key_hash,
                chosen.is_unordered,
                outbox.message_id,
                outbox.aggregate_type,
                outbox.aggregate_id,
                outbox.event_type,
                outbox.payload,
                outbox.payload_bytes,
                outbox.headers,
                outbox.created_at,
                coalesce(pg_column_size(outbox.payload), 0)
                + coalesce(pg_column_size(outbox.payload_bytes), 0)
                + pg_column_size(outbox.headers) AS stored_bytes
            FROM chosen
            LEFT JOIN {schema}.outbox ON outbox.shard = chosen.shard AND outbox.sequence_no = chosen.sequence_no
        ) AS found
    ) AS bounded
    WHERE coalesce(bounded.bytes_before, 0) < %(batch_bytes)s
    OFFSET 0
) AS message
CROSS JOIN LATERAL (
    SELECT greatest(octet_length(message.payload_text), octet_length(message.headers_text)) AS bytes
) AS text
CROSS JOIN LATERAL (
    SELECT text.bytes <= 16384
        OR text.bytes <= 8 * message.stored_bytes
        OR message.bytes_before IS NULL AND text.bytes <= %(readable_bytes)s AS are_given
) AS contents
