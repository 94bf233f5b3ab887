-- Parked messages, oldest first: those that Kafka refused, and the first one of each key; with :with_waiting all. It
-- reads every parked row of the selection, through the index of parked rows, and counts those that wait up to :most_counted.
SELECT
    parked.id,
    parked.shard,
    parked.sequence_no,
    parked.message_id::text,
    parked.aggregate_type,
    parked.aggregate_id,
    parked.event_type,
    parked.parked_at,
    coalesce(parked.parked_reason, '') AS reason,
    coalesce(parked.parked_reason, '') NOT LIKE 'behind\_parked:%%' AS is_guilty,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM {schema}.outbox AS later
            WHERE later.shard = parked.shard
                AND later.aggregate_type = parked.aggregate_type
                AND later.aggregate_id = parked.aggregate_id
                AND later.sequence_no > parked.sequence_no
                AND later.parked_at IS NOT NULL
            LIMIT %(most_counted)s
        ) AS later
    ) AS waiting
FROM {schema}.outbox AS parked
WHERE parked.parked_at IS NOT NULL
    AND (
        %(key_types)s::text[] IS NULL
        OR (parked.aggregate_type, parked.aggregate_id) IN (
            SELECT key.aggregate_type, key.aggregate_id
            FROM unnest(%(key_types)s::text[], %(key_ids)s::text[]) AS key (aggregate_type, aggregate_id)
        )
    )
    AND (%(aggregate_type)s::text IS NULL OR parked.aggregate_type = %(aggregate_type)s::text)
    AND (%(reason)s::text IS NULL OR parked.parked_reason ILIKE '%%' || %(reason)s::text || '%%')
    AND (
        %(with_waiting)s
        OR coalesce(parked.parked_reason, '') NOT LIKE 'behind\_parked:%%'
        OR NOT EXISTS (
            SELECT
            FROM {schema}.outbox AS earlier
            WHERE earlier.shard = parked.shard
                AND earlier.aggregate_type = parked.aggregate_type
                AND earlier.aggregate_id = parked.aggregate_id
                AND earlier.sequence_no < parked.sequence_no
                AND earlier.parked_at IS NOT NULL
        )
    )
ORDER BY parked.sequence_no
LIMIT %(limit)s
