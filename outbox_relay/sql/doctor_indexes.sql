-- The indexes of the outbox by name, with what they index; one that is not valid is used by no query.
SELECT
    relation.relname::text AS name,
    indexed.indisprimary AS is_primary,
    indexed.indisvalid AND indexed.indisready AS is_valid,
    split_part(pg_get_indexdef(indexed.indexrelid), ' USING ', 2) AS definition
FROM pg_index AS indexed
JOIN pg_class AS relation ON relation.oid = indexed.indexrelid
WHERE indexed.indrelid = '{schema}.outbox'::regclass
ORDER BY relation.relname
