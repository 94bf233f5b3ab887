-- Stores the response; no row if another has taken the key.
UPDATE {schema}.idempotency_key
SET response = %(response)s,
    finished_at = statement_timestamp()
WHERE scope = %(scope)s
    AND key = %(key)s
    AND fencing_token = %(fencing_token)s
    AND finished_at IS NULL
RETURNING true
