-- Makes the text of one message as it would be sent, which fails where it would be longer than PostgreSQL allows, or
-- where the database has another encoding than UTF8 and the text is none in UTF-8.
SELECT
    octet_length(convert_to(payload::text, 'UTF8')),
    octet_length(convert_to(headers::text, 'UTF8')),
    octet_length(convert_to(concat(aggregate_type, aggregate_id, event_type), 'UTF8'))
FROM {schema}.outbox
WHERE shard = %(shard)s AND sequence_no = %(sequence_no)s
