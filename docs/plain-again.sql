-- From the partitioned layout back to the plain one, with the relays stopped: psql -v ON_ERROR_STOP=1 -f
-- plain-again.sql as the owner, with search_path set to the schema of the outbox. It copies every message while writers
-- wait; prune first. An index of your own has to be made again. The marks stay as they are.
BEGIN;
LOCK TABLE outbox;

CREATE TEMPORARY TABLE last_drawn ON COMMIT DROP AS
SELECT last_value, is_called FROM outbox_sequence_no_seq;

CREATE TABLE outbox_plain (LIKE outbox INCLUDING ALL EXCLUDING IDENTITY EXCLUDING INDEXES);
INSERT INTO outbox_plain (
    message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers, created_at, transaction_id,
    sequence_no
)
SELECT
    message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers, created_at, transaction_id,
    sequence_no
FROM outbox
ORDER BY sequence_no;

-- What to do once the table has its name, remembered while the other one has it.
CREATE TEMPORARY TABLE to_do ON COMMIT DROP AS
SELECT format('GRANT %s ON outbox TO %s', privilege_type, coalesce(quote_ident(rolname), 'PUBLIC')) AS command
FROM pg_class
CROSS JOIN aclexplode(relacl)
LEFT JOIN pg_roles ON pg_roles.oid = grantee
WHERE pg_class.oid = 'outbox'::regclass AND grantee <> relowner
UNION ALL
SELECT format('GRANT %s (%I) ON outbox TO %s', privilege_type, attname, coalesce(quote_ident(rolname), 'PUBLIC'))
FROM pg_attribute
CROSS JOIN aclexplode(attacl)
LEFT JOIN pg_roles ON pg_roles.oid = grantee
WHERE attrelid = 'outbox'::regclass
UNION ALL
SELECT format(
    'GRANT %s ON SEQUENCE outbox_sequence_no_seq TO %s', privilege_type, coalesce(quote_ident(rolname), 'PUBLIC')
)
FROM pg_class
CROSS JOIN aclexplode(relacl)
LEFT JOIN pg_roles ON pg_roles.oid = grantee
WHERE pg_class.oid = 'outbox_sequence_no_seq'::regclass AND grantee <> relowner
UNION ALL
SELECT pg_get_triggerdef(oid)
FROM pg_trigger
WHERE tgrelid = 'outbox'::regclass AND NOT tgisinternal
UNION ALL
-- Replaced, not dropped: its grants, its comments and what reads it stay.
SELECT format(
    'CREATE OR REPLACE VIEW outbox_message %s AS %s',
    'WITH (' || array_to_string(reloptions, ', ') || ')',
    pg_get_viewdef(oid)
)
FROM pg_class
WHERE oid = 'outbox_message'::regclass;

ALTER TABLE outbox ALTER COLUMN sequence_no DROP IDENTITY;
ALTER TABLE outbox RENAME TO outbox_partitioned;
ALTER TABLE outbox_plain RENAME TO outbox;
ALTER TABLE outbox ALTER COLUMN sequence_no ADD GENERATED ALWAYS AS IDENTITY;
SELECT setval('outbox_sequence_no_seq', last_value, is_called) FROM last_drawn;
DO $$
DECLARE
    wanted text;
BEGIN
    FOR wanted IN SELECT command FROM to_do LOOP
        EXECUTE wanted;
    END LOOP;
END
$$;

DROP FUNCTION outbox_open_partition, outbox_numbers_are_old, outbox_drop_partition;
DROP TABLE outbox_partitioned, outbox_partition;
ALTER TABLE outbox
    ADD CONSTRAINT outbox_pkey PRIMARY KEY (shard, sequence_no),
    SET (
        autovacuum_vacuum_scale_factor = 0.05,
        autovacuum_vacuum_threshold = 10000,
        autovacuum_vacuum_insert_scale_factor = 0.1,
        autovacuum_analyze_scale_factor = 0.05,
        autovacuum_analyze_threshold = 10000,
        autovacuum_vacuum_cost_delay = 1
    );

DELETE FROM outbox_relay_migration WHERE line = 'partitioned';
COMMIT;
ANALYZE outbox;
