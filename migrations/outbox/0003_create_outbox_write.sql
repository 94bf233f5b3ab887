-- Writes a message and gives its id, for programs without a library of ours:
-- SELECT outbox_write('order', '4711', 'order_placed', '{"total": 120}');
--
-- To be called in the transaction of the change that the message tells of. Without a payload it is a tombstone. What
-- the relay would park is refused; the caller's own privileges are enough.

CREATE FUNCTION outbox_write(
    aggregate_type text,
    aggregate_id   text,
    event_type     text,
    payload        jsonb DEFAULT NULL,
    payload_bytes  bytea DEFAULT NULL,
    headers        jsonb DEFAULT '{}',
    message_id     uuid DEFAULT gen_random_uuid()
)
RETURNS uuid
LANGUAGE plpgsql
AS $$
DECLARE
    reserved CONSTANT text[] := ARRAY[
        'id', 'event_type', 'aggregate_type', 'sequence_no', 'source', 'unordered', 'replay',
        'ce_specversion', 'ce_id', 'ce_source', 'ce_type', 'ce_subject', 'ce_time', 'ce_aggregatetype', 'ce_sequence',
        'ce_unordered', 'ce_replay'
    ];
    mistake text[];
BEGIN
    mistake := CASE
        WHEN coalesce(aggregate_type, '') = '' THEN
            ARRAY['aggregate_type is empty', 'Give the kind of thing that the message is about.']
        WHEN coalesce(aggregate_id, '') = '' THEN
            ARRAY['aggregate_id is empty', 'Give the key: messages of one type and key are in order.']
        WHEN coalesce(event_type, '') = '' THEN
            ARRAY['event_type is empty', 'Give what has happened.']
        WHEN num_nonnulls(payload, payload_bytes) = 2 THEN
            ARRAY['payload and payload_bytes are both given', 'A message has one value: leave one out.']
        WHEN message_id IS NULL THEN
            ARRAY['message_id is null', 'Leave it out, or give a uuid.']
        WHEN jsonb_typeof(headers) IS DISTINCT FROM 'object'
            OR jsonb_path_exists(headers, 'strict $.* ? (@.type() <> "string")', silent => true) THEN
            ARRAY[format('headers are %s', left(coalesce(headers::text, 'null'), 200)), 'Give an object of strings.']
        WHEN headers ?| reserved THEN
            ARRAY[
                format('headers are %s', left(headers::text, 200)),
                format('The relay sets %s itself: choose other names.', array_to_string(reserved, ', '))
            ]
    END;
    IF mistake IS NOT NULL THEN
        RAISE invalid_parameter_value USING MESSAGE = mistake[1], HINT = mistake[2];
    END IF;

    INSERT INTO outbox (message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers)
    VALUES (message_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, headers);
    RETURN message_id;
END
$$;

-- The function finds its table whatever the caller's search_path is, and never a temporary one of that name.
DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION outbox_write SET search_path = %I, pg_temp', current_schema());
END
$$;

REVOKE EXECUTE ON FUNCTION outbox_write FROM PUBLIC;
GRANT EXECUTE ON FUNCTION outbox_write TO outbox_writer;
