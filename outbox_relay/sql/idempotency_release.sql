-- Lets the next one take over at once a request that has failed; no row if another has taken the key.
UPDATE {schema}.idempotency_key
SET locked_until = statement_timestamp()
WHERE scope = %(scope)s
    AND key = %(key)s
    AND fencing_token = %(fencing_token)s
    AND finished_at IS NULL
RETURNING true
