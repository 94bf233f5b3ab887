-- Moves each partition to its next offset if it still is where this consumer left it, and gives those that were moved.
--
-- Whoever else is consuming one of them is waited for, and has moved it then: so of two that believe they own a
-- partition, only one has effects. The order is that of the locks, so that two never wait for each other in a circle.
WITH step AS (
    SELECT topic, partition, expected_offset, next_offset
    FROM unnest(
        %(topics)s::text[],
        %(partitions)s::integer[],
        %(expected_offsets)s::bigint[],
        %(next_offsets)s::bigint[]
    ) AS step (topic, partition, expected_offset, next_offset)
)
INSERT INTO {schema}.inbox_offset AS kept (consumer, topic, partition, next_offset)
SELECT %(consumer)s, step.topic, step.partition, step.next_offset
FROM step
ORDER BY step.topic, step.partition
ON CONFLICT (consumer, topic, partition) DO UPDATE
SET next_offset = excluded.next_offset
WHERE kept.next_offset = (
    SELECT step.expected_offset
    FROM step
    WHERE step.topic = kept.topic AND step.partition = kept.partition
)
RETURNING kept.topic, kept.partition
