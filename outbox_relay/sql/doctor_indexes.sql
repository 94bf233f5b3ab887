-- The indexes of the outbox by name, with what they index, and of a partitioned one those of its partitions; one that is
-- not valid is used by no query.
SELECT
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
FROM pg_index AS indexed
JOIN pg_class AS relation ON relation.oid = indexed.indexrelid
WHERE indexed.indrelid = '{schema}.outbox'::regclass
ORDER BY relation.relname
