-- Removes the keys that expired first, at most so many, and leaves those that are being taken again.
WITH expired AS MATERIALIZED (
    SELECT key
    FROM {schema}.idempotency_key
    WHERE scope = %(scope)s AND expires_at <= statement_timestamp()
    ORDER BY expires_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
),
pruned AS (
    DELETE FROM {schema}.idempotency_key
    USING expired
    WHERE idempotency_key.scope = %(scope)s AND idempotency_key.key = expired.key
    RETURNING true
)
SELECT count(*) FROM pruned
