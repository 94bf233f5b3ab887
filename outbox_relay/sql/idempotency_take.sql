-- Takes a key that is new or has expired, or whose request has not moved for as long as it may; a NULL token if it may
-- not be taken.
--
-- A twin that is inserting the same key is waited for by this INSERT, and no longer than the setting allows, which is
-- put back once the INSERT is done. A request is taken over only by the same request, by its fingerprint. The token is
-- new each time and never used twice, so that nobody who held the key before, pruned since or not, can go on with it.
WITH setting AS MATERIALIZED (
    SELECT current_setting('lock_timeout') AS before, set_config('lock_timeout', %(wait)s, true) AS during
),
taken AS (
    INSERT INTO {schema}.idempotency_key AS known (scope, key, fingerprint, locked_until, expires_at)
    SELECT
        %(scope)s,
        %(key)s,
        %(fingerprint)s,
        statement_timestamp() + %(takeover_after)s,
        statement_timestamp() + %(expires_after)s
    FROM setting
    WHERE during IS NOT NULL
    ON CONFLICT (scope, key) DO UPDATE
    SET fingerprint = excluded.fingerprint,
        fencing_token = DEFAULT,
        recovery_point = CASE WHEN known.expires_at > statement_timestamp() THEN known.recovery_point END,
        step_results = CASE WHEN known.expires_at > statement_timestamp() THEN known.step_results ELSE '{}' END,
        response = NULL,
        created_at = CASE WHEN known.expires_at > statement_timestamp() THEN known.created_at ELSE now() END,
        locked_until = excluded.locked_until,
        finished_at = NULL,
        expires_at = excluded.expires_at
    WHERE known.expires_at <= statement_timestamp()
        OR (
            known.finished_at IS NULL
            AND known.locked_until <= statement_timestamp()
            AND known.fingerprint = excluded.fingerprint
        )
    RETURNING fencing_token, step_results
)
SELECT
    taken.fencing_token,
    taken.step_results::text,
    set_config('lock_timeout', setting.before, true)
FROM setting
LEFT JOIN taken ON true
