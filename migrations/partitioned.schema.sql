CREATE SCHEMA app;

CREATE FUNCTION app.outbox_drop_partition(older_than interval, reconciled_no bigint) RETURNS TABLE(messages bigint, shard smallint, through bigint)
    LANGUAGE plpgsql SECURITY DEFINER
    SET lock_timeout TO '500ms'
    SET enable_seqscan TO 'off'
    SET enable_bitmapscan TO 'off'
    SET enable_hashjoin TO 'off'
    SET enable_mergejoin TO 'off'
    SET search_path TO 'app', 'pg_temp'
    AS $$
#variable_conflict use_column
DECLARE
    closed record;
    is_locked boolean;
    outcome record;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE invalid_transaction_state USING MESSAGE = 'partitions are dropped in read committed transactions only';
    END IF;
    <<partition>>
    FOR closed IN
        SELECT format('outbox_p%s', bounded.number) AS name, bounded.number, bounded.first_no, bounded.end_no
        FROM (
            SELECT number, first_no, lead(first_no) OVER (ORDER BY number) AS end_no, closed_at FROM outbox_partition
        ) AS bounded
        WHERE bounded.closed_at < now() - older_than
        ORDER BY bounded.number
    LOOP
        FOREACH is_locked IN ARRAY ARRAY[false, true] LOOP
            IF is_locked THEN
                EXECUTE format('LOCK TABLE %I IN SHARE MODE', closed.name);
            END IF;
            -- Of a partition that somebody has detached nothing can be seen through the outbox.
            CONTINUE partition WHEN NOT EXISTS (
                    SELECT
                    FROM pg_inherits
                    WHERE inhrelid = to_regclass(closed.name)
                        AND inhparent = 'outbox'::regclass
                        AND NOT inhdetachpending
                )
                OR NOT outbox_numbers_are_old(closed.first_no, closed.end_no, older_than)
                OR EXISTS (
                    SELECT
                    FROM outbox_shard
                    JOIN outbox_pending AS pending USING (shard)
                    JOIN outbox USING (shard, sequence_no)
                    WHERE pending.sequence_no >= closed.first_no AND pending.sequence_no < closed.end_no
                )
                OR EXISTS (
                    SELECT
                    FROM outbox_unordered AS late
                    WHERE late.collected_at IS NULL
                        AND late.from_no < closed.end_no
                        AND NOT EXISTS (
                            SELECT
                            FROM pg_locks
                            WHERE locktype = 'transactionid'
                                AND transactionid = late.transaction_id::xid
                                AND mode = 'ExclusiveLock'
                        )
                );
        END LOOP;

        WITH place AS MATERIALIZED (
            SELECT
                outbox_shard.shard,
                coalesce((
                    SELECT mark.through
                    FROM outbox_published AS mark
                    WHERE mark.shard = outbox_shard.shard AND mark.through < edge.oldest
                    ORDER BY mark.through DESC
                    LIMIT 1
                ), 0) AS after_no,
                (
                    SELECT mark.through
                    FROM outbox_published AS mark
                    WHERE mark.shard = outbox_shard.shard AND mark.through >= edge.newest
                    ORDER BY mark.through
                    LIMIT 1
                ) AS through
            FROM outbox_shard
            CROSS JOIN LATERAL (
                SELECT min(outbox.sequence_no) AS oldest, max(outbox.sequence_no) AS newest
                FROM outbox
                WHERE outbox.shard = outbox_shard.shard
                    AND outbox.sequence_no >= closed.first_no
                    AND outbox.sequence_no < closed.end_no
            ) AS edge
            WHERE edge.oldest IS NOT NULL
        ),
        -- The marks over the rows of the partition may also have counted rows of its neighbours, which stay.
        compared AS MATERIALIZED (
            SELECT
                place.*,
                counted.rows,
                counted.left_messages,
                counted.left_checksum,
                (counted.messages = said.messages AND counted.checksum = said.checksum)
                OR (counted.messages < said.messages AND place.through <= reconciled_no) AS agrees
            FROM place
            CROSS JOIN LATERAL (
                SELECT
                    count(*) FILTER (WHERE line.weight = 1 AND line.is_here) AS rows,
                    sum(line.weight) AS messages,
                    bit_xor(line.sequence_no) AS checksum,
                    coalesce(sum(line.weight) FILTER (WHERE NOT line.is_here), 0) AS left_messages,
                    coalesce(bit_xor(line.sequence_no) FILTER (WHERE NOT line.is_here), 0) AS left_checksum
                FROM (
                    SELECT
                        1 AS weight,
                        outbox.sequence_no,
                        outbox.sequence_no >= closed.first_no AND outbox.sequence_no < closed.end_no AS is_here
                    FROM outbox
                    WHERE outbox.shard = place.shard
                        AND outbox.sequence_no > place.after_no
                        AND outbox.sequence_no <= place.through
                    UNION ALL
                    -- Messages of writers that were given up on come once more, for no mark has counted them. OFFSET 0
                    -- keeps the writers in front: without one, nothing is read.
                    SELECT
                        -1,
                        message.sequence_no,
                        message.sequence_no >= closed.first_no AND message.sequence_no < closed.end_no
                    FROM outbox_unordered AS late
                    CROSS JOIN LATERAL (
                        SELECT outbox.sequence_no
                        FROM outbox
                        WHERE outbox.shard = place.shard
                            AND outbox.sequence_no > greatest(place.after_no, late.from_no)
                            AND outbox.sequence_no <= least(place.through, late.to_no)
                            AND outbox.transaction_id = late.transaction_id
                        OFFSET 0
                    ) AS message
                ) AS line
            ) AS counted
            CROSS JOIN LATERAL (
                SELECT sum(mark.messages) AS messages, bit_xor(mark.checksum) AS checksum
                FROM outbox_published AS mark
                WHERE mark.shard = place.shard AND mark.through > place.after_no AND mark.through <= place.through
            ) AS said
        ),
        dropped AS MATERIALIZED (
            SELECT compared.*
            FROM compared
            WHERE (SELECT bool_and(each.agrees) FROM compared AS each)
        ),
        merged AS (
            DELETE FROM outbox_published AS mark
            USING dropped
            WHERE mark.shard = dropped.shard AND mark.through > dropped.after_no AND mark.through < dropped.through
        ),
        remaining AS (
            UPDATE outbox_published AS mark
            SET messages = dropped.left_messages,
                checksum = dropped.left_checksum,
                before_xid = greatest(mark.before_xid, pg_snapshot_xmax(pg_current_snapshot()))
            FROM dropped
            WHERE mark.shard = dropped.shard AND mark.through = dropped.through
        )
        SELECT
            coalesce(sum(compared.rows), 0)::bigint AS messages,
            array_agg(compared.shard) FILTER (WHERE NOT compared.agrees) AS shards,
            array_agg(compared.through) FILTER (WHERE NOT compared.agrees) AS throughs
        INTO outcome
        FROM compared;

        IF outcome.shards IS NOT NULL THEN
            RETURN QUERY SELECT NULL::bigint, * FROM unnest(outcome.shards, outcome.throughs);
            RETURN;
        END IF;
        EXECUTE format('DROP TABLE %I', closed.name);
        DELETE FROM outbox_partition WHERE number = closed.number;
        RETURN QUERY SELECT outcome.messages, NULL::smallint, NULL::bigint;
        RETURN;
    END LOOP;
END
$$;

CREATE FUNCTION app.outbox_forget() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'app', 'pg_temp'
    AS $$
BEGIN
    DELETE FROM outbox_published;
    DELETE FROM outbox_pending;
    DELETE FROM outbox_unordered;
    DELETE FROM outbox_reconciled;
    RETURN NULL;
END
$$;

CREATE FUNCTION app.outbox_numbers_are_old(first_no bigint, end_no bigint, older_than interval) RETURNS boolean
    LANGUAGE sql STABLE
    SET search_path TO 'app', 'pg_temp'
    AS $$
    SELECT NOT EXISTS (
        SELECT
        FROM outbox_shard
        CROSS JOIN LATERAL (
            SELECT outbox.sequence_no
            FROM outbox
            WHERE outbox.shard = outbox_shard.shard
                AND outbox.sequence_no >= outbox_numbers_are_old.first_no
                AND outbox.sequence_no < outbox_numbers_are_old.end_no
            ORDER BY outbox.sequence_no DESC
            LIMIT 1
        ) AS newest
        LEFT JOIN LATERAL (
            SELECT mark.published_at
            FROM outbox_published AS mark
            WHERE mark.shard = outbox_shard.shard AND mark.through >= newest.sequence_no
            ORDER BY mark.through
            LIMIT 1
        ) AS settled ON true
        WHERE settled.published_at < now() - outbox_numbers_are_old.older_than IS NOT TRUE
    )
$$;

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
        PERFORM setval('outbox_sequence_no_seq', opened.first_no + width, false)
        FROM outbox_sequence_no_seq
        WHERE last_value < opened.first_no + width;
        UPDATE outbox_partition SET closed_at = clock_timestamp() WHERE number = opened.number;
        UPDATE outbox_partition SET opened_at = clock_timestamp() WHERE number = opened.number + 1
        RETURNING * INTO STRICT opened;
    END IF;

    WHILE newest.number < opened.number + 2 LOOP
        SELECT 'WITH (' || array_to_string(reloptions, ', ') || ')' INTO settings
        FROM pg_class
        WHERE oid = format('outbox_p%s', newest.number)::regclass;
        INSERT INTO outbox_partition (number, first_no, open_for)
        VALUES (newest.number + 1, newest.first_no + width, newest.open_for)
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
            newest.first_no,
            newest.first_no + width
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
    message_id uuid DEFAULT gen_random_uuid() NOT NULL,
    aggregate_type text NOT NULL,
    aggregate_id text NOT NULL,
    event_type text NOT NULL,
    payload jsonb,
    payload_bytes bytea,
    headers jsonb DEFAULT '{}'::jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    transaction_id xid8 DEFAULT pg_current_xact_id() NOT NULL,
    sequence_no bigint NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtextextended(((aggregate_type || ':'::text) || aggregate_id), (0)::bigint) & (15)::bigint)) STORED NOT NULL,
    CONSTRAINT outbox_created_at_check CHECK (isfinite(created_at)),
    CONSTRAINT outbox_headers_object_check CHECK ((jsonb_typeof(headers) = 'object'::text)),
    CONSTRAINT outbox_one_payload_check CHECK ((num_nonnulls(payload, payload_bytes) <= 1))
)
PARTITION BY RANGE (sequence_no);
ALTER TABLE ONLY app.outbox ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE ONLY app.outbox ALTER COLUMN payload_bytes SET STORAGE EXTERNAL;

CREATE TABLE app.outbox_audit (
    id bigint NOT NULL,
    recorded_at timestamp with time zone DEFAULT now() NOT NULL,
    action text NOT NULL,
    session_role text DEFAULT SESSION_USER NOT NULL,
    operator text,
    why text,
    sequence_no bigint NOT NULL,
    message_id uuid,
    aggregate_type text NOT NULL,
    aggregate_id text,
    event_type text,
    payload jsonb,
    payload_bytes bytea,
    headers jsonb,
    created_at timestamp with time zone,
    parked_reason text NOT NULL,
    CONSTRAINT outbox_audit_action_check CHECK ((action = ANY (ARRAY['edit'::text, 'release'::text, 'skip'::text]))),
    CONSTRAINT outbox_audit_content_check CHECK (((action = 'release'::text) OR (message_id IS NULL) OR (headers IS NOT NULL)))
);

COMMENT ON COLUMN app.outbox_audit.operator IS 'The person, as given; session_role is what PostgreSQL knows';

COMMENT ON COLUMN app.outbox_audit.message_id IS 'Null: somebody had deleted the message from the outbox before';

COMMENT ON COLUMN app.outbox_audit.headers IS 'With payload and payload_bytes: as they were before an edit or a skip';

COMMENT ON COLUMN app.outbox_audit.created_at IS 'Of the message';

ALTER TABLE app.outbox_audit ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME app.outbox_audit_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE app.outbox_pending (
    shard smallint NOT NULL,
    sequence_no bigint NOT NULL,
    key_hash bigint NOT NULL,
    aggregate_type text NOT NULL,
    state text NOT NULL,
    reason_code text NOT NULL,
    reason text NOT NULL,
    is_unordered boolean DEFAULT false NOT NULL,
    since timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT outbox_pending_state_check CHECK ((state = ANY (ARRAY['waiting'::text, 'parked'::text])))
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='1000', autovacuum_vacuum_cost_delay='1');

COMMENT ON COLUMN app.outbox_pending.key_hash IS 'hashtextextended(aggregate_type || '':'' || aggregate_id, 0)';

COMMENT ON COLUMN app.outbox_pending.state IS 'waiting: the relay sends it; parked: an operator decides';

COMMENT ON COLUMN app.outbox_pending.is_unordered IS 'Later messages of its key may have been published before it';

CREATE TABLE app.outbox_published (
    shard smallint NOT NULL,
    through bigint NOT NULL,
    published_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    messages bigint NOT NULL,
    checksum bigint NOT NULL,
    before_xid xid8 DEFAULT pg_snapshot_xmax(pg_current_snapshot()) NOT NULL
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='1000', autovacuum_analyze_scale_factor='0.05', autovacuum_analyze_threshold='1000', autovacuum_vacuum_cost_delay='1');

COMMENT ON COLUMN app.outbox_published.messages IS 'Rows of the shard that this mark passed, above the mark before it';

COMMENT ON COLUMN app.outbox_published.checksum IS 'bit_xor of their numbers';

COMMENT ON COLUMN app.outbox_published.before_xid IS 'No transaction from this id on had ended when the mark was written';

CREATE TABLE app.outbox_unordered (
    transaction_id xid8 NOT NULL,
    from_no bigint NOT NULL,
    to_no bigint,
    recorded_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    collected_through bigint,
    collected_at timestamp with time zone
);

COMMENT ON COLUMN app.outbox_unordered.from_no IS 'Its messages have higher numbers than this';

COMMENT ON COLUMN app.outbox_unordered.to_no IS 'And none higher than this; null until its end was seen';

COMMENT ON COLUMN app.outbox_unordered.collected_through IS 'Those up to this number have been collected';

COMMENT ON COLUMN app.outbox_unordered.collected_at IS 'Null until all of them are collected';

CREATE VIEW app.outbox_message AS
 SELECT outbox.sequence_no,
    outbox.message_id,
    outbox.aggregate_type,
    outbox.aggregate_id,
    outbox.event_type,
    outbox.payload,
    outbox.payload_bytes,
    outbox.headers,
    outbox.created_at,
    status.state,
        CASE
            WHEN (status.state = 'published'::text) THEN ( SELECT mark.published_at
               FROM app.outbox_published mark
              WHERE ((mark.shard = outbox.shard) AND (mark.through >= outbox.sequence_no))
              ORDER BY mark.through
             LIMIT 1)
            ELSE NULL::timestamp with time zone
        END AS published_at,
    COALESCE(pending.since, late.recorded_at) AS since,
    COALESCE(pending.reason_code,
        CASE
            WHEN (late.transaction_id IS NOT NULL) THEN 'late'::text
            ELSE NULL::text
        END) AS reason_code,
    pending.reason,
    outbox.transaction_id,
    outbox.shard
   FROM ((((app.outbox
     LEFT JOIN LATERAL ( SELECT mark.through
           FROM app.outbox_published mark
          WHERE (mark.shard = outbox.shard)
          ORDER BY mark.through DESC
         LIMIT 1) newest ON (true))
     LEFT JOIN app.outbox_pending pending ON (((pending.key_hash = hashtextextended(((outbox.aggregate_type || ':'::text) || outbox.aggregate_id), (0)::bigint)) AND (pending.shard = outbox.shard) AND (pending.sequence_no = outbox.sequence_no))))
     LEFT JOIN app.outbox_unordered late ON (((late.transaction_id = outbox.transaction_id) AND (late.collected_at IS NULL) AND (outbox.sequence_no > COALESCE(late.collected_through, late.from_no)))))
     CROSS JOIN LATERAL ( SELECT
                CASE
                    WHEN (pending.state IS NOT NULL) THEN pending.state
                    WHEN (late.transaction_id IS NOT NULL) THEN 'waiting'::text
                    WHEN (outbox.sequence_no <= newest.through) THEN 'published'::text
                    ELSE 'unpublished'::text
                END AS state) status);

COMMENT ON COLUMN app.outbox_message.state IS 'unpublished, published, waiting or parked';

COMMENT ON COLUMN app.outbox_message.published_at IS 'When the first mark at or above the number was written';

CREATE TABLE app.outbox_p0 (
    message_id uuid DEFAULT gen_random_uuid() CONSTRAINT outbox_message_id_not_null NOT NULL,
    aggregate_type text CONSTRAINT outbox_aggregate_type_not_null NOT NULL,
    aggregate_id text CONSTRAINT outbox_aggregate_id_not_null NOT NULL,
    event_type text CONSTRAINT outbox_event_type_not_null NOT NULL,
    payload jsonb,
    payload_bytes bytea,
    headers jsonb DEFAULT '{}'::jsonb CONSTRAINT outbox_headers_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT outbox_created_at_not_null NOT NULL,
    transaction_id xid8 DEFAULT pg_current_xact_id() CONSTRAINT outbox_transaction_id_not_null NOT NULL,
    sequence_no bigint CONSTRAINT outbox_sequence_no_not_null NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtextextended(((aggregate_type || ':'::text) || aggregate_id), (0)::bigint) & (15)::bigint)) STORED CONSTRAINT outbox_shard_not_null NOT NULL,
    CONSTRAINT outbox_created_at_check CHECK (isfinite(created_at)),
    CONSTRAINT outbox_headers_object_check CHECK ((jsonb_typeof(headers) = 'object'::text)),
    CONSTRAINT outbox_one_payload_check CHECK ((num_nonnulls(payload, payload_bytes) <= 1))
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='10000', autovacuum_vacuum_insert_scale_factor='0.1', autovacuum_analyze_scale_factor='0.05', autovacuum_analyze_threshold='10000', autovacuum_vacuum_cost_delay='1');
ALTER TABLE ONLY app.outbox_p0 ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE ONLY app.outbox_p0 ALTER COLUMN payload_bytes SET STORAGE EXTERNAL;

CREATE TABLE app.outbox_p1 (
    message_id uuid DEFAULT gen_random_uuid() CONSTRAINT outbox_message_id_not_null NOT NULL,
    aggregate_type text CONSTRAINT outbox_aggregate_type_not_null NOT NULL,
    aggregate_id text CONSTRAINT outbox_aggregate_id_not_null NOT NULL,
    event_type text CONSTRAINT outbox_event_type_not_null NOT NULL,
    payload jsonb,
    payload_bytes bytea,
    headers jsonb DEFAULT '{}'::jsonb CONSTRAINT outbox_headers_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT outbox_created_at_not_null NOT NULL,
    transaction_id xid8 DEFAULT pg_current_xact_id() CONSTRAINT outbox_transaction_id_not_null NOT NULL,
    sequence_no bigint CONSTRAINT outbox_sequence_no_not_null NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtextextended(((aggregate_type || ':'::text) || aggregate_id), (0)::bigint) & (15)::bigint)) STORED CONSTRAINT outbox_shard_not_null NOT NULL,
    CONSTRAINT outbox_created_at_check CHECK (isfinite(created_at)),
    CONSTRAINT outbox_headers_object_check CHECK ((jsonb_typeof(headers) = 'object'::text)),
    CONSTRAINT outbox_one_payload_check CHECK ((num_nonnulls(payload, payload_bytes) <= 1))
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='10000', autovacuum_vacuum_insert_scale_factor='0.1', autovacuum_analyze_scale_factor='0.05', autovacuum_analyze_threshold='10000', autovacuum_vacuum_cost_delay='1');
ALTER TABLE ONLY app.outbox_p1 ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE ONLY app.outbox_p1 ALTER COLUMN payload_bytes SET STORAGE EXTERNAL;

CREATE TABLE app.outbox_p2 (
    message_id uuid DEFAULT gen_random_uuid() CONSTRAINT outbox_message_id_not_null NOT NULL,
    aggregate_type text CONSTRAINT outbox_aggregate_type_not_null NOT NULL,
    aggregate_id text CONSTRAINT outbox_aggregate_id_not_null NOT NULL,
    event_type text CONSTRAINT outbox_event_type_not_null NOT NULL,
    payload jsonb,
    payload_bytes bytea,
    headers jsonb DEFAULT '{}'::jsonb CONSTRAINT outbox_headers_not_null NOT NULL,
    created_at timestamp with time zone DEFAULT now() CONSTRAINT outbox_created_at_not_null NOT NULL,
    transaction_id xid8 DEFAULT pg_current_xact_id() CONSTRAINT outbox_transaction_id_not_null NOT NULL,
    sequence_no bigint CONSTRAINT outbox_sequence_no_not_null NOT NULL,
    shard smallint GENERATED ALWAYS AS ((hashtextextended(((aggregate_type || ':'::text) || aggregate_id), (0)::bigint) & (15)::bigint)) STORED CONSTRAINT outbox_shard_not_null NOT NULL,
    CONSTRAINT outbox_created_at_check CHECK (isfinite(created_at)),
    CONSTRAINT outbox_headers_object_check CHECK ((jsonb_typeof(headers) = 'object'::text)),
    CONSTRAINT outbox_one_payload_check CHECK ((num_nonnulls(payload, payload_bytes) <= 1))
)
WITH (autovacuum_vacuum_scale_factor='0.05', autovacuum_vacuum_threshold='10000', autovacuum_vacuum_insert_scale_factor='0.1', autovacuum_analyze_scale_factor='0.05', autovacuum_analyze_threshold='10000', autovacuum_vacuum_cost_delay='1');
ALTER TABLE ONLY app.outbox_p2 ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE ONLY app.outbox_p2 ALTER COLUMN payload_bytes SET STORAGE EXTERNAL;

CREATE TABLE app.outbox_partition (
    number integer NOT NULL,
    first_no bigint NOT NULL,
    open_for interval DEFAULT '1 day'::interval NOT NULL,
    opened_at timestamp with time zone,
    closed_at timestamp with time zone,
    made_in xid8 DEFAULT pg_current_xact_id() NOT NULL,
    CONSTRAINT outbox_partition_open_for_check CHECK ((open_for > '00:00:00'::interval))
);

COMMENT ON COLUMN app.outbox_partition.first_no IS 'The partition is outbox_p<number> and has the numbers from here on';

COMMENT ON COLUMN app.outbox_partition.open_for IS 'How long new rows go there before the next partition is opened';

COMMENT ON COLUMN app.outbox_partition.opened_at IS 'Null: made ahead';

CREATE TABLE app.outbox_reconciled (
    shard smallint NOT NULL,
    checked_through bigint DEFAULT 0 NOT NULL,
    thinned_through bigint DEFAULT 0 NOT NULL
)
WITH (fillfactor='50');

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
    published_through bigint[] NOT NULL,
    messages bigint DEFAULT 0 NOT NULL,
    reached_no bigint DEFAULT 0 NOT NULL,
    finished_at timestamp with time zone,
    CONSTRAINT outbox_replay_name_check CHECK ((name ~ '^[A-Za-z0-9._-]{1,100}$'::text))
)
WITH (fillfactor='50');

COMMENT ON COLUMN app.outbox_replay.operator IS 'The person, as given; session_role is what PostgreSQL knows';

COMMENT ON COLUMN app.outbox_replay.published_through IS 'The newest mark of each shard, from 0 up, when it began; what was published later is no part of it';

ALTER TABLE app.outbox ALTER COLUMN sequence_no ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME app.outbox_sequence_no_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE app.outbox_shard (
    shard smallint NOT NULL
);

ALTER TABLE ONLY app.outbox ATTACH PARTITION app.outbox_p0 FOR VALUES FROM (MINVALUE) TO ('100000000000');

ALTER TABLE ONLY app.outbox ATTACH PARTITION app.outbox_p1 FOR VALUES FROM ('100000000000') TO ('200000000000');

ALTER TABLE ONLY app.outbox ATTACH PARTITION app.outbox_p2 FOR VALUES FROM ('200000000000') TO ('300000000000');

ALTER TABLE ONLY app.outbox_audit
    ADD CONSTRAINT outbox_audit_pkey PRIMARY KEY (id);

ALTER TABLE ONLY app.outbox
    ADD CONSTRAINT outbox_pkey PRIMARY KEY (shard, sequence_no);

ALTER TABLE ONLY app.outbox_p0
    ADD CONSTRAINT outbox_p0_pkey PRIMARY KEY (shard, sequence_no);

ALTER TABLE ONLY app.outbox_p1
    ADD CONSTRAINT outbox_p1_pkey PRIMARY KEY (shard, sequence_no);

ALTER TABLE ONLY app.outbox_p2
    ADD CONSTRAINT outbox_p2_pkey PRIMARY KEY (shard, sequence_no);

ALTER TABLE ONLY app.outbox_partition
    ADD CONSTRAINT outbox_partition_pkey PRIMARY KEY (number);

ALTER TABLE ONLY app.outbox_pending
    ADD CONSTRAINT outbox_pending_pkey PRIMARY KEY (shard, sequence_no);

ALTER TABLE ONLY app.outbox_published
    ADD CONSTRAINT outbox_published_pkey PRIMARY KEY (shard, through);

ALTER TABLE ONLY app.outbox_reconciled
    ADD CONSTRAINT outbox_reconciled_pkey PRIMARY KEY (shard);

ALTER TABLE ONLY app.outbox_relay_migration
    ADD CONSTRAINT outbox_relay_migration_pkey PRIMARY KEY (line, version);

ALTER TABLE ONLY app.outbox_replay
    ADD CONSTRAINT outbox_replay_pkey PRIMARY KEY (name);

ALTER TABLE ONLY app.outbox_shard
    ADD CONSTRAINT outbox_shard_pkey PRIMARY KEY (shard);

ALTER TABLE ONLY app.outbox_unordered
    ADD CONSTRAINT outbox_unordered_pkey PRIMARY KEY (transaction_id);

CREATE INDEX outbox_pending_key_idx ON app.outbox_pending USING btree (key_hash, is_unordered, state, sequence_no);

CREATE INDEX outbox_pending_waiting_idx ON app.outbox_pending USING btree (shard, hashtextextended(aggregate_type, (0)::bigint), sequence_no) WHERE (state = 'waiting'::text);

ALTER INDEX app.outbox_pkey ATTACH PARTITION app.outbox_p0_pkey;

ALTER INDEX app.outbox_pkey ATTACH PARTITION app.outbox_p1_pkey;

ALTER INDEX app.outbox_pkey ATTACH PARTITION app.outbox_p2_pkey;

CREATE TRIGGER outbox_forget_trigger AFTER TRUNCATE ON app.outbox FOR EACH STATEMENT EXECUTE FUNCTION app.outbox_forget();

GRANT USAGE ON SCHEMA app TO outbox_writer;
GRANT USAGE ON SCHEMA app TO outbox_relay;
GRANT USAGE ON SCHEMA app TO outbox_pruner;
GRANT USAGE ON SCHEMA app TO outbox_operator;

REVOKE ALL ON FUNCTION app.outbox_drop_partition(older_than interval, reconciled_no bigint) FROM PUBLIC;
GRANT ALL ON FUNCTION app.outbox_drop_partition(older_than interval, reconciled_no bigint) TO outbox_pruner;

REVOKE ALL ON FUNCTION app.outbox_forget() FROM PUBLIC;

REVOKE ALL ON FUNCTION app.outbox_numbers_are_old(first_no bigint, end_no bigint, older_than interval) FROM PUBLIC;
GRANT ALL ON FUNCTION app.outbox_numbers_are_old(first_no bigint, end_no bigint, older_than interval) TO outbox_pruner;

REVOKE ALL ON FUNCTION app.outbox_open_partition() FROM PUBLIC;
GRANT ALL ON FUNCTION app.outbox_open_partition() TO outbox_pruner;

REVOKE ALL ON FUNCTION app.outbox_write(aggregate_type text, aggregate_id text, event_type text, payload jsonb, payload_bytes bytea, headers jsonb, message_id uuid) FROM PUBLIC;
GRANT ALL ON FUNCTION app.outbox_write(aggregate_type text, aggregate_id text, event_type text, payload jsonb, payload_bytes bytea, headers jsonb, message_id uuid) TO outbox_writer;

GRANT SELECT ON TABLE app.outbox TO outbox_relay;
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

GRANT SELECT ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(action) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(operator) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(why) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(sequence_no) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(message_id) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(aggregate_type) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(aggregate_id) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(event_type) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(payload) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(payload_bytes) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(headers) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(created_at) ON TABLE app.outbox_audit TO outbox_operator;

GRANT INSERT(parked_reason) ON TABLE app.outbox_audit TO outbox_operator;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE app.outbox_pending TO outbox_relay;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE app.outbox_pending TO outbox_pruner;
GRANT SELECT,DELETE ON TABLE app.outbox_pending TO outbox_operator;

GRANT UPDATE(state) ON TABLE app.outbox_pending TO outbox_operator;

GRANT UPDATE(reason_code) ON TABLE app.outbox_pending TO outbox_operator;

GRANT UPDATE(reason) ON TABLE app.outbox_pending TO outbox_operator;

GRANT UPDATE(is_unordered) ON TABLE app.outbox_pending TO outbox_operator;

GRANT UPDATE(since) ON TABLE app.outbox_pending TO outbox_operator;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE app.outbox_published TO outbox_relay;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE app.outbox_published TO outbox_pruner;
GRANT SELECT ON TABLE app.outbox_published TO outbox_operator;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE app.outbox_unordered TO outbox_relay;
GRANT SELECT,DELETE ON TABLE app.outbox_unordered TO outbox_pruner;
GRANT SELECT ON TABLE app.outbox_unordered TO outbox_operator;

GRANT SELECT ON TABLE app.outbox_message TO outbox_relay;
GRANT SELECT ON TABLE app.outbox_message TO outbox_pruner;
GRANT SELECT ON TABLE app.outbox_message TO outbox_operator;

GRANT SELECT ON TABLE app.outbox_partition TO outbox_relay;
GRANT SELECT ON TABLE app.outbox_partition TO outbox_pruner;
GRANT SELECT ON TABLE app.outbox_partition TO outbox_operator;

GRANT SELECT,INSERT,UPDATE ON TABLE app.outbox_reconciled TO outbox_relay;
GRANT SELECT,INSERT,UPDATE ON TABLE app.outbox_reconciled TO outbox_pruner;
GRANT SELECT ON TABLE app.outbox_reconciled TO outbox_operator;

GRANT SELECT ON TABLE app.outbox_relay_migration TO outbox_relay;

GRANT SELECT ON TABLE app.outbox_replay TO outbox_operator;

GRANT INSERT(name) ON TABLE app.outbox_replay TO outbox_operator;

GRANT INSERT(operator) ON TABLE app.outbox_replay TO outbox_operator;

GRANT INSERT(why) ON TABLE app.outbox_replay TO outbox_operator;

GRANT INSERT(selection) ON TABLE app.outbox_replay TO outbox_operator;

GRANT INSERT(published_through) ON TABLE app.outbox_replay TO outbox_operator;

GRANT UPDATE(messages) ON TABLE app.outbox_replay TO outbox_operator;

GRANT UPDATE(reached_no) ON TABLE app.outbox_replay TO outbox_operator;

GRANT UPDATE(finished_at) ON TABLE app.outbox_replay TO outbox_operator;

GRANT SELECT ON SEQUENCE app.outbox_sequence_no_seq TO outbox_relay;
GRANT SELECT ON SEQUENCE app.outbox_sequence_no_seq TO outbox_pruner;
GRANT SELECT ON SEQUENCE app.outbox_sequence_no_seq TO outbox_operator;

GRANT SELECT ON TABLE app.outbox_shard TO outbox_relay;
GRANT SELECT ON TABLE app.outbox_shard TO outbox_pruner;
GRANT SELECT ON TABLE app.outbox_shard TO outbox_operator;

GRANT UPDATE(shard) ON TABLE app.outbox_shard TO outbox_relay;
GRANT UPDATE(shard) ON TABLE app.outbox_shard TO outbox_pruner;
GRANT UPDATE(shard) ON TABLE app.outbox_shard TO outbox_operator;

