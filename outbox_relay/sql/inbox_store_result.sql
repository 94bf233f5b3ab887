-- Keeps what the handler of a message has returned, and gives it as later deliveries will get it.
UPDATE {schema}.inbox_message
SET result = %(result)s::jsonb
WHERE consumer = %(consumer)s
    AND message_id = %(message_id)s::uuid
    AND created_at = %(created_at)s::timestamptz
RETURNING result::text
