-- What operators did to parked messages: who, when, why, and what the message was before. A skipped message is here only.

CREATE TABLE outbox_audit (
    id             bigint GENERATED ALWAYS AS IDENTITY,
    recorded_at    timestamptz NOT NULL DEFAULT now(),
    action         text NOT NULL,
    session_role   text NOT NULL DEFAULT session_user,
    operator       text,
    why            text,
    outbox_id      bigint NOT NULL,
    message_id     uuid NOT NULL,
    aggregate_type text NOT NULL,
    aggregate_id   text NOT NULL,
    sequence_no    bigint NOT NULL,
    parked_reason  text,
    content        jsonb,
    CONSTRAINT outbox_audit_pkey PRIMARY KEY (id),
    CONSTRAINT outbox_audit_action_check CHECK (action IN ('edit', 'release', 'skip')),
    CONSTRAINT outbox_audit_content_check CHECK (action = 'release' OR content IS NOT NULL)
);

COMMENT ON COLUMN outbox_audit.operator IS 'The person, as given; session_role is what PostgreSQL knows';
COMMENT ON COLUMN outbox_audit.content IS 'The whole row before an edit or a skip; payload_bytes in hex, as bytea reads it';

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'outbox_operator') THEN
        CREATE ROLE outbox_operator NOLOGIN;
    END IF;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN
        NULL;  -- another database of this cluster is being migrated at the same moment
    WHEN insufficient_privilege THEN
        RAISE insufficient_privilege USING
            MESSAGE = format('role outbox_operator does not exist and %I may not create it', current_user),
            HINT = 'Let an administrator run: CREATE ROLE outbox_operator NOLOGIN;';
END
$$;

DO $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO outbox_operator', current_schema());
END
$$;

-- Operators look at everything, mend, release and skip parked messages, and cannot say that somebody else did. They may
-- not mark a message as published, nor insert one. DELETE is for skipping.
GRANT SELECT, DELETE ON outbox TO outbox_operator;
GRANT UPDATE (payload, payload_bytes, headers, parked_at, parked_reason) ON outbox TO outbox_operator;
GRANT SELECT, UPDATE (generation) ON outbox_shard TO outbox_operator;
GRANT INSERT (transaction_id) ON outbox_unordered TO outbox_operator;
GRANT SELECT ON outbox_audit TO outbox_operator;
GRANT INSERT (
    action, operator, why, outbox_id, message_id, aggregate_type, aggregate_id, sequence_no, parked_reason, content
) ON outbox_audit TO outbox_operator;
