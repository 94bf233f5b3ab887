-- The indexes of the tables that relays search, by name, with what they index, and of a partitioned one those of its
-- partitions; one that is not valid is used by no query.
SELECT
    wanted.name AS table_name,
    relation.relname::text AS name,
    indexed.indisprimary AS is_primary,
    indexed.indisvalid AND indexed.indisready AS is_valid,
    split_part(pg_get_indexdef(indexed.indexrelid), ' USING ', 2) AS definition,
    relation.relkind = 'I' AS is_partitioned,
    ARRAY(
        SELECT part.relname::text
        FROM pg_inherits
        JOIN pg_class AS part ON part.oid = inhrelid
        WHERE inhparent = indexed.indexrelid
    ) AS parts
FROM unnest(ARRAY['outbox', 'outbox_published', 'outbox_pending', 'outbox_unordered']) AS wanted (name)
JOIN pg_index AS indexed ON indexed.indrelid = ('{schema}.' || wanted.name)::regclass
JOIN pg_class AS relation ON relation.oid = indexed.indexrelid
ORDER BY wanted.name, relation.relname
