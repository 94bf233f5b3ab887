-- The outbox: applications insert here in their own transaction, the relay publishes and marks.

CREATE TABLE outbox (
    id             bigint GENERATED ALWAYS AS IDENTITY,
    message_id     uuid NOT NULL DEFAULT gen_random_uuid(),
    aggregate_type text NOT NULL,
    aggregate_id   text NOT NULL,
    event_type     text NOT NULL,
    payload        jsonb,
    payload_bytes  bytea,
    headers        jsonb NOT NULL DEFAULT '{}',
    created_at     timestamptz NOT NULL DEFAULT now(),
    published_at   timestamptz,
    parked_at      timestamptz,
    parked_reason  text,
    -- Stands before sequence_no: defaults are evaluated in column order, so a writer has its transaction id
    -- before it draws its number. The horizon relies on it.
    transaction_id xid8 NOT NULL DEFAULT pg_current_xact_id(),
    sequence_no    bigint GENERATED ALWAYS AS IDENTITY,
    shard          smallint GENERATED ALWAYS AS (hashtextextended(aggregate_type || ':' || aggregate_id, 0) & 15) STORED,
    CONSTRAINT outbox_pkey PRIMARY KEY (id),
    CONSTRAINT outbox_one_payload_check CHECK (num_nonnulls(payload, payload_bytes) <= 1),
    CONSTRAINT outbox_headers_object_check CHECK (jsonb_typeof(headers) = 'object'),
    CONSTRAINT outbox_created_at_check CHECK (isfinite(created_at))
);

-- Uncompressed, so that the size of a payload is known without reading it: the relay bounds a batch by bytes.
ALTER TABLE outbox ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE outbox ALTER COLUMN payload_bytes SET STORAGE EXTERNAL;

-- sequence_no has no unique index on purpose: the planner would claim through it and walk the published rows.
CREATE INDEX outbox_unpublished_idx ON outbox (shard, sequence_no)
    WHERE published_at IS NULL AND parked_at IS NULL;

CREATE INDEX outbox_parked_idx ON outbox (shard, aggregate_type, aggregate_id, sequence_no)
    WHERE parked_at IS NOT NULL;

ALTER TABLE outbox SET (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_scale_factor = 0.1,
    autovacuum_analyze_scale_factor = 0.05,
    autovacuum_analyze_threshold = 10000,
    autovacuum_vacuum_cost_delay = 1
);

-- The unit of claiming: one row per shard, locked while one relay publishes that shard's rows.
-- Only FOR UPDATE may lock these rows, so that xmax always names the transaction of a relay.
CREATE TABLE outbox_shard (
    shard      smallint NOT NULL,
    generation bigint NOT NULL DEFAULT 0,
    CONSTRAINT outbox_shard_pkey PRIMARY KEY (shard)
);

INSERT INTO outbox_shard (shard)
SELECT generate_series(0, 15);

-- Transactions that stayed open longer than the ordering timeout: newer rows have overtaken theirs,
-- so their rows are published with the header "unordered".
CREATE TABLE outbox_unordered (
    transaction_id xid8 NOT NULL,
    recorded_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT outbox_unordered_pkey PRIMARY KEY (transaction_id)
);
