-- What operators did to parked messages: who, when, why, and what the message was before. A skipped message is here
-- only.

CREATE TABLE outbox_audit (
    id             bigint GENERATED ALWAYS AS IDENTITY,
    recorded_at    timestamptz NOT NULL DEFAULT now(),
    action         text NOT NULL,
    session_role   text NOT NULL DEFAULT session_user,
    operator       text,
    why            text,
    sequence_no    bigint NOT NULL,
    message_id     uuid,
    aggregate_type text NOT NULL,
    aggregate_id   text,
    event_type     text,
    payload        jsonb,
    payload_bytes  bytea,
    headers        jsonb,
    created_at     timestamptz,
    parked_reason  text NOT NULL,
    CONSTRAINT outbox_audit_pkey PRIMARY KEY (id),
    CONSTRAINT outbox_audit_action_check CHECK (action IN ('edit', 'release', 'skip')),
    CONSTRAINT outbox_audit_content_check CHECK (action = 'release' OR message_id IS NULL OR headers IS NOT NULL)
);

COMMENT ON COLUMN outbox_audit.operator IS 'The person, as given; session_role is what PostgreSQL knows';
COMMENT ON COLUMN outbox_audit.message_id IS 'Null: somebody had deleted the message from the outbox before';
COMMENT ON COLUMN outbox_audit.headers IS 'With payload and payload_bytes: as they were before an edit or a skip';
COMMENT ON COLUMN outbox_audit.created_at IS 'Of the message';

-- Operators cannot say that somebody else did it.
GRANT SELECT ON outbox_audit TO outbox_operator;
GRANT INSERT (
    action, operator, why, sequence_no, message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes,
    headers, created_at, parked_reason
) ON outbox_audit TO outbox_operator;
