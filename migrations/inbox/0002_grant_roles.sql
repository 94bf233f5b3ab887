-- The group role of consumers. Grant it to your login roles: GRANT inbox_consumer TO billing_app;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'inbox_consumer') THEN
        CREATE ROLE inbox_consumer NOLOGIN;
    END IF;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN
        NULL;  -- another database of this cluster is being migrated at the same moment
    WHEN insufficient_privilege THEN
        RAISE insufficient_privilege USING
            MESSAGE = format('role inbox_consumer does not exist and %I may not create it', current_user),
            HINT = 'Let an administrator run: CREATE ROLE inbox_consumer NOLOGIN;';
END
$$;

DO $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO inbox_consumer', current_schema());
END
$$;

-- Consumers record messages, add a result, and prune. What was recorded, and when, they cannot change.
GRANT SELECT, DELETE ON inbox_message TO inbox_consumer;
GRANT INSERT (consumer, message_id, created_at), UPDATE (result) ON inbox_message TO inbox_consumer;

-- Consumers raise marks.
GRANT SELECT, INSERT, UPDATE (sequence_no, previous_sequence_no) ON inbox_sequence TO inbox_consumer;

-- Consumers move their offsets forward, and back when they replay.
GRANT SELECT, INSERT, UPDATE (next_offset) ON inbox_offset TO inbox_consumer;
