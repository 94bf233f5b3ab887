-- Takes the oldest unpublished messages of shards that nobody else holds; at most :max_shards shards and :batch_size
-- messages of together about :batch_bytes. One row per message, and one row without a message per other shard.
--
-- A shard row is locked before its messages, and only its holder may publish them: with SKIP LOCKED on the messages
-- themselves two relays would send later messages of a key first. Messages are locked as well: a snapshot older than
-- the shard lock still shows as unpublished what the last holder has marked, and the lock looks again.
--
-- "known" is what the caller remembers of each shard, from 0 up: everything at or below the floor is settled, as long as the
-- shard's generation is the same. Without the floor a claim walks the dead index entries of all that was published
-- since the oldest snapshot. The probe is a scalar subquery because EXISTS becomes a join over the whole backlog.
--
-- "owned" compares the generation it locked with the one in the snapshot: if another relay parked or an operator
-- released messages in between, what this snapshot says about parked keys is out of date and the shard is left alone.
--
-- A message far beyond what Kafka takes comes without its contents: stored_bytes tells, and the caller parks it. It can
-- be as text that it is so large, for jsonb has the number 1e131071 in 12 bytes. That is known only when the text is
-- made, so of messages that grow beyond 16 kB and eight times their bytes a shard gives one, as its first; a later one
-- comes without its contents too, and is for another claim. OFFSET 0 keeps the text from being made twice.
--
-- The window has no ORDER BY: it would sort messages that come in order, and it only bounds the bytes.
WITH probe AS MATERIALIZED (
    SELECT
        outbox_shard.shard,
        outbox_shard.generation,
        start.floor,
        (
            SELECT outbox.sequence_no
            FROM {schema}.outbox
            WHERE outbox.shard = outbox_shard.shard
                AND outbox.published_at IS NULL
                AND outbox.parked_at IS NULL
                AND outbox.sequence_no > start.floor
                AND outbox.sequence_no <= %(through)s
                AND outbox.aggregate_type <> ALL (%(held_types)s::text[])
            ORDER BY outbox.sequence_no
            LIMIT 1
        ) AS first_no
    FROM unnest(%(floors)s::bigint[], %(generations)s::bigint[])
        WITH ORDINALITY AS known (floor, generation, position)
    JOIN {schema}.outbox_shard ON outbox_shard.shard = known.position - 1
    CROSS JOIN LATERAL (
        SELECT CASE WHEN outbox_shard.generation = known.generation THEN known.floor ELSE 0 END AS floor
    ) AS start
),
owned AS MATERIALIZED (
    SELECT
        outbox_shard.shard,
        probe.floor,
        outbox_shard.generation = probe.generation AS is_current,
        EXISTS (
            SELECT FROM {schema}.outbox WHERE outbox.shard = outbox_shard.shard AND outbox.parked_at IS NOT NULL
        ) AS has_parked
    FROM probe
    JOIN {schema}.outbox_shard USING (shard)
    WHERE probe.first_no IS NOT NULL
    ORDER BY probe.first_no
    LIMIT %(max_shards)s
    FOR UPDATE OF outbox_shard SKIP LOCKED
)
SELECT
    message.id,
    message.sequence_no,
    probe.shard,
    message.message_id::text,
    message.aggregate_type,
    message.aggregate_id,
    message.event_type,
    CASE WHEN contents.are_given THEN message.payload_text END AS payload,
    CASE WHEN contents.are_given THEN message.payload_bytes END AS payload_bytes,
    CASE WHEN contents.are_given THEN message.headers_text END AS headers,
    (extract(epoch FROM message.created_at) * 1000)::bigint AS created_at_ms,
    greatest(message.stored_bytes, text.bytes) AS stored_bytes,
    message.transaction_id IN (SELECT transaction_id FROM {schema}.outbox_unordered) AS is_unordered,
    owned.has_parked AND EXISTS (
        SELECT FROM {schema}.outbox AS earlier
        WHERE earlier.shard = probe.shard
            AND earlier.aggregate_type = message.aggregate_type
            AND earlier.aggregate_id = message.aggregate_id
            AND earlier.sequence_no < message.sequence_no
            AND earlier.parked_at IS NOT NULL
    ) AS is_behind_parked,
    probe.generation,
    probe.first_no IS NULL AS is_drained
FROM probe
LEFT JOIN owned ON owned.shard = probe.shard AND owned.is_current
LEFT JOIN LATERAL (
    SELECT
        bounded.*,
        CASE WHEN bounded.stored_bytes <= %(readable_bytes)s THEN bounded.payload::text END AS payload_text,
        CASE WHEN bounded.stored_bytes <= %(readable_bytes)s THEN bounded.headers::text END AS headers_text
    FROM (
        SELECT
            locked.*,
            sum(locked.stored_bytes) OVER (ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
        FROM (
            SELECT
                outbox.id,
                outbox.sequence_no,
                outbox.message_id,
                outbox.aggregate_type,
                outbox.aggregate_id,
                outbox.event_type,
                outbox.payload,
                outbox.payload_bytes,
                outbox.headers,
                outbox.created_at,
                outbox.transaction_id,
                coalesce(pg_column_size(outbox.payload), 0)
                + coalesce(pg_column_size(outbox.payload_bytes), 0)
                + pg_column_size(outbox.headers) AS stored_bytes
            FROM {schema}.outbox
            WHERE outbox.shard = owned.shard
                AND outbox.published_at IS NULL
                AND outbox.parked_at IS NULL
                AND outbox.sequence_no > owned.floor
                AND outbox.sequence_no <= %(through)s
                AND outbox.aggregate_type <> ALL (%(held_types)s::text[])
            ORDER BY outbox.sequence_no
            LIMIT (SELECT ceil(%(batch_size)s::numeric / greatest(count(*), 1)) FROM owned)
            FOR UPDATE OF outbox
        ) AS locked
    ) AS bounded
    WHERE coalesce(bounded.bytes_before, 0) < (SELECT %(batch_bytes)s::bigint / greatest(count(*), 1) FROM owned)
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
