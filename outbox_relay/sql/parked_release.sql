-- Makes all parked messages of some keys of one shard unpublished again, in a transaction that has locked the shard.
--
-- Whole keys, so that nothing is claimed before an earlier message of its key. With the new generation relays forget
-- their floor, and a claim whose snapshot is older leaves the shard alone.
WITH parked AS (
    SELECT outbox.*
    FROM {schema}.outbox
    JOIN unnest(%(key_types)s::text[], %(key_ids)s::text[]) AS key (aggregate_type, aggregate_id)
        USING (aggregate_type, aggregate_id)
    WHERE outbox.shard = %(shard)s AND outbox.parked_at IS NOT NULL
),
recorded AS (
    INSERT INTO {schema}.outbox_audit (
        action, operator, why, outbox_id, message_id, aggregate_type, aggregate_id, sequence_no, parked_reason
    )
    SELECT
        'release',
        %(operator)s,
        %(why)s,
        id,
        message_id,
        aggregate_type,
        aggregate_id,
        sequence_no,
        parked_reason
    FROM parked
    ORDER BY sequence_no
),
overtaken AS (
    INSERT INTO {schema}.outbox_unordered (transaction_id)
    SELECT DISTINCT transaction_id FROM parked WHERE %(are_overtaken)s
    ON CONFLICT DO NOTHING
),
released AS (
    UPDATE {schema}.outbox
    SET parked_at = NULL, parked_reason = NULL
    FROM parked
    WHERE outbox.id = parked.id
    RETURNING outbox.aggregate_type, outbox.aggregate_id
),
renewed AS (
    UPDATE {schema}.outbox_shard
    SET generation = generation + 1
    WHERE shard = %(shard)s AND EXISTS (SELECT FROM released)
)
SELECT %(shard)s::smallint AS shard, aggregate_type, aggregate_id, count(*) AS messages
FROM released
GROUP BY aggregate_type, aggregate_id
ORDER BY aggregate_type, aggregate_id
