-- The ids that there are now, and the time.
SELECT coalesce(min(id), 0) AS lowest, coalesce(max(id), 0) AS highest, statement_timestamp() AS looked_at
FROM {schema}.outbox
