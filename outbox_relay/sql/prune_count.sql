-- How many messages of ranges of numbers, below :before, may be removed: neither are they pending, nor do they belong
-- to a writer that was given up on and is not collected.
WITH chosen AS MATERIALIZED (
    SELECT *
    FROM unnest(%(shards)s::smallint[], %(after_nos)s::bigint[], %(throughs)s::bigint[])
        AS chosen (shard, after_no, through)
),
pending AS MATERIALIZED (
    SELECT pending.sequence_no
    FROM chosen
    JOIN {schema}.outbox_pending AS pending
        ON pending.shard = chosen.shard
        AND pending.sequence_no > chosen.after_no
        AND pending.sequence_no <= chosen.through
),
late AS MATERIALIZED (
    SELECT transaction_id FROM {schema}.outbox_unordered WHERE collected_at IS NULL
)
SELECT count(*)
FROM chosen
JOIN {schema}.outbox
    ON outbox.shard = chosen.shard
    AND outbox.sequence_no > chosen.after_no
    AND outbox.sequence_no <= chosen.through
    AND outbox.sequence_no < %(before)s
WHERE outbox.sequence_no NOT IN (SELECT pending.sequence_no FROM pending)
    AND outbox.transaction_id NOT IN (SELECT late.transaction_id FROM late)
