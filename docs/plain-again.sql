-- From the partitioned layout back to the plain one, with the relays stopped: psql -v ON_ERROR_STOP=1 -f plain-again.sql
-- as the owner, with search_path set to the schema of the outbox. It copies every message while writers wait; prune first.
-- An index of your own has to be made again.
BEGIN;
LOCK TABLE outbox;

CREATE TEMPORARY TABLE last_drawn ON COMMIT DROP AS
SELECT
    (SELECT last_value FROM outbox_id_seq) AS id,
    (SELECT last_value FROM outbox_sequence_no_seq) AS sequence_no,
    (SELECT is_called FROM outbox_sequence_no_seq) AS is_called;

CREATE TABLE outbox_plain (LIKE outbox INCLUDING ALL EXCLUDING IDENTITY EXCLUDING INDEXES);
INSERT INTO outbox_plain (
    id, message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers, created_at, published_at,
    parked_at, parked_reason, transaction_id, sequence_no
)
SELECT
    id, message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers, created_at, published_at,
    parked_at, parked_reason, transaction_id, sequence_no
FROM outbox
ORDER BY id;

DO $$
DECLARE
    command text;
BEGIN
    FOR command IN
        SELECT format('GRANT %s ON outbox_plain TO %s', privilege_type, grantee::regrole)
        FROM pg_class, aclexplode(relacl)
        WHERE oid = 'outbox'::regclass AND grantee <> relowner
        UNION ALL
        SELECT format('GRANT %s (%I) ON outbox_plain TO %s', privilege_type, attname, grantee::regrole)
        FROM pg_attribute, aclexplode(attacl)
        WHERE attrelid = 'outbox'::regclass
    LOOP
        EXECUTE command;
    END LOOP;
END
$$;

DROP FUNCTION outbox_open_partition, outbox_drop_partition;
DROP TABLE outbox, outbox_partition;
ALTER TABLE outbox_plain RENAME TO outbox;
ALTER TABLE outbox
    ADD CONSTRAINT outbox_pkey PRIMARY KEY (id),
    ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY,
    ALTER COLUMN sequence_no ADD GENERATED ALWAYS AS IDENTITY,
    SET (
        autovacuum_vacuum_scale_factor = 0.05,
        autovacuum_vacuum_threshold = 10000,
        autovacuum_vacuum_insert_scale_factor = 0.1,
        autovacuum_analyze_scale_factor = 0.05,
        autovacuum_analyze_threshold = 10000,
        autovacuum_vacuum_cost_delay = 1
    );
CREATE INDEX outbox_unpublished_idx ON outbox (shard, sequence_no)
    WHERE published_at IS NULL AND parked_at IS NULL;
CREATE INDEX outbox_parked_idx ON outbox (shard, aggregate_type, aggregate_id, sequence_no)
    WHERE parked_at IS NOT NULL;
SELECT setval('outbox_id_seq', id), setval('outbox_sequence_no_seq', sequence_no, is_called) FROM last_drawn;
GRANT SELECT ON SEQUENCE outbox_sequence_no_seq TO outbox_relay;

DELETE FROM outbox_relay_migration WHERE line = 'partitioned';
COMMIT;
ANALYZE outbox;
