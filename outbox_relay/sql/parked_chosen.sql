-- Where the parked messages of :numbers are, and for each one an earlier parked message of its key that is not among
-- them. A message that is not parked has no shard, and one that was deleted from the outbox has no message_id.
--
-- A number alone does not tell the shard, so the primary key is probed for each of them.
SELECT
    wanted.sequence_no,
    parked.shard,
    parked.message_id::text,
    parked.aggregate_type,
    parked.aggregate_id,
    (
        SELECT earlier.sequence_no
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
            AND earlier.sequence_no <> ALL (%(numbers)s::bigint[])
            AND (its.aggregate_id = parked.aggregate_id) IS NOT FALSE
        LIMIT 1
    ) AS earlier_no
FROM unnest(%(numbers)s::bigint[]) AS wanted (sequence_no)
LEFT JOIN LATERAL (
    SELECT
        pending.shard,
        pending.sequence_no,
        pending.key_hash,
        pending.aggregate_type,
        outbox.message_id,
        outbox.aggregate_id
    FROM {schema}.outbox_shard
    JOIN {schema}.outbox_pending AS pending
        ON pending.shard = outbox_shard.shard
        AND pending.sequence_no = wanted.sequence_no
        AND pending.state = 'parked'
    LEFT JOIN {schema}.outbox ON outbox.shard = pending.shard AND outbox.sequence_no = pending.sequence_no
    LIMIT 1
) AS parked ON true
ORDER BY parked.shard, wanted.sequence_no
