-- Makes the text of one message, which fails where it would be longer than PostgreSQL allows.
SELECT octet_length(payload::text), octet_length(headers::text)
FROM {schema}.outbox
WHERE shard = %(shard)s AND sequence_no = %(sequence_no)s
