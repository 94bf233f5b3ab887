-- How far each shard is reconciled, and whether this transaction is the only one that moves that on. The lock ends
-- with the transaction, however it ends.
--
-- Marks above the last number drawn are a fault: the sequence went back, or somebody moved a mark. New messages appear
-- below them, wherever the positions are.
SELECT
    alone.is_alone,
    outbox_shard.shard,
    coalesce(reconciled.checked_through, 0) AS checked_through,
    coalesce(reconciled.thinned_through, 0) AS thinned_through,
    coalesce((
        SELECT mark.through
        FROM {schema}.outbox_published AS mark
        WHERE mark.shard = outbox_shard.shard
        ORDER BY mark.through DESC
        LIMIT 1
    ) > drawn.last_value, false) AS is_ahead
FROM (
    SELECT pg_try_advisory_xact_lock(
        hashtextextended('outbox_relay_reconcile', '{schema}.outbox'::regclass::oid::bigint)
    ) AS is_alone
    OFFSET 0
) AS alone
CROSS JOIN {schema}.outbox_shard
CROSS JOIN {schema}.outbox_sequence_no_seq AS drawn
LEFT JOIN {schema}.outbox_reconciled AS reconciled ON reconciled.shard = outbox_shard.shard
