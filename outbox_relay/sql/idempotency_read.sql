-- What is known of a key that could not be taken; the response is NULL while the request is at work.
SELECT
    fingerprint,
    response::text,
    extract(epoch FROM locked_until - statement_timestamp())::float AS locked_seconds
FROM {schema}.idempotency_key
WHERE scope = %(scope)s AND key = %(key)s
