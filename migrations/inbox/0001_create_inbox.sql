-- The inbox: a consumer records here, in the transaction of its effects, what it has consumed.

-- One row per message, for consumers that deduplicate by message id.
CREATE TABLE inbox_message (
    consumer    text NOT NULL,
    message_id  uuid NOT NULL,
    -- The message's own time, the same in every delivery, so that the table can be partitioned by it.
    created_at  timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    result      jsonb,
    CONSTRAINT inbox_message_pkey PRIMARY KEY (consumer, message_id)
);

-- Pruning takes a consumer's oldest rows in batches, and each batch begins where the last one ended. The rows of one
-- transaction have one received_at, so that the index stores it once for all of them.
CREATE INDEX inbox_message_received_at_idx ON inbox_message (consumer, received_at);

ALTER TABLE inbox_message SET (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_scale_factor = 0.1
);

-- One row per key, for consumers that deduplicate by sequence number.
--
-- A key and its type are as long as an application makes them, and an index takes no more than 2,700 bytes: so it holds
-- a hash of them, SHA-256 over source, type and key.
CREATE TABLE inbox_sequence (
    consumer             text NOT NULL,
    source               text NOT NULL,
    topic                text NOT NULL,
    partition            integer NOT NULL,
    aggregate_type       text NOT NULL,  -- types may share a topic, and numbers rise per type and id
    key                  text NOT NULL,
    key_hash             bytea NOT NULL,
    sequence_no          bigint NOT NULL,
    -- What sequence_no was before the last delivery, 0 if there was none: tells the transaction that wrote it which
    -- messages are new.
    previous_sequence_no bigint NOT NULL,
    CONSTRAINT inbox_sequence_pkey PRIMARY KEY (consumer, topic, partition, key_hash)
) WITH (fillfactor = 50);  -- room for the next version of each row on its own page

-- Where each partition is to be read from, for consumers that keep their offsets with their effects.
CREATE TABLE inbox_offset (
    consumer    text NOT NULL,
    topic       text NOT NULL,
    partition   integer NOT NULL,
    next_offset bigint NOT NULL,
    CONSTRAINT inbox_offset_pkey PRIMARY KEY (consumer, topic, partition)
) WITH (fillfactor = 50);
