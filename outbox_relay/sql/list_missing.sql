-- What the relay uses, less what the schema has and grants to the current role; no row means ready. It asks the
-- catalog, not the record of migrations, so that it holds whichever tool applied them.
WITH need (relation, privilege, column_name) AS (
    SELECT 'outbox', 'SELECT', unnest(ARRAY[
        'message_id', 'aggregate_type', 'aggregate_id', 'event_type', 'payload', 'payload_bytes', 'headers',
        'created_at', 'transaction_id', 'sequence_no', 'shard'
    ])
    UNION ALL SELECT 'outbox_shard', 'SELECT', unnest(ARRAY['shard', 'xmax'])
    UNION ALL SELECT 'outbox_shard', 'UPDATE', 'shard'
    UNION ALL
    SELECT 'outbox_published', 'SELECT', unnest(ARRAY[
        'shard', 'through', 'published_at', 'messages', 'checksum', 'before_xid'
    ])
    UNION ALL SELECT 'outbox_published', unnest(ARRAY['INSERT', 'UPDATE', 'DELETE']), NULL
    UNION ALL
    SELECT 'outbox_pending', 'SELECT', unnest(ARRAY[
        'shard', 'sequence_no', 'key_hash', 'aggregate_type', 'state', 'reason_code', 'reason', 'is_unordered', 'since'
    ])
    UNION ALL SELECT 'outbox_pending', unnest(ARRAY['INSERT', 'UPDATE', 'DELETE']), NULL
    UNION ALL
    SELECT 'outbox_unordered', 'SELECT', unnest(ARRAY[
        'transaction_id', 'from_no', 'to_no', 'recorded_at', 'collected_through', 'collected_at'
    ])
    UNION ALL SELECT 'outbox_unordered', unnest(ARRAY['INSERT', 'UPDATE', 'DELETE']), NULL
    UNION ALL
    SELECT 'outbox_reconciled', 'SELECT', unnest(ARRAY['shard', 'checked_through', 'thinned_through'])
    UNION ALL SELECT 'outbox_reconciled', unnest(ARRAY['INSERT', 'UPDATE']), NULL
    UNION ALL SELECT 'outbox_message', 'SELECT', 'state'
    UNION ALL SELECT 'outbox_sequence_no_seq', 'SELECT', unnest(ARRAY['last_value', 'is_called'])
    UNION ALL
    SELECT relname::text, 'SELECT', 'version'  -- only our own runner makes this table
    FROM pg_class
    WHERE relname = 'outbox_relay_migration' AND relnamespace = to_regnamespace(quote_ident(%(schema)s))
)
SELECT DISTINCT
    CASE
        WHEN relation.oid IS NULL THEN need.relation
        WHEN attribute.attnum IS NULL AND need.column_name IS NOT NULL THEN need.relation || '.' || need.column_name
    END AS absent,
    format(
        'GRANT %%s ON %%I.%%I TO %%I',
        CASE
            WHEN need.privilege = 'UPDATE' AND need.column_name IS NOT NULL
                THEN format('UPDATE (%%I)', need.column_name)
            ELSE need.privilege
        END,
        %(schema)s,
        need.relation,
        current_user
    ) AS remedy
FROM need
LEFT JOIN pg_class AS relation
    ON relation.relname = need.relation AND relation.relnamespace = to_regnamespace(quote_ident(%(schema)s))
LEFT JOIN pg_attribute AS attribute
    ON attribute.attrelid = relation.oid AND attribute.attname = need.column_name AND NOT attribute.attisdropped
WHERE NOT coalesce(
    CASE
        WHEN need.column_name IS NULL THEN has_table_privilege(relation.oid, need.privilege)
        ELSE has_column_privilege(relation.oid, attribute.attnum, need.privilege)
    END,
    false
)
UNION ALL
SELECT NULL, format('GRANT USAGE ON SCHEMA %%I TO %%I', nspname, current_user)
FROM pg_namespace
WHERE nspname = %(schema)s AND NOT has_schema_privilege(oid, 'USAGE')
ORDER BY absent, remedy
