-- The next messages above the marks of shards that this transaction holds: at most :batch_size, of together about
-- :batch_bytes. Nothing is locked, for only the holder of a shard moves its mark. What is left out because of a limit
-- is the tail of its shard, never a hole.
--
-- Messages of writers that were given up on are left out: no mark counts them, and they come through outbox_pending.
-- The range of their numbers counts too, for a restored database may give the same transaction id away again.
--
-- A message far beyond what Kafka takes comes without its contents: stored_bytes tells, and the caller parks it. The
-- text of a small jsonb may be that large, for it has the number 1e131071 in 12 bytes. Its size is known only once it
-- is made. So a shard returns at most one message that grows to over 16 kB and eight times its stored size, and only as
-- its first. Later ones come without contents and wait for the next read. OFFSET 0 keeps the text from being made
-- twice.
WITH late AS MATERIALIZED (
    SELECT transaction_id, from_no, to_no
    FROM {schema}.outbox_unordered
    WHERE to_no IS NULL
        OR to_no > (SELECT min(known.mark) FROM unnest(%(marks)s::bigint[]) AS known (mark))
)
SELECT
    message.sequence_no,
    held.shard,
    message.message_id::text,
    message.aggregate_type,
    message.aggregate_id,
    message.event_type,
    CASE WHEN contents.are_given THEN message.payload_text END AS payload,
    CASE WHEN contents.are_given THEN message.payload_bytes END AS payload_bytes,
    CASE WHEN contents.are_given THEN message.headers_text END AS headers,
    (extract(epoch FROM message.created_at) * 1000)::bigint AS created_at_ms,
    greatest(message.stored_bytes, text.bytes) AS stored_bytes,
    false AS is_unordered,
    held.has_pending AND (
        SELECT true
        FROM {schema}.outbox_pending AS earlier
        WHERE earlier.key_hash = hashtextextended(message.aggregate_type || ':' || message.aggregate_id, 0)
            AND NOT earlier.is_unordered
            AND earlier.state = 'parked'
            AND earlier.sequence_no < message.sequence_no
        LIMIT 1
    ) IS TRUE AS is_behind_parked,
    held.has_pending AND (
        SELECT true
        FROM {schema}.outbox_pending AS earlier
        WHERE earlier.key_hash = hashtextextended(message.aggregate_type || ':' || message.aggregate_id, 0)
            AND NOT earlier.is_unordered
            AND earlier.state = 'waiting'
            AND earlier.sequence_no < message.sequence_no
        LIMIT 1
    ) IS TRUE AS is_behind_waiting
FROM unnest(%(shards)s::smallint[], %(marks)s::bigint[], %(have_pending)s::boolean[]) AS held (shard, mark, has_pending)
CROSS JOIN LATERAL (
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
                outbox.sequence_no,
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
            FROM {schema}.outbox
            WHERE outbox.shard = held.shard
                AND outbox.sequence_no > held.mark
                AND outbox.sequence_no <= %(through)s
                AND (
                    outbox.transaction_id NOT IN (SELECT late.transaction_id FROM late)
                    OR NOT EXISTS (
                        SELECT
                        FROM late
                        WHERE late.transaction_id = outbox.transaction_id
                            AND outbox.sequence_no > late.from_no
                            AND (late.to_no IS NULL OR outbox.sequence_no <= late.to_no)
                    )
                )
            ORDER BY outbox.sequence_no
            LIMIT (
                SELECT ceil(%(batch_size)s::numeric / greatest(count(*), 1))
                FROM unnest(%(marks)s::bigint[])
            )
        ) AS found
    ) AS bounded
    WHERE coalesce(bounded.bytes_before, 0) < (
        SELECT %(batch_bytes)s::bigint / greatest(count(*), 1) FROM unnest(%(marks)s::bigint[])
    )
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
