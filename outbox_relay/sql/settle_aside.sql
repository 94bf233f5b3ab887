-- Sets messages aside that a mark passes although they are not in Kafka, or says anew why one of them is pending. The
-- hash of the key is made from the row: a key may be longer than anybody wants to send. A message that was deleted
-- meanwhile is left out.
INSERT INTO {schema}.outbox_pending (
    shard, sequence_no, key_hash, aggregate_type, state, reason_code, reason, is_unordered
)
SELECT
    outbox.shard,
    outbox.sequence_no,
    hashtextextended(outbox.aggregate_type || ':' || outbox.aggregate_id, 0),
    outbox.aggregate_type,
    aside.state,
    aside.reason_code,
    aside.reason,
    aside.is_unordered
FROM unnest(
    %(shards)s::smallint[],
    %(numbers)s::bigint[],
    %(states)s::text[],
    %(reason_codes)s::text[],
    %(reasons)s::text[],
    %(are_unordered)s::boolean[]
) AS aside (shard, sequence_no, state, reason_code, reason, is_unordered)
JOIN {schema}.outbox ON outbox.shard = aside.shard AND outbox.sequence_no = aside.sequence_no
ON CONFLICT (shard, sequence_no) DO UPDATE
SET state = excluded.state,
    reason_code = excluded.reason_code,
    reason = excluded.reason,
    since = CASE
        WHEN outbox_pending.state = excluded.state THEN outbox_pending.since
        ELSE clock_timestamp()
    END
