-- Of the next :rows messages by id those that are to be replayed, without their payloads; each row begins with the last
-- id that was looked at, and one without a message comes if none is found. It locks nothing.
--
-- What is unpublished or parked is never replayed: it has yet to come for the first time.
WITH page AS MATERIALIZED (
    SELECT max(next.id) AS through
    FROM (
        SELECT outbox.id
        FROM {schema}.outbox
        WHERE outbox.id > %(after)s::bigint AND outbox.id <= %(last)s::bigint
        ORDER BY outbox.id
        LIMIT %(rows)s
    ) AS next
)
SELECT page.through, found.*
FROM page
LEFT JOIN LATERAL (
    SELECT
        outbox.sequence_no,
        outbox.id,
        outbox.aggregate_type,
        outbox.created_at,
        coalesce(pg_column_size(outbox.payload), 0)
        + coalesce(pg_column_size(outbox.payload_bytes), 0)
        + pg_column_size(outbox.headers) AS stored_bytes
    FROM {schema}.outbox
    WHERE outbox.id > %(after)s::bigint
        AND outbox.id <= page.through
        AND outbox.published_at < %(published_before)s::timestamptz
        AND outbox.parked_at IS NULL
        AND outbox.sequence_no >= %(first_no)s::bigint
        AND outbox.sequence_no <= %(last_no)s::bigint
        AND (%(since)s::timestamptz IS NULL OR outbox.created_at >= %(since)s::timestamptz)
        AND (%(until)s::timestamptz IS NULL OR outbox.created_at < %(until)s::timestamptz)
        AND (%(aggregate_types)s::text[] IS NULL OR outbox.aggregate_type = ANY (%(aggregate_types)s::text[]))
        AND (
            %(key_types)s::text[] IS NULL
            OR (outbox.aggregate_type, outbox.aggregate_id) IN (
                SELECT key.aggregate_type, key.aggregate_id
                FROM unnest(%(key_types)s::text[], %(key_ids)s::text[]) AS key (aggregate_type, aggregate_id)
            )
        )
) AS found ON true
ORDER BY found.id
