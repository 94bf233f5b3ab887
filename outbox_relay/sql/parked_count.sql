-- How many messages of some keys are parked; a key without any is left out.
SELECT shard, aggregate_type, aggregate_id, count(*) AS messages
FROM unnest(%(shards)s::smallint[], %(key_types)s::text[], %(key_ids)s::text[])
    AS key (shard, aggregate_type, aggregate_id)
JOIN {schema}.outbox USING (shard, aggregate_type, aggregate_id)
WHERE outbox.parked_at IS NOT NULL
GROUP BY shard, aggregate_type, aggregate_id
ORDER BY shard, aggregate_type, aggregate_id
