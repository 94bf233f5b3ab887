-- The id of the message that this transaction has just written, by the number it drew.
SELECT id
FROM {schema}.outbox
WHERE shard = (hashtextextended(%(aggregate_type)s || ':' || %(aggregate_id)s, 0) & 15)::smallint
    AND sequence_no = (SELECT currval('{schema}.outbox_sequence_no_seq'))
    AND published_at IS NULL
    AND parked_at IS NULL
