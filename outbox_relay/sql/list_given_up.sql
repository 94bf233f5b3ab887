-- The writers that were given up on and are not known to have ended.
SELECT transaction_id::text
FROM {schema}.outbox_unordered
WHERE to_no IS NULL
