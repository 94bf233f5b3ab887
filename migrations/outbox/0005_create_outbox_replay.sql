-- Replays: messages that operators published again. One row for each, which says who, when, why, what, and how far it came.

CREATE TABLE outbox_replay (
    name             text NOT NULL,
    started_at       timestamptz NOT NULL DEFAULT now(),
    session_role     text NOT NULL DEFAULT session_user,
    operator         text,
    why              text NOT NULL,
    selection        jsonb NOT NULL,
    published_before timestamptz NOT NULL,  -- what was published later is no part of it
    messages         bigint NOT NULL DEFAULT 0,
    -- Kafka has acknowledged what is selected up to this number; a replay that was interrupted goes on behind it.
    reached_no       bigint NOT NULL DEFAULT 0,
    finished_at      timestamptz,
    CONSTRAINT outbox_replay_pkey PRIMARY KEY (name),
    CONSTRAINT outbox_replay_name_check CHECK (name ~ '^[A-Za-z0-9._-]{1,100}$')
) WITH (fillfactor = 50);  -- room for the next version of a row on its own page

COMMENT ON COLUMN outbox_replay.operator IS 'The person, as given; session_role is what PostgreSQL knows';

-- Operators begin replays and say how far they came; what was begun, and by whom, they cannot change.
GRANT SELECT ON outbox_replay TO outbox_operator;
GRANT INSERT (name, operator, why, selection, published_before), UPDATE (messages, reached_no, finished_at)
    ON outbox_replay TO outbox_operator;

-- A message that was published as unordered is so when it is published again.
GRANT SELECT ON outbox_unordered TO outbox_operator;

-- What outbox_write refuses, by the names of headers that the relay sets since: "replay", and those of CloudEvents.

CREATE OR REPLACE FUNCTION outbox_write(
    aggregate_type text,
    aggregate_id   text,
    event_type     text,
    payload        jsonb DEFAULT NULL,
    payload_bytes  bytea DEFAULT NULL,
    headers        jsonb DEFAULT '{}',
    message_id     uuid DEFAULT gen_random_uuid()
)
RETURNS uuid
LANGUAGE plpgsql
AS $$
DECLARE
    reserved CONSTANT text[] := ARRAY[
        'id', 'event_type', 'aggregate_type', 'sequence_no', 'source', 'unordered', 'replay',
        'ce_specversion', 'ce_id', 'ce_source', 'ce_type', 'ce_subject', 'ce_time', 'ce_aggregatetype', 'ce_sequence',
        'ce_unordered', 'ce_replay'
    ];
    mistake text[];
BEGIN
    mistake := CASE
        WHEN coalesce(aggregate_type, '') = '' THEN
            ARRAY['aggregate_type is empty', 'Give the kind of thing that the message is about.']
        WHEN coalesce(aggregate_id, '') = '' THEN
            ARRAY['aggregate_id is empty', 'Give the key: messages of one type and key are in order.']
        WHEN coalesce(event_type, '') = '' THEN
            ARRAY['event_type is empty', 'Give what has happened.']
        WHEN num_nonnulls(payload, payload_bytes) = 2 THEN
            ARRAY['payload and payload_bytes are both given', 'A message has one value: leave one out.']
        WHEN message_id IS NULL THEN
            ARRAY['message_id is null', 'Leave it out, or give a uuid.']
        WHEN jsonb_typeof(headers) IS DISTINCT FROM 'object'
            OR jsonb_path_exists(headers, 'strict $.* ? (@.type() <> "string")', silent => true) THEN
            ARRAY[format('headers are %s', left(coalesce(headers::text, 'null'), 200)), 'Give an object of strings.']
        WHEN headers ?| reserved THEN
            ARRAY[
                format('headers are %s', left(headers::text, 200)),
                format('The relay sets %s itself: choose other names.', array_to_string(reserved, ', '))
            ]
    END;
    IF mistake IS NOT NULL THEN
        RAISE invalid_parameter_value USING MESSAGE = mistake[1], HINT = mistake[2];
    END IF;

    INSERT INTO outbox (message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers)
    VALUES (message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers);
    RETURN message_id;
END
$$;

-- To be set again: a function that is replaced loses it.
DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION outbox_write SET search_path = %I, pg_temp', current_schema());
END
$$;
