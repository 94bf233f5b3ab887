-- The newest mark of each shard, from 0 up; 0 for a shard that has none, or that none of the given keys is in.
SELECT array_agg(coalesce(newest.through, 0) ORDER BY part.shard) AS published_through
FROM generate_series(0, 15) AS part (shard)
LEFT JOIN LATERAL (
    SELECT mark.through
    FROM {schema}.outbox_published AS mark
    WHERE mark.shard = part.shard
        AND (
            %(key_types)s::text[] IS NULL
            OR part.shard IN (
                SELECT hashtextextended(key.type || ':' || key.id, 0) & 15
                FROM unnest(%(key_types)s::text[], %(key_ids)s::text[]) AS key (type, id)
            )
        )
    ORDER BY mark.through DESC
    LIMIT 1
) AS newest ON true
