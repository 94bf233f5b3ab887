-- Adds the result of a step, moves the recovery point in the transaction of the step, and gives the request time for the
-- next; no row if another has taken the key.
--
-- The result is added to what the row has now, not to what this process knew: a step that runs beside it may have been
-- committed since. As json, which keeps each result as it was written.
UPDATE {schema}.idempotency_key
SET recovery_point = %(recovery_point)s,
    step_results = (
        SELECT json_object_agg(done.name, done.result)
        FROM (
            SELECT key, value FROM json_each(idempotency_key.step_results)
            UNION ALL
            SELECT %(recovery_point)s, %(result)s::json
        ) AS done (name, result)
    ),
    locked_until = statement_timestamp() + %(takeover_after)s,
    expires_at = greatest(expires_at, statement_timestamp() + %(takeover_after)s)
WHERE scope = %(scope)s
    AND key = %(key)s
    AND fencing_token = %(fencing_token)s
    AND finished_at IS NULL
RETURNING true
