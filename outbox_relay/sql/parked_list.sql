-- Parked messages, oldest first: those that Kafka refused, and the first one of each key; with :with_behind all of
-- them.
--
-- It reads all that is parked, and of the outbox only these rows, by primary key: LIMIT 1 keeps each look-up a probe of
-- the index, however large the outbox is. Those behind a message are counted up to :most_counted.
--
-- A hash finds the messages of a key and the texts decide, for two keys may have the same hash. The key of a message
-- that was deleted from the outbox is known by its type and hash only: it counts as one of its key.
WITH wanted AS MATERIALIZED (
    SELECT
        key.aggregate_type,
        key.aggregate_id,
        hashtextextended(key.aggregate_type || ':' || key.aggregate_id, 0) AS key_hash
    FROM unnest(%(key_types)s::text[], %(key_ids)s::text[]) AS key (aggregate_type, aggregate_id)
)
SELECT
    parked.sequence_no,
    parked.shard,
    message.message_id::text,
    parked.aggregate_type,
    message.aggregate_id,
    message.event_type,
    parked.since,
    parked.reason_code,
    parked.reason,
    parked.reason_code <> 'behind_parked' AS is_guilty,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM {schema}.outbox_pending AS later
            LEFT JOIN LATERAL (
                SELECT outbox.aggregate_id
                FROM {schema}.outbox
                WHERE outbox.shard = later.shard AND outbox.sequence_no = later.sequence_no
                LIMIT 1
            ) AS its ON true
            WHERE later.key_hash = parked.key_hash
                AND later.aggregate_type = parked.aggregate_type
                AND later.sequence_no > parked.sequence_no
                AND later.state = 'parked'
                AND (its.aggregate_id = message.aggregate_id) IS NOT FALSE
            LIMIT %(most_counted)s
        ) AS later
    ) AS behind
FROM {schema}.outbox_pending AS parked
LEFT JOIN LATERAL (
    SELECT outbox.message_id, outbox.aggregate_id, outbox.event_type
    FROM {schema}.outbox
    WHERE outbox.shard = parked.shard AND outbox.sequence_no = parked.sequence_no
    LIMIT 1
) AS message ON true
WHERE parked.state = 'parked'
    AND (
        %(key_types)s::text[] IS NULL
        OR EXISTS (
            SELECT
            FROM wanted
            WHERE wanted.key_hash = parked.key_hash
                AND wanted.aggregate_type = parked.aggregate_type
                AND (wanted.aggregate_id = message.aggregate_id) IS NOT FALSE
        )
    )
    AND (%(aggregate_type)s::text IS NULL OR parked.aggregate_type = %(aggregate_type)s::text)
    AND (
        %(reason)s::text IS NULL
        OR parked.reason_code || ': ' || parked.reason ILIKE '%%' || %(reason)s::text || '%%'
    )
    AND (
        %(with_behind)s
        OR parked.reason_code <> 'behind_parked'
        OR (
            SELECT true
            FROM {schema}.outbox_pending AS earlier
            LEFT JOIN LATERAL (
                SELECT outbox.aggregate_id
                FROM {schema}.outbox
                WHERE outbox.shard = earlier.shard AND outbox.sequence_no = earlier.sequence_no
                LIMIT 1
            ) AS its ON true
            WHERE earlier.key_hash = parked.key_hash
                AND earlier.aggregate_type = parked.aggregate_type
                AND earlier.sequence_no < parked.sequence_no
                AND earlier.state = 'parked'
                AND (its.aggregate_id = message.aggregate_id) IS NOT FALSE
            LIMIT 1
        ) IS NULL
    )
ORDER BY parked.sequence_no
LIMIT %(limit)s
