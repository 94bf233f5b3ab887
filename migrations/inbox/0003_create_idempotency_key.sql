-- Idempotency keys: a request is recorded here, in the transaction of its effects, with the response to give again.

CREATE TABLE idempotency_key (
    scope          text NOT NULL,
    key            text NOT NULL,
    fingerprint    text NOT NULL,
    -- Drawn anew by everyone who takes the key, so that whoever had it before can do nothing more under it.
    fencing_token  bigint GENERATED ALWAYS AS IDENTITY,
    recovery_point text,                         -- the last step that is committed, for a request of several steps
    step_results   json NOT NULL DEFAULT '{}',   -- the result of each step, by its name
    response       json,                         -- json, not jsonb: it is given again as it was written
    created_at     timestamptz NOT NULL DEFAULT now(),
    locked_until   timestamptz NOT NULL,
    finished_at    timestamptz,
    expires_at     timestamptz NOT NULL,
    CONSTRAINT idempotency_key_pkey PRIMARY KEY (scope, key),
    CONSTRAINT idempotency_key_response_check CHECK ((response IS NULL) = (finished_at IS NULL)),
    CONSTRAINT idempotency_key_expires_at_check CHECK (finished_at IS NOT NULL OR expires_at >= locked_until)
) WITH (fillfactor = 50);  -- room for the version with the response on the same page

-- Pruning looks for what has expired.
CREATE INDEX idempotency_key_expires_at_idx ON idempotency_key (scope, expires_at);

GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_key TO inbox_consumer;
