-- Group roles, one for each job. Grant them to your login roles: GRANT outbox_writer TO shop_app;

DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['outbox_writer', 'outbox_relay', 'outbox_pruner', 'outbox_operator'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
            EXCEPTION
                WHEN duplicate_object OR unique_violation THEN
                    NULL;  -- another database of this cluster is being migrated at the same moment
                WHEN insufficient_privilege THEN
                    RAISE insufficient_privilege USING
                        MESSAGE = format('role %I does not exist and %I may not create it', wanted, current_user),
                        HINT = format('Let an administrator run: CREATE ROLE %I NOLOGIN;', wanted);
            END;
        END IF;
    END LOOP;
END
$$;

DO $$
BEGIN
    EXECUTE format(
        'GRANT USAGE ON SCHEMA %I TO outbox_writer, outbox_relay, outbox_pruner, outbox_operator', current_schema()
    );
END
$$;

-- Writers insert a message and nothing else: no number and no transaction id of their own choice.
GRANT INSERT (message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers, created_at)
    ON outbox TO outbox_writer;

-- The relay reads messages and never changes them. It locks shards, for which PostgreSQL asks for UPDATE on a column,
-- writes marks and pending messages, and keeps the marks few: two neighbours become one.
GRANT SELECT ON outbox, outbox_message TO outbox_relay;
GRANT SELECT ON SEQUENCE outbox_sequence_no_seq TO outbox_relay;
GRANT SELECT, UPDATE (shard) ON outbox_shard TO outbox_relay;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_published TO outbox_relay;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_pending TO outbox_relay;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_unordered TO outbox_relay;
GRANT SELECT, INSERT, UPDATE ON outbox_reconciled TO outbox_relay;

-- At its start the relay compares the applied migrations with its own. Other tools than our runner keep no such table.
DO $$
BEGIN
    IF to_regclass('outbox_relay_migration') IS NOT NULL THEN
        GRANT SELECT ON outbox_relay_migration TO outbox_relay;
    END IF;
END
$$;

-- The pruner removes messages that were published long ago. Before that it compares them with their marks, and what no
-- mark has counted goes to outbox_pending instead.
GRANT SELECT, DELETE ON outbox TO outbox_pruner;
GRANT SELECT ON outbox_message TO outbox_pruner;
GRANT SELECT ON SEQUENCE outbox_sequence_no_seq TO outbox_pruner;
GRANT SELECT, UPDATE (shard) ON outbox_shard TO outbox_pruner;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_published TO outbox_pruner;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_pending TO outbox_pruner;
GRANT SELECT, DELETE ON outbox_unordered TO outbox_pruner;
GRANT SELECT, INSERT, UPDATE ON outbox_reconciled TO outbox_pruner;

-- Operators look at everything, mend, release and skip parked messages. They may neither insert a message nor write a
-- mark.
GRANT SELECT, UPDATE (payload, payload_bytes, headers), DELETE ON outbox TO outbox_operator;
GRANT SELECT ON outbox_message, outbox_published, outbox_unordered, outbox_reconciled TO outbox_operator;
GRANT SELECT ON SEQUENCE outbox_sequence_no_seq TO outbox_operator;
GRANT SELECT, UPDATE (shard) ON outbox_shard TO outbox_operator;
GRANT SELECT, UPDATE (state, reason_code, reason, is_unordered, since), DELETE ON outbox_pending TO outbox_operator;
