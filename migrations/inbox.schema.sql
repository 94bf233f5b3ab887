CREATE SCHEMA app;

CREATE TABLE app.idempotency_key (
    scope text NOT NULL,
    key text NOT NULL,
    fingerprint text NOT NULL,
    fencing_token bigint NOT NULL,
    recovery_point text,
    step_results json DEFAULT '{}'::json NOT NULL,
    response json,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    locked_until timestamp with time zone NOT NULL,
    finished_at timestamp with time zone,
    expires_at timestamp with time zone NOT NULL,
    CONSTRAINT idempotency_key_expires_at_check CHECK (((finished_at IS NOT NULL) OR (expires_at >= locked_until))),
    CONSTRAINT idempotency_key_response_check CHECK (((response IS NULL) = (finished_at IS NULL)))
)
WITH (fillfactor='50');

ALTER TABLE app.idempotency_key ALTER COLUMN fencing_token ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME app.idempotency_key_fencing_token_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE app.inbox_message (
    consumer text NOT NULL,
    message_id uuid NOT NULL,
    created_at timestamp with time zone NOT NULL,
    received_at timestamp with time zone DEFAULT now() NOT NULL,
    result jsonb
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='10000', autovacuum_vacuum_insert_scale_factor='0.1');

CREATE TABLE app.inbox_offset (
    consumer text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    next_offset bigint NOT NULL
)
WITH (fillfactor='50');

CREATE TABLE app.inbox_sequence (
    consumer text NOT NULL,
    source text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    aggregate_type text NOT NULL,
    key text NOT NULL,
    key_hash bytea NOT NULL,
    sequence_no bigint NOT NULL,
    previous_sequence_no bigint NOT NULL
)
WITH (fillfactor='50');

CREATE TABLE app.outbox_relay_migration (
    line text NOT NULL,
    version integer NOT NULL,
    name text NOT NULL,
    applied_at timestamp with time zone DEFAULT now() NOT NULL
);

ALTER TABLE ONLY app.idempotency_key
    ADD CONSTRAINT idempotency_key_pkey PRIMARY KEY (scope, key);

ALTER TABLE ONLY app.inbox_message
    ADD CONSTRAINT inbox_message_pkey PRIMARY KEY (consumer, message_id);

ALTER TABLE ONLY app.inbox_offset
    ADD CONSTRAINT inbox_offset_pkey PRIMARY KEY (consumer, topic, partition);

ALTER TABLE ONLY app.inbox_sequence
    ADD CONSTRAINT inbox_sequence_pkey PRIMARY KEY (consumer, topic, partition, key_hash);

ALTER TABLE ONLY app.outbox_relay_migration
    ADD CONSTRAINT outbox_relay_migration_pkey PRIMARY KEY (line, version);

CREATE INDEX idempotency_key_expires_at_idx ON app.idempotency_key USING btree (scope, expires_at);

CREATE INDEX inbox_message_received_at_idx ON app.inbox_message USING btree (consumer, received_at);

GRANT USAGE ON SCHEMA app TO inbox_consumer;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE app.idempotency_key TO inbox_consumer;

GRANT SELECT,DELETE ON TABLE app.inbox_message TO inbox_consumer;

GRANT INSERT(consumer) ON TABLE app.inbox_message TO inbox_consumer;

GRANT INSERT(message_id) ON TABLE app.inbox_message TO inbox_consumer;

GRANT INSERT(created_at) ON TABLE app.inbox_message TO inbox_consumer;

GRANT UPDATE(result) ON TABLE app.inbox_message TO inbox_consumer;

GRANT SELECT,INSERT ON TABLE app.inbox_offset TO inbox_consumer;

GRANT UPDATE(next_offset) ON TABLE app.inbox_offset TO inbox_consumer;

GRANT SELECT,INSERT ON TABLE app.inbox_sequence TO inbox_consumer;

GRANT UPDATE(sequence_no) ON TABLE app.inbox_sequence TO inbox_consumer;

GRANT UPDATE(previous_sequence_no) ON TABLE app.inbox_sequence TO inbox_consumer;

