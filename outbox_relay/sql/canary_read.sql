-- How long a message took to its mark, NULL as long as it has none; no row when it was deleted instead.
SELECT extract(epoch FROM published_at - created_at)::float8 AS seconds
FROM {schema}.outbox
WHERE id = %(id)s
