-- What each table of the outbox holds and takes, with its partitions, without reading any of it: the statistics of
-- PostgreSQL and the sizes of files.
SELECT
    wanted.name,
    sum(coalesce(pg_stat_get_live_tuples(part.oid), 0))::float8 AS live_tuples,
    sum(coalesce(pg_stat_get_dead_tuples(part.oid), 0))::float8 AS dead_tuples,
    sum(pg_table_size(part.oid))::float8 AS table_bytes,
    sum(pg_indexes_size(part.oid))::float8 AS index_bytes
FROM unnest(ARRAY[
    'outbox', 'outbox_shard', 'outbox_published', 'outbox_pending', 'outbox_unordered', 'outbox_reconciled', 'outbox_audit'
]) AS wanted (name)
CROSS JOIN LATERAL (
    SELECT to_regclass('{schema}.' || wanted.name)::oid AS oid
    UNION ALL
    SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass('{schema}.' || wanted.name)
) AS part
WHERE part.oid IS NOT NULL
GROUP BY wanted.name
ORDER BY wanted.name
