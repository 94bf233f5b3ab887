-- The outbox as a log. Applications insert messages in their own transactions and nobody changes them afterwards: what
-- is published is said by marks, in a table of their own.

CREATE TABLE outbox (
    message_id     uuid NOT NULL DEFAULT gen_random_uuid(),
    aggregate_type text NOT NULL,
    aggregate_id   text NOT NULL,
    event_type     text NOT NULL,
    payload        jsonb,
    payload_bytes  bytea,
    headers        jsonb NOT NULL DEFAULT '{}',
    created_at     timestamptz NOT NULL DEFAULT now(),
    -- Stands before sequence_no: defaults are evaluated in column order, so a writer has its transaction id
    -- before it draws its number. The horizon relies on it.
    transaction_id xid8 NOT NULL DEFAULT pg_current_xact_id(),
    sequence_no    bigint GENERATED ALWAYS AS IDENTITY,
    shard          smallint GENERATED ALWAYS AS (hashtextextended(aggregate_type || ':' || aggregate_id, 0) & 15) STORED,
    CONSTRAINT outbox_pkey PRIMARY KEY (shard, sequence_no),
    CONSTRAINT outbox_one_payload_check CHECK (num_nonnulls(payload, payload_bytes) <= 1),
    CONSTRAINT outbox_headers_object_check CHECK (jsonb_typeof(headers) = 'object'),
    CONSTRAINT outbox_created_at_check CHECK (isfinite(created_at))
);

-- Uncompressed, so that the size of a payload is known without reading it: the relay bounds a batch by bytes.
ALTER TABLE outbox ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE outbox ALTER COLUMN payload_bytes SET STORAGE EXTERNAL;

-- Rows are only inserted, and removed by retention. Vacuum keeps the visibility map, by which rows are counted from the
-- index alone.
ALTER TABLE outbox SET (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_scale_factor = 0.1,
    autovacuum_analyze_scale_factor = 0.05,
    autovacuum_analyze_threshold = 10000,
    autovacuum_vacuum_cost_delay = 1
);

-- The unit of claiming: one row per shard, locked while one relay publishes that shard's messages. The rows are never
-- updated, and only FOR UPDATE may lock them, so that xmax always names the transaction of a relay.
CREATE TABLE outbox_shard (
    shard smallint NOT NULL,
    CONSTRAINT outbox_shard_pkey PRIMARY KEY (shard)
);

INSERT INTO outbox_shard (shard)
SELECT generate_series(0, 15);

-- The marks, newest first in the index: every message of the shard up to the highest `through` is settled, but for
-- those in outbox_pending and those of writers in outbox_unordered that are not collected.
CREATE TABLE outbox_published (
    shard        smallint NOT NULL,
    through      bigint NOT NULL,
    published_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    messages     bigint NOT NULL,
    checksum     bigint NOT NULL,
    before_xid   xid8 NOT NULL DEFAULT pg_snapshot_xmax(pg_current_snapshot()),
    CONSTRAINT outbox_published_pkey PRIMARY KEY (shard, through)
);

COMMENT ON COLUMN outbox_published.messages IS 'Rows of the shard that this mark passed, above the mark before it';
COMMENT ON COLUMN outbox_published.checksum IS 'bit_xor of their numbers';
COMMENT ON COLUMN outbox_published.before_xid IS 'No transaction from this id on had ended when the mark was written';

ALTER TABLE outbox_published SET (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_analyze_scale_factor = 0.05,
    autovacuum_analyze_threshold = 1000,
    autovacuum_vacuum_cost_delay = 1
);

-- The few messages that the marks have passed and that are not in Kafka. No index holds a text, for an application can
-- make its keys longer than an index takes.
CREATE TABLE outbox_pending (
    shard          smallint NOT NULL,
    sequence_no    bigint NOT NULL,
    key_hash       bigint NOT NULL,
    aggregate_type text NOT NULL,
    state          text NOT NULL,
    reason_code    text NOT NULL,
    reason         text NOT NULL,
    is_unordered   boolean NOT NULL DEFAULT false,
    since          timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT outbox_pending_pkey PRIMARY KEY (shard, sequence_no),
    CONSTRAINT outbox_pending_state_check CHECK (state IN ('waiting', 'parked'))
);

COMMENT ON COLUMN outbox_pending.key_hash IS 'hashtextextended(aggregate_type || '':'' || aggregate_id, 0)';
COMMENT ON COLUMN outbox_pending.state IS 'waiting: the relay sends it; parked: an operator decides';
COMMENT ON COLUMN outbox_pending.is_unordered IS 'Later messages of its key may have been published before it';

CREATE INDEX outbox_pending_key_idx ON outbox_pending (key_hash, is_unordered, state, sequence_no);

-- What waits, by aggregate type: messages of topics that are away are passed over without being read, though there be
-- millions.
CREATE INDEX outbox_pending_waiting_idx ON outbox_pending (shard, hashtextextended(aggregate_type, 0), sequence_no)
    WHERE state = 'waiting';

ALTER TABLE outbox_pending SET (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 1
);

-- Writers that stayed open longer than the ordering timeout and were given up on: newer messages have overtaken theirs.
-- No mark counts their messages. Once such a writer has ended, they are collected into outbox_pending.
CREATE TABLE outbox_unordered (
    transaction_id    xid8 NOT NULL,
    from_no           bigint NOT NULL,
    to_no             bigint,
    recorded_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    collected_through bigint,
    collected_at      timestamptz,
    CONSTRAINT outbox_unordered_pkey PRIMARY KEY (transaction_id)
);

COMMENT ON COLUMN outbox_unordered.from_no IS 'Its messages have higher numbers than this';
COMMENT ON COLUMN outbox_unordered.to_no IS 'And none higher than this; null until its end was seen';
COMMENT ON COLUMN outbox_unordered.collected_through IS 'Those up to this number have been collected';
COMMENT ON COLUMN outbox_unordered.collected_at IS 'Null until all of them are collected';

-- How far the marks have been compared with the rows, and how far they have been thinned.
CREATE TABLE outbox_reconciled (
    shard           smallint NOT NULL,
    checked_through bigint NOT NULL DEFAULT 0,
    thinned_through bigint NOT NULL DEFAULT 0,
    CONSTRAINT outbox_reconciled_pkey PRIMARY KEY (shard)
) WITH (fillfactor = 50);  -- room for the next version of a row on its own page

-- Whoever empties the outbox empties what is said about its rows, whatever rights he has beside TRUNCATE.
CREATE FUNCTION outbox_forget()
RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
AS $$
BEGIN
    DELETE FROM outbox_published;
    DELETE FROM outbox_pending;
    DELETE FROM outbox_unordered;
    DELETE FROM outbox_reconciled;
    RETURN NULL;
END
$$;

DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION outbox_forget SET search_path = %I, pg_temp', current_schema());
END
$$;

REVOKE EXECUTE ON FUNCTION outbox_forget FROM PUBLIC;

CREATE TRIGGER outbox_forget_trigger AFTER TRUNCATE ON outbox
    FOR EACH STATEMENT EXECUTE FUNCTION outbox_forget();

-- The messages as people ask for them, one row each, with what the marks say of them. Lanes do not read it. The
-- hash of the key keeps plans that were made while outbox_pending was empty from searching all of its other index.
CREATE VIEW outbox_message AS
SELECT
    outbox.sequence_no,
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
        WHEN status.state = 'published' THEN (
            SELECT mark.published_at
            FROM outbox_published AS mark
            WHERE mark.shard = outbox.shard AND mark.through >= outbox.sequence_no
            ORDER BY mark.through
            LIMIT 1
        )
    END AS published_at,
    coalesce(pending.since, late.recorded_at) AS since,
    coalesce(pending.reason_code, CASE WHEN late.transaction_id IS NOT NULL THEN 'late' END) AS reason_code,
    pending.reason,
    outbox.transaction_id,
    outbox.shard
FROM outbox
LEFT JOIN LATERAL (
    SELECT mark.through
    FROM outbox_published AS mark
    WHERE mark.shard = outbox.shard
    ORDER BY mark.through DESC
    LIMIT 1
) AS newest ON true
LEFT JOIN outbox_pending AS pending
    ON pending.key_hash = hashtextextended(outbox.aggregate_type || ':' || outbox.aggregate_id, 0)
    AND pending.shard = outbox.shard
    AND pending.sequence_no = outbox.sequence_no
LEFT JOIN outbox_unordered AS late
    ON late.transaction_id = outbox.transaction_id
    AND late.collected_at IS NULL
    AND outbox.sequence_no > coalesce(late.collected_through, late.from_no)
CROSS JOIN LATERAL (
    SELECT
        CASE
            WHEN pending.state IS NOT NULL THEN pending.state
            WHEN late.transaction_id IS NOT NULL THEN 'waiting'
            WHEN outbox.sequence_no <= newest.through THEN 'published'
            ELSE 'unpublished'
        END AS state
) AS status;

COMMENT ON COLUMN outbox_message.state IS 'unpublished, published, waiting or parked';
COMMENT ON COLUMN outbox_message.published_at IS 'When the first mark at or above the number was written';
