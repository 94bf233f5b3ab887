-- The number of the first message from an id on.
SELECT sequence_no
FROM {schema}.outbox
WHERE id >= %(id)s
ORDER BY id
LIMIT 1
