-- Reads what is to be replayed among the next :numbers sequence numbers, from the first message above :after_no on: at
-- most :batch_size messages of together about :batch_bytes, in the shape of read_messages.sql and in sequence order.
-- Each row says where these numbers end, so one comes without a message too; null is the end of all.
--
-- A message is replayed if a mark has passed it and it is not pending, nor of a writer that was given up on and is not
-- collected. :published_through holds the newest mark of each shard, from 0 up, when the replay began. The newest mark
-- of now is compared as well, because after a TRUNCATE the numbers may begin anew.
--
-- The numbers begin at a message, so that no gap is walked through. Each shard is read by its primary key, for the
-- LIMIT keeps the planner from joining the whole table. EXISTS would become a join with all that is pending, and
-- without the hash of the key a plan that was made while nothing was pending may search all of its other index.
--
-- Contents are withheld as in read_messages.sql, but from the second message on, not from the second of a shard.
WITH part AS MATERIALIZED (
    SELECT
        (begun.position - 1)::smallint AS shard,
        least(begun.through, newest.through, %(last_no)s::bigint) AS through
    FROM unnest(%(published_through)s::bigint[]) WITH ORDINALITY AS begun (through, position)
    CROSS JOIN LATERAL (
        SELECT mark.through
        FROM {schema}.outbox_published AS mark
        WHERE mark.shard = begun.position - 1
        ORDER BY mark.through DESC
        LIMIT 1
    ) AS newest
),
page AS MATERIALIZED (
    SELECT min(next.sequence_no) + %(numbers)s - 1 AS through
    FROM part
    CROSS JOIN LATERAL (
        SELECT outbox.sequence_no
        FROM {schema}.outbox
        WHERE outbox.shard = part.shard
            AND outbox.sequence_no > %(after_no)s::bigint
            AND outbox.sequence_no <= part.through
        ORDER BY outbox.sequence_no
        LIMIT 1
    ) AS next
)
SELECT
    page.through,
    message.sequence_no,
    message.shard,
    message.message_id::text,
    message.aggregate_type,
    message.aggregate_id,
    message.event_type,
    CASE WHEN contents.are_given THEN message.payload_text END AS payload,
    CASE WHEN contents.are_given THEN message.payload_bytes END AS payload_bytes,
    CASE WHEN contents.are_given THEN message.headers_text END AS headers,
    (extract(epoch FROM message.created_at) * 1000)::bigint AS created_at_ms,
    greatest(message.stored_bytes, text.bytes) AS stored_bytes,
    (
        SELECT true
        FROM {schema}.outbox_unordered AS late
        WHERE late.transaction_id = message.transaction_id
            AND late.from_no < message.sequence_no
            AND coalesce(late.to_no >= message.sequence_no, true)
    ) IS TRUE AS is_unordered,
    false AS is_behind_parked,
    false AS is_behind_waiting
FROM page
LEFT JOIN LATERAL (
    SELECT
        bounded.*,
        CASE WHEN bounded.stored_bytes <= %(readable_bytes)s THEN bounded.payload::text END AS payload_text,
        CASE WHEN bounded.stored_bytes <= %(readable_bytes)s THEN bounded.headers::text END AS headers_text
    FROM (
        SELECT
            found.*,
            sum(
                found.name_bytes + CASE WHEN found.stored_bytes <= %(readable_bytes)s THEN found.stored_bytes ELSE 0 END
            ) OVER (ORDER BY found.sequence_no ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
        FROM (
            SELECT each.*
            FROM part
            CROSS JOIN LATERAL (
                SELECT
                    outbox.*,
                    coalesce(pg_column_size(outbox.payload), 0)
                    + coalesce(pg_column_size(outbox.payload_bytes), 0)
                    + pg_column_size(outbox.headers) AS stored_bytes,
                    octet_length(outbox.aggregate_type)
                    + octet_length(outbox.aggregate_id)
                    + octet_length(outbox.event_type) AS name_bytes
                FROM {schema}.outbox
                WHERE outbox.shard = part.shard
                    AND outbox.sequence_no > %(after_no)s::bigint
                    AND outbox.sequence_no <= least(page.through, part.through)
                    AND (%(since)s::timestamptz IS NULL OR outbox.created_at >= %(since)s::timestamptz)
                    AND (%(until)s::timestamptz IS NULL OR outbox.created_at < %(until)s::timestamptz)
                    AND (%(types)s::text[] IS NULL OR outbox.aggregate_type = ANY (%(types)s::text[]))
                    AND (
                        %(key_types)s::text[] IS NULL
                        OR (outbox.aggregate_type, outbox.aggregate_id) IN (
                            SELECT key.type, key.id
                            FROM unnest(%(key_types)s::text[], %(key_ids)s::text[]) AS key (type, id)
                        )
                    )
                    AND (
                        SELECT pending.sequence_no
                        FROM {schema}.outbox_pending AS pending
                        WHERE pending.shard = outbox.shard
                            AND pending.sequence_no = outbox.sequence_no
                            AND pending.key_hash
                                = hashtextextended(outbox.aggregate_type || ':' || outbox.aggregate_id, 0)
                    ) IS NULL
                    AND (
                        SELECT late.transaction_id
                        FROM {schema}.outbox_unordered AS late
                        WHERE late.transaction_id = outbox.transaction_id
                            AND late.collected_at IS NULL
                            AND outbox.sequence_no > coalesce(late.collected_through, late.from_no)
                    ) IS NULL
                ORDER BY outbox.sequence_no
                LIMIT %(batch_size)s
            ) AS each
            ORDER BY each.sequence_no
            LIMIT %(batch_size)s
        ) AS found
    ) AS bounded
    WHERE coalesce(bounded.bytes_before, 0) < %(batch_bytes)s
    OFFSET 0
) AS message ON true
CROSS JOIN LATERAL (
    SELECT greatest(octet_length(message.payload_text), octet_length(message.headers_text)) AS bytes
) AS text
CROSS JOIN LATERAL (
    SELECT text.bytes <= 16384
        OR text.bytes <= 8 * message.stored_bytes
        OR message.bytes_before IS NULL AND text.bytes <= %(readable_bytes)s AS are_given
) AS contents
ORDER BY message.sequence_no
