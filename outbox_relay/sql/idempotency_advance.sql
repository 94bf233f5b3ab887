-- Moves the recovery point, in the transaction of the step, and gives the request time for the next; no row if another
-- has taken the key.
UPDATE {schema}.idempotency_key
SET recovery_point = %(recovery_point)s,
    step_results = %(step_results)s,
    locked_until = statement_timestamp() + %(takeover_after)s,
    expires_at = greatest(expires_at, statement_timestamp() + %(takeover_after)s)
WHERE scope = %(scope)s
    AND key = %(key)s
    AND fencing_token = %(fencing_token)s
    AND finished_at IS NULL
RETURNING true
