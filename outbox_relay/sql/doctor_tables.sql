-- Each table of the outbox, or each of its partitions, with what vacuum has to do with it. A size counts indexes and
-- long values too.
SELECT
    format('%I.%I', namespace.nspname, relation.relname) AS name,
    wanted.name AS table_name,
    relation.relpersistence <> 'u' AS is_logged,
    coalesce(
        (
            SELECT option_value::boolean
            FROM pg_options_to_table(relation.reloptions)
            WHERE option_name = 'autovacuum_enabled'
        ),
        true
    ) AS has_autovacuum,
    coalesce(
        (SELECT jsonb_object_agg(option_name, option_value) FROM pg_options_to_table(relation.reloptions)), '{}'
    ) AS options,
    coalesce(pg_stat_get_live_tuples(relation.oid), 0) AS live_tuples,
    coalesce(pg_stat_get_dead_tuples(relation.oid), 0) AS dead_tuples,
    pg_total_relation_size(relation.oid) AS total_bytes,
    age(relation.relfrozenxid)::bigint AS xid_age,
    mxid_age(relation.relminmxid)::bigint AS multixact_age
FROM unnest(ARRAY[
    'outbox', 'outbox_shard', 'outbox_published', 'outbox_pending', 'outbox_unordered', 'outbox_reconciled'
]) AS wanted (name)
CROSS JOIN LATERAL (
    SELECT ('{schema}.' || wanted.name)::regclass::oid
    UNION ALL
    SELECT inhrelid FROM pg_inherits WHERE inhparent = ('{schema}.' || wanted.name)::regclass
) AS part (oid)
JOIN pg_class AS relation ON relation.oid = part.oid AND relation.relkind = 'r'
JOIN pg_namespace AS namespace ON namespace.oid = relation.relnamespace
ORDER BY relation.relname
