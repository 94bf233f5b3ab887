-- Replays: messages that operators published again. One row for each, which says who, when, why, what, and how far it
-- came.

CREATE TABLE outbox_replay (
    name              text NOT NULL,
    started_at        timestamptz NOT NULL DEFAULT now(),
    session_role      text NOT NULL DEFAULT session_user,
    operator          text,
    why               text NOT NULL,
    selection         jsonb NOT NULL,
    published_through bigint[] NOT NULL,
    messages          bigint NOT NULL DEFAULT 0,
    -- Kafka has acknowledged what is selected up to this number; a replay that was interrupted goes on behind it.
    reached_no        bigint NOT NULL DEFAULT 0,
    finished_at       timestamptz,
    CONSTRAINT outbox_replay_pkey PRIMARY KEY (name),
    CONSTRAINT outbox_replay_name_check CHECK (name ~ '^[A-Za-z0-9._-]{1,100}$')
) WITH (fillfactor = 50);  -- room for the next version of a row on its own page

COMMENT ON COLUMN outbox_replay.operator IS 'The person, as given; session_role is what PostgreSQL knows';
COMMENT ON COLUMN outbox_replay.published_through IS
    'The newest mark of each shard, from 0 up, when it began; what was published later is no part of it';

-- Operators begin replays and say how far they came; what was begun, and by whom, they cannot change.
GRANT SELECT ON outbox_replay TO outbox_operator;
GRANT INSERT (name, operator, why, selection, published_through), UPDATE (messages, reached_no, finished_at)
    ON outbox_replay TO outbox_operator;
