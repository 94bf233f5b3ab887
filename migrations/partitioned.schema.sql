CREATE SCHEMA app;

CREATE FUNCTION app.outbox_drop_partition(older_than interval) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET lock_timeout TO '500ms'
    SET enable_seqscan TO 'on'
    SET search_path TO 'app', 'pg_temp'
    AS $_$
DECLARE
    closed outbox_partition;
    part text;
    is_needed boolean;
    messages bigint;
    old_messages bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE invalid_transaction_state USING MESSAGE = 'partitions are dropped in read committed transactions only';
    END IF;
    FOR closed IN SELECT * FROM outbox_partition WHERE closed_at < now() - older_than ORDER BY number LOOP
        part := format('outbox_p%s', closed.number);
        EXECUTE format(
            'SELECT EXISTS (SELECT FROM %1$I WHERE published_at IS NULL AND parked_at IS NULL)
                OR EXISTS (SELECT FROM %1$I WHERE parked_at IS NOT NULL)',
            part
        ) INTO is_needed;
        CONTINUE WHEN is_needed;

        EXECUTE format('LOCK TABLE %I IN SHARE MODE', part);
        EXECUTE format(
            'SELECT count(*), count(*) FILTER (WHERE published_at < now() - $1 AND parked_at IS NULL) FROM %I',
            part
        ) INTO messages, old_messages USING older_than;
        CONTINUE WHEN old_messages < messages;

        EXECUTE format('DROP TABLE %I', part);
        DELETE FROM outbox_partition WHERE number = closed.number;
        RETURN messages;
    END LOOP;
    RETURN NULL;
END
$_$;

CREATE FUNCTION app.outbox_open_partition() RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET lock_timeout TO '500ms'
    SET search_path TO 'app', 'pg_temp'
    AS $$
DECLARE
    width CONSTANT bigint := 100000000000;
    settings text;
    opened outbox_partition;
    newest outbox_partition;
    is_known boolean;
BEGIN
    LOCK TABLE outbox_partition IN SHARE ROW EXCLUSIVE MODE;
    SELECT * INTO STRICT opened FROM outbox_partition WHERE opened_at IS NOT NULL AND closed_at IS NULL;
    SELECT * INTO STRICT newest FROM outbox_partition ORDER BY number DESC LIMIT 1;
    SELECT made_in < pg_snapshot_xmin(pg_current_snapshot()) INTO is_known
    FROM outbox_partition
    WHERE number = opened.number + 1;

    IF opened.opened_at + opened.open_for <= clock_timestamp() AND is_known THEN
        -- Not undone by a rollback: then the next call finds the sequence where it should be.
        PERFORM setval('outbox_id_seq', opened.first_id + width, false)
        FROM outbox_id_seq
        WHERE last_value < opened.first_id + width;
        UPDATE outbox_partition SET closed_at = clock_timestamp() WHERE number = opened.number;
        UPDATE outbox_partition SET opened_at = clock_timestamp() WHERE number = opened.number + 1
        RETURNING * INTO STRICT opened;
    END IF;

    WHILE newest.number < opened.number + 2 LOOP
        SELECT 'WITH (' || array_to_string(reloptions, ', ') || ')' INTO settings
        FROM pg_class
        WHERE oid = format('outbox_p%s', newest.number)::regclass;
        INSERT INTO outbox_partition (number, first_id, open_for)
        VALUES (newest.number + 1, newest.first_id + width, newest.open_for)
        RETURNING * INTO newest;
        -- Made apart and attached then, which leaves the outbox open to everybody.
        EXECUTE format(
            'CREATE TABLE outbox_p%s (LIKE outbox INCLUDING ALL EXCLUDING IDENTITY EXCLUDING INDEXES) %s',
            newest.number,
            settings
        );
        EXECUTE format(
            'ALTER TABLE outbox ATTACH PARTITION outbox_p%s FOR VALUES FROM (%s) TO (%s)',
            newest.number,
            newest.first_id,
            newest.first_id + width
        );
    END LOOP;
END
$$;

CREATE FUNCTION app.outbox_write(aggregate_type text, aggregate_id text, event_type text, payload jsonb DEFAULT NULL::jsonb, payload_bytes bytea DEFAULT NULL::bytea, headers jsonb DEFAULT '{}'::jsonb, message_id uuid DEFAULT gen_random_uuid()) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path TO 'app', 'pg_temp'
    AS $_$
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
$_$;

CREATE TABLE app.outbox (
    id bigint NOT NULL,
    message_id uuid DEFAULT gen_random_uuid() NOT NULL,
    aggregate_type text NOT NULL,
    aggregate_id text NOT NULL,
    event_type text NOT NULL,
    payload jsonb,
    payload_bytes bytea,
    headers jsonb DEFAULT '{}'::jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    published_at timestamp with time zone,
    parked_at timestamp with time zone,
    parked_reason text,
    transaction_id xid8 DEFAULT pg_current_xact_id() NOT NULL,
    sequence_no bigint NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtextextended(((aggregate_type || ':'::text) || aggregate_id), (0)::bigint) & (15)::bigint)) STORED,
    CONSTRAINT outbox_created_at_check CHECK (isfinite(created_at)),
    CONSTRAINT outbox_headers_object_check CHECK ((jsonb_typeof(headers) = 'object'::text)),
    CONSTRAINT outbox_one_payload_check CHECK ((num_nonnulls(payload, payload_bytes) <= 1))
)
PARTITION BY RANGE (id);
ALTER TABLE ONLY app.outbox ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE ONLY app.outbox ALTER COLUMN payload_bytes SET STORAGE EXTERNAL;

CREATE TABLE app.outbox_audit (
    id bigint NOT NULL,
    recorded_at timestamp with time zone DEFAULT now() NOT NULL,
    action text NOT NULL,
    session_role text DEFAULT SESSION_USER NOT NULL,
    operator text,
    why text,
    outbox_id bigint NOT NULL,
    message_id uuid NOT NULL,
    aggregate_type text NOT NULL,
    aggregate_id text NOT NULL,
    sequence_no bigint NOT NULL,
    parked_reason text,
    content jsonb,
    CONSTRAINT outbox_audit_action_check CHECK ((action = ANY (ARRAY['edit'::text, 'release'::text, 'skip'::text]))),
    CONSTRAINT outbox_audit_content_check CHECK (((action = 'release'::text) OR (content IS NOT NULL)))
);

COMMENT ON COLUMN app.outbox_audit.operator IS 'The person, as given; session_role is what PostgreSQL knows';

COMMENT ON COLUMN app.outbox_audit.content IS 'The whole row before an edit or a skip; payload_bytes in hex, as bytea reads it';

ALTER TABLE app.outbox_audit ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME app.outbox_audit_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

ALTER TABLE app.outbox ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME app.outbox_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE app.outbox_p0 (
    id bigint CONSTRAINT outbox_id_not_null NOT NULL,
    message_id uuid DEFAULT gen_random_uuid() CONSTRAINT outbox_message_id_not_null NOT NULL,
    aggregate_type text CONSTRAINT outbox_aggregate_type_not_null NOT NULL,
    aggregate_id text CONSTRAINT outbox_aggregate_id_not_null NOT NULL,
    event_type text CONSTRAINT outbox_event_type_not_null NOT NULL,
    payload jsonb,
    payload_bytes bytea,
    headers jsonb DEFAULT '{}'::jsonb CONSTRAINT outbox_headers_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT outbox_created_at_not_null NOT NULL,
    published_at timestamp with time zone,
    parked_at timestamp with time zone,
    parked_reason text,
    transaction_id xid8 DEFAULT pg_current_xact_id() CONSTRAINT outbox_transaction_id_not_null NOT NULL,
    sequence_no bigint CONSTRAINT outbox_sequence_no_not_null NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtextextended(((aggregate_type || ':'::text) || aggregate_id), (0)::bigint) & (15)::bigint)) STORED,
    CONSTRAINT outbox_created_at_check CHECK (isfinite(created_at)),
    CONSTRAINT outbox_headers_object_check CHECK ((jsonb_typeof(headers) = 'object'::text)),
    CONSTRAINT outbox_one_payload_check CHECK ((num_nonnulls(payload, payload_bytes) <= 1))
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='10000', autovacuum_vacuum_insert_scale_factor='0.1', autovacuum_analyze_scale_factor='0.05', autovacuum_analyze_threshold='10000', autovacuum_vacuum_cost_delay='1');
ALTER TABLE ONLY app.outbox_p0 ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE ONLY app.outbox_p0 ALTER COLUMN payload_bytes SET STORAGE EXTERNAL;

CREATE TABLE app.outbox_p1 (
    id bigint CONSTRAINT outbox_id_not_null NOT NULL,
    message_id uuid DEFAULT gen_random_uuid() CONSTRAINT outbox_message_id_not_null NOT NULL,
    aggregate_type text CONSTRAINT outbox_aggregate_type_not_null NOT NULL,
    aggregate_id text CONSTRAINT outbox_aggregate_id_not_null NOT NULL,
    event_type text CONSTRAINT outbox_event_type_not_null NOT NULL,
    payload jsonb,
    payload_bytes bytea,
    headers jsonb DEFAULT '{}'::jsonb CONSTRAINT outbox_headers_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT outbox_created_at_not_null NOT NULL,
    published_at timestamp with time zone,
    parked_at timestamp with time zone,
    parked_reason text,
    transaction_id xid8 DEFAULT pg_current_xact_id() CONSTRAINT outbox_transaction_id_not_null NOT NULL,
    sequence_no bigint CONSTRAINT outbox_sequence_no_not_null NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtextextended(((aggregate_type || ':'::text) || aggregate_id), (0)::bigint) & (15)::bigint)) STORED,
    CONSTRAINT outbox_created_at_check CHECK (isfinite(created_at)),
    CONSTRAINT outbox_headers_object_check CHECK ((jsonb_typeof(headers) = 'object'::text)),
    CONSTRAINT outbox_one_payload_check CHECK ((num_nonnulls(payload, payload_bytes) <= 1))
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='10000', autovacuum_vacuum_insert_scale_factor='0.1', autovacuum_analyze_scale_factor='0.05', autovacuum_analyze_threshold='10000', autovacuum_vacuum_cost_delay='1');
ALTER TABLE ONLY app.outbox_p1 ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE ONLY app.outbox_p1 ALTER COLUMN payload_bytes SET STORAGE EXTERNAL;

CREATE TABLE app.outbox_p2 (
    id bigint CONSTRAINT outbox_id_not_null NOT NULL,
    message_id uuid DEFAULT gen_random_uuid() CONSTRAINT outbox_message_id_not_null NOT NULL,
    aggregate_type text CONSTRAINT outbox_aggregate_type_not_null NOT NULL,
    aggregate_id text CONSTRAINT outbox_aggregate_id_not_null NOT NULL,
    event_type text CONSTRAINT outbox_event_type_not_null NOT NULL,
    payload jsonb,
    payload_bytes bytea,
    headers jsonb DEFAULT '{}'::jsonb CONSTRAINT outbox_headers_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT outbox_created_at_not_null NOT NULL,
    published_at timestamp with time zone,
    parked_at timestamp with time zone,
    parked_reason text,
    transaction_id xid8 DEFAULT pg_current_xact_id() CONSTRAINT outbox_transaction_id_not_null NOT NULL,
    sequence_no bigint CONSTRAINT outbox_sequence_no_not_null NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtextextended(((aggregate_type || ':'::text) || aggregate_id), (0)::bigint) & (15)::bigint)) STORED,
    CONSTRAINT outbox_created_at_check CHECK (isfinite(created_at)),
    CONSTRAINT outbox_headers_object_check CHECK ((jsonb_typeof(headers) = 'object'::text)),
    CONSTRAINT outbox_one_payload_check CHECK ((num_nonnulls(payload, payload_bytes) <= 1))
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='10000', autovacuum_vacuum_insert_scale_factor='0.1', autovacuum_analyze_scale_factor='0.05', autovacuum_analyze_threshold='10000', autovacuum_vacuum_cost_delay='1');
ALTER TABLE ONLY app.outbox_p2 ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE ONLY app.outbox_p2 ALTER COLUMN payload_bytes SET STORAGE EXTERNAL;

CREATE TABLE app.outbox_partition (
    number integer NOT NULL,
    first_id bigint NOT NULL,
    open_for interval DEFAULT '1 day'::interval NOT NULL,
    opened_at timestamp with time zone,
    closed_at timestamp with time zone,
    made_in xid8 DEFAULT pg_current_xact_id() NOT NULL,
    CONSTRAINT outbox_partition_open_for_check CHECK ((open_for > '00:00:00'::interval))
);

COMMENT ON COLUMN app.outbox_partition.first_id IS 'The partition is outbox_p<number> and has the ids from here on';

COMMENT ON COLUMN app.outbox_partition.open_for IS 'How long new rows go there before the next partition is opened';

COMMENT ON COLUMN app.outbox_partition.opened_at IS 'Null: made ahead';

CREATE TABLE app.outbox_relay_migration (
    line text NOT NULL,
    version integer NOT NULL,
    name text NOT NULL,
    applied_at timestamp with time zone DEFAULT now() NOT NULL
);

CREATE TABLE app.outbox_replay (
    name text NOT NULL,
    started_at timestamp with time zone DEFAULT now() NOT NULL,
    session_role text DEFAULT SESSION_USER NOT NULL,
    operator text,
    why text NOT NULL,
    selection jsonb NOT NULL,
    published_before timestamp with time zone NOT NULL,
    messages bigint DEFAULT 0 NOT NULL,
    reached_no bigint DEFAULT 0 NOT NULL,
    finished_at timestamp with time zone,
    CONSTRAINT outbox_replay_name_check CHECK ((name ~ '^[A-Za-z0-9._-]{1,100}$'::text))
)
WITH (fillfactor='50');

COMMENT ON COLUMN app.outbox_replay.operator IS 'The person, as given; session_role is what PostgreSQL knows';

ALTER TABLE app.outbox ALTER COLUMN sequence_no ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME app.outbox_sequence_no_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE app.outbox_shard (
    shard smallint NOT NULL,
    generation bigint DEFAULT 0 NOT NULL
);

CREATE TABLE app.outbox_unordered (
    transaction_id xid8 NOT NULL,
    recorded_at timestamp with time zone DEFAULT now() NOT NULL
);

ALTER TABLE ONLY app.outbox ATTACH PARTITION app.outbox_p0 FOR VALUES FROM (MINVALUE) TO ('100000000000');

ALTER TABLE ONLY app.outbox ATTACH PARTITION app.outbox_p1 FOR VALUES FROM ('100000000000') TO ('200000000000');

ALTER TABLE ONLY app.outbox ATTACH PARTITION app.outbox_p2 FOR VALUES FROM ('200000000000') TO ('300000000000');

ALTER TABLE ONLY app.outbox_audit
    ADD CONSTRAINT outbox_audit_pkey PRIMARY KEY (id);

ALTER TABLE ONLY app.outbox
    ADD CONSTRAINT outbox_pkey PRIMARY KEY (id);

ALTER TABLE ONLY app.outbox_p0
    ADD CONSTRAINT outbox_p0_pkey PRIMARY KEY (id);

ALTER TABLE ONLY app.outbox_p1
    ADD CONSTRAINT outbox_p1_pkey PRIMARY KEY (id);

ALTER TABLE ONLY app.outbox_p2
    ADD CONSTRAINT outbox_p2_pkey PRIMARY KEY (id);

ALTER TABLE ONLY app.outbox_partition
    ADD CONSTRAINT outbox_partition_pkey PRIMARY KEY (number);

ALTER TABLE ONLY app.outbox_relay_migration
    ADD CONSTRAINT outbox_relay_migration_pkey PRIMARY KEY (line, version);

ALTER TABLE ONLY app.outbox_replay
    ADD CONSTRAINT outbox_replay_pkey PRIMARY KEY (name);

ALTER TABLE ONLY app.outbox_shard
    ADD CONSTRAINT outbox_shard_pkey PRIMARY KEY (shard);

ALTER TABLE ONLY app.outbox_unordered
    ADD CONSTRAINT outbox_unordered_pkey PRIMARY KEY (transaction_id);

CREATE INDEX outbox_parked_idx ON ONLY app.outbox USING btree (shard, aggregate_type, aggregate_id, sequence_no) WHERE (parked_at IS NOT NULL);

CREATE INDEX outbox_p0_parked_idx ON app.outbox_p0 USING btree (shard, aggregate_type, aggregate_id, sequence_no) WHERE (parked_at IS NOT NULL);

CREATE INDEX outbox_unpublished_idx ON ONLY app.outbox USING btree (shard, sequence_no) WHERE ((published_at IS NULL) AND (parked_at IS NULL));

CREATE INDEX outbox_p0_unpublished_idx ON app.outbox_p0 USING btree (shard, sequence_no) WHERE ((published_at IS NULL) AND (parked_at IS NULL));

CREATE INDEX outbox_p1_shard_aggregate_type_aggregate_id_sequence_no_idx ON app.outbox_p1 USING btree (shard, aggregate_type, aggregate_id, sequence_no) WHERE (parked_at IS NOT NULL);

CREATE INDEX outbox_p1_shard_sequence_no_idx ON app.outbox_p1 USING btree (shard, sequence_no) WHERE ((published_at IS NULL) AND (parked_at IS NULL));

CREATE INDEX outbox_p2_shard_aggregate_type_aggregate_id_sequence_no_idx ON app.outbox_p2 USING btree (shard, aggregate_type, aggregate_id, sequence_no) WHERE (parked_at IS NOT NULL);

CREATE INDEX outbox_p2_shard_sequence_no_idx ON app.outbox_p2 USING btree (shard, sequence_no) WHERE ((published_at IS NULL) AND (parked_at IS NULL));

ALTER INDEX app.outbox_parked_idx ATTACH PARTITION app.outbox_p0_parked_idx;

ALTER INDEX app.outbox_pkey ATTACH PARTITION app.outbox_p0_pkey;

ALTER INDEX app.outbox_unpublished_idx ATTACH PARTITION app.outbox_p0_unpublished_idx;

ALTER INDEX app.outbox_pkey ATTACH PARTITION app.outbox_p1_pkey;

ALTER INDEX app.outbox_parked_idx ATTACH PARTITION app.outbox_p1_shard_aggregate_type_aggregate_id_sequence_no_idx;

ALTER INDEX app.outbox_unpublished_idx ATTACH PARTITION app.outbox_p1_shard_sequence_no_idx;

ALTER INDEX app.outbox_pkey ATTACH PARTITION app.outbox_p2_pkey;

ALTER INDEX app.outbox_parked_idx ATTACH PARTITION app.outbox_p2_shard_aggregate_type_aggregate_id_sequence_no_idx;

ALTER INDEX app.outbox_unpublished_idx ATTACH PARTITION app.outbox_p2_shard_sequence_no_idx;

GRANT USAGE ON SCHEMA app TO outbox_writer;
GRANT USAGE ON SCHEMA app TO outbox_relay;
GRANT USAGE ON SCHEMA app TO outbox_pruner;
GRANT USAGE ON SCHEMA app TO outbox_operator;

REVOKE ALL ON FUNCTION app.outbox_drop_partition(older_than interval) FROM PUBLIC;
GRANT ALL ON FUNCTION app.outbox_drop_partition(older_than interval) TO outbox_relay;
GRANT ALL ON FUNCTION app.outbox_drop_partition(older_than interval) TO outbox_pruner;

REVOKE ALL ON FUNCTION app.outbox_open_partition() FROM PUBLIC;
GRANT ALL ON FUNCTION app.outbox_open_partition() TO outbox_relay;
GRANT ALL ON FUNCTION app.outbox_open_partition() TO outbox_pruner;

REVOKE ALL ON FUNCTION app.outbox_write(aggregate_type text, aggregate_id text, event_type text, payload jsonb, payload_bytes bytea, headers jsonb, message_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION app.outbox_write(aggregate_type text, aggregate_id text, event_type text, payload jsonb, payload_bytes bytea, headers jsonb, message_id uuid) TO outbox_writer;

GRANT SELECT,DELETE ON TABLE app.outbox TO outbox_relay;
GRANT SELECT,DELETE ON TABLE app.outbox TO outbox_pruner;
GRANT SELECT,DELETE ON TABLE app.outbox TO outbox_operator;

GRANT INSERT(message_id) ON TABLE app.outbox TO outbox_writer;

GRANT INSERT(aggregate_type) ON TABLE app.outbox TO outbox_writer;

GRANT INSERT(aggregate_id) ON TABLE app.outbox TO outbox_writer;

GRANT INSERT(event_type) ON TABLE app.outbox TO outbox_writer;

GRANT INSERT(payload) ON TABLE app.outbox TO outbox_writer;
GRANT UPDATE(payload) ON TABLE app.outbox TO outbox_operator;

GRANT INSERT(payload_bytes) ON TABLE app.outbox TO outbox_writer;
GRANT UPDATE(payload_bytes) ON TABLE app.outbox TO outbox_operator;

GRANT INSERT(headers) ON TABLE app.outbox TO outbox_writer;
GRANT UPDATE(headers) ON TABLE app.outbox TO outbox_operator;

GRANT INSERT(created_at) ON TABLE app.outbox TO outbox_writer;

GRANT UPDATE(published_at) ON TABLE app.outbox TO outbox_relay;

GRANT UPDATE(parked_at) ON TABLE app.outbox TO outbox_relay;
GRANT UPDATE(parked_at) ON TABLE app.outbox TO outbox_operator;

GRANT UPDATE(parked_reason) ON TABLE app.outbox TO outbox_relay;
GRANT UPDATE(parked_reason) ON TABLE app.outbox TO outbox_operator;

GRANT SELECT ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(action) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(operator) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(why) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(outbox_id) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(message_id) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(aggregate_type) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(aggregate_id) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(sequence_no) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(parked_reason) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(content) ON TABLE app.outbox_audit TO outbox_operator;

GRANT SELECT ON TABLE app.outbox_partition TO outbox_relay;
GRANT SELECT ON TABLE app.outbox_partition TO outbox_pruner;
GRANT SELECT ON TABLE app.outbox_partition TO outbox_operator;

GRANT SELECT ON TABLE app.outbox_relay_migration TO outbox_relay;

GRANT SELECT ON TABLE app.outbox_replay TO outbox_operator;

GRANT INSERT(name) ON TABLE app.outbox_replay TO outbox_operator;

GRANT INSERT(operator) ON TABLE app.outbox_replay TO outbox_operator;

GRANT INSERT(why) ON TABLE app.outbox_replay TO outbox_operator;

GRANT INSERT(selection) ON TABLE app.outbox_replay TO outbox_operator;

GRANT INSERT(published_before) ON TABLE app.outbox_replay TO outbox_operator;

GRANT UPDATE(messages) ON TABLE app.outbox_replay TO outbox_operator;

GRANT UPDATE(reached_no) ON TABLE app.outbox_replay TO outbox_operator;

GRANT UPDATE(finished_at) ON TABLE app.outbox_replay TO outbox_operator;

GRANT SELECT ON SEQUENCE app.outbox_sequence_no_seq TO outbox_relay;

GRANT SELECT ON TABLE app.outbox_shard TO outbox_relay;
GRANT SELECT ON TABLE app.outbox_shard TO outbox_operator;

GRANT UPDATE(generation) ON TABLE app.outbox_shard TO outbox_relay;
GRANT UPDATE(generation) ON TABLE app.outbox_shard TO outbox_operator;

GRANT SELECT,INSERT,DELETE ON TABLE app.outbox_unordered TO outbox_relay;
GRANT SELECT,DELETE ON TABLE app.outbox_unordered TO outbox_pruner;
GRANT SELECT ON TABLE app.outbox_unordered TO outbox_operator;

GRANT INSERT(transaction_id) ON TABLE app.outbox_unordered TO outbox_operator;

