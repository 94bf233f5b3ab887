-- Triggers that may change or drop a row before it is inserted, updated or deleted, in any table of the outbox.
SELECT
    format('%I', trigger.tgname) AS name,
    format('%I.%I', namespace.nspname, relation.relname) AS table_name
FROM unnest(ARRAY[
    'outbox', 'outbox_shard', 'outbox_published', 'outbox_pending', 'outbox_unordered', 'outbox_reconciled'
]) AS wanted (name)
CROSS JOIN LATERAL (
    SELECT ('{schema}.' || wanted.name)::regclass::oid
    UNION ALL
    SELECT inhrelid
    FROM pg_inherits
    WHERE inhparent = ('{schema}.' || wanted.name)::regclass
) AS part (oid)
JOIN pg_trigger AS trigger ON trigger.tgrelid = part.oid
JOIN pg_class AS relation ON relation.oid = part.oid
JOIN pg_namespace AS namespace ON namespace.oid = relation.relnamespace
WHERE NOT trigger.tgisinternal
    AND trigger.tgparentid = 0
    AND trigger.tgenabled <> 'D'
    AND trigger.tgtype & 3 = 3  -- a row's, and before
ORDER BY table_name, name
