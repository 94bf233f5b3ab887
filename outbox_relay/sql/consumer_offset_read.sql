-- Gives where partitions are to be read from. One without a row has never been consumed.
SELECT kept.topic, kept.partition, kept.next_offset
FROM unnest(%(topics)s::text[], %(partitions)s::integer[]) AS wanted (topic, partition)
JOIN {schema}.inbox_offset AS kept USING (topic, partition)
WHERE kept.consumer = %(consumer)s
