-- Makes the text of a claimed message, which fails where it would be longer than PostgreSQL allows.
SELECT octet_length(payload::text), octet_length(headers::text)
FROM {schema}.outbox
WHERE id = %(id)s
