-- Lets the relay send all parked messages of some keys of one shard, in a transaction that has locked the shard;
-- returns how many there were of each key.
--
-- Whole keys, because the relay parks again what waits behind a parked message of its key. What was deleted from the
-- outbox cannot be sent and would hold up its key for ever, so its row is removed, and the record of it has no
-- message_id.
WITH chosen AS MATERIALIZED (
    SELECT DISTINCT ON (pending.sequence_no)
        pending.shard,
        pending.sequence_no,
        pending.key_hash,
        pending.aggregate_type,
        pending.reason_code || ': ' || pending.reason AS parked_reason,
        message.message_id,
        message.aggregate_id,
        message.event_type,
        message.created_at
    FROM unnest(%(key_hashes)s::bigint[], %(key_types)s::text[], %(key_ids)s::text[])
        AS key (key_hash, aggregate_type, aggregate_id)
    JOIN {schema}.outbox_pending AS pending
        ON pending.key_hash = key.key_hash AND pending.aggregate_type = key.aggregate_type
    LEFT JOIN LATERAL (
        SELECT outbox.message_id, outbox.aggregate_id, outbox.event_type, outbox.created_at
        FROM {schema}.outbox
        WHERE outbox.shard = pending.shard AND outbox.sequence_no = pending.sequence_no
        LIMIT 1
    ) AS message ON true
    WHERE pending.shard = %(shard)s
        AND pending.state = 'parked'
        AND (message.message_id IS NULL OR message.aggregate_id = key.aggregate_id)
    ORDER BY pending.sequence_no
),
recorded AS (
    INSERT INTO {schema}.outbox_audit (
        action,
        operator,
        why,
        sequence_no,
        message_id,
        aggregate_type,
        aggregate_id,
        event_type,
        created_at,
        parked_reason
    )
    SELECT
        'release',
        %(operator)s,
        %(why)s,
        chosen.sequence_no,
        chosen.message_id,
        chosen.aggregate_type,
        chosen.aggregate_id,
        chosen.event_type,
        chosen.created_at,
        chosen.parked_reason
    FROM chosen
    ORDER BY chosen.sequence_no
),
released AS (
    UPDATE {schema}.outbox_pending
    SET
        state = 'waiting',
        reason_code = 'released',
        reason = 'an operator released it',
        is_unordered = outbox_pending.is_unordered OR %(are_overtaken)s,
        since = statement_timestamp()
    FROM chosen
    WHERE chosen.message_id IS NOT NULL
        AND outbox_pending.shard = chosen.shard
        AND outbox_pending.sequence_no = chosen.sequence_no
),
forgotten AS (
    DELETE FROM {schema}.outbox_pending
    USING chosen
    WHERE chosen.message_id IS NULL
        AND outbox_pending.shard = chosen.shard
        AND outbox_pending.sequence_no = chosen.sequence_no
)
SELECT
    chosen.shard,
    chosen.key_hash,
    chosen.aggregate_type,
    chosen.aggregate_id,
    count(*) AS messages
FROM chosen
GROUP BY chosen.shard, chosen.key_hash, chosen.aggregate_type, chosen.aggregate_id
ORDER BY min(chosen.sequence_no)
