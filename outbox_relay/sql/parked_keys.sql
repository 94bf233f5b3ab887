-- Keys with a parked message that all of the selection applies to, and how many of their messages are parked. Messages
-- that were deleted from the outbox have no aggregate_id: those of one hash are a key of their own here.
WITH wanted AS MATERIALIZED (
    SELECT
        key.aggregate_type,
        key.aggregate_id,
        hashtextextended(key.aggregate_type || ':' || key.aggregate_id, 0) AS key_hash
    FROM unnest(%(key_types)s::text[], %(key_ids)s::text[]) AS key (aggregate_type, aggregate_id)
)
SELECT
    parked.shard,
    parked.key_hash,
    parked.aggregate_type,
    message.aggregate_id,
    count(*) AS messages
FROM {schema}.outbox_pending AS parked
LEFT JOIN LATERAL (
    SELECT outbox.aggregate_id
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
GROUP BY parked.shard, parked.key_hash, parked.aggregate_type, message.aggregate_id
HAVING bool_or(
    (
        %(reason)s::text IS NULL
        OR parked.reason_code || ': ' || parked.reason ILIKE '%%' || %(reason)s::text || '%%'
    )
    AND (%(numbers)s::bigint[] IS NULL OR parked.sequence_no = ANY (%(numbers)s::bigint[]))
)
ORDER BY parked.shard, min(parked.sequence_no)
