-- Where the messages of :ids are, and for each one an earlier parked message of its key that is not among them. A message
-- that is not parked has no shard.
SELECT
    wanted.id,
    chosen.shard,
    chosen.aggregate_type,
    chosen.aggregate_id,
    (
        SELECT earlier.id
        FROM {schema}.outbox AS earlier
        WHERE earlier.shard = chosen.shard
            AND earlier.aggregate_type = chosen.aggregate_type
            AND earlier.aggregate_id = chosen.aggregate_id
            AND earlier.sequence_no < chosen.sequence_no
            AND earlier.parked_at IS NOT NULL
            AND earlier.id <> ALL (%(ids)s::bigint[])
        ORDER BY earlier.sequence_no
        LIMIT 1
    ) AS earlier_id
FROM unnest(%(ids)s::bigint[]) AS wanted (id)
LEFT JOIN {schema}.outbox AS chosen ON chosen.id = wanted.id AND chosen.parked_at IS NOT NULL
ORDER BY chosen.shard, wanted.id
