-- How many messages all marks have counted, for a progress bar.
SELECT coalesce(sum(messages), 0) AS messages
FROM {schema}.outbox_published
