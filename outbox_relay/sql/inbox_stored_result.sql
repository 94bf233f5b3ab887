-- Gives what the handler of a message has returned. Without created_at: the time stamp of a second record of the
-- message differs where the broker sets it.
SELECT result::text
FROM {schema}.inbox_message
WHERE consumer = %(consumer)s AND message_id = %(message_id)s::uuid
