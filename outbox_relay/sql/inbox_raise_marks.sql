-- Raises the mark of each key to the highest number delivered, and gives the mark that it had before, 0 for a new key.
--
-- The row is written even where the mark stays, because RETURNING shows new values alone and a second statement would
-- be another round trip: so the old mark is known for every key, also when a concurrent twin has just inserted it.
-- A twin that has raised the mark of one of them and is still open is waited for. The order is that of the locks, so
-- that overlapping batches never wait for each other in a circle.
WITH delivered AS (
    SELECT
        *,
        sha256(convert_to(to_json(ARRAY[source, aggregate_type, key])::text, 'UTF8')) AS key_hash
    FROM unnest(
        %(sources)s::text[],
        %(topics)s::text[],
        %(partitions)s::integer[],
        %(aggregate_types)s::text[],
        %(keys)s::text[],
        %(sequence_nos)s::bigint[]
    ) AS delivered (source, topic, partition, aggregate_type, key, sequence_no)
)
INSERT INTO {schema}.inbox_sequence AS mark
    (consumer, source, topic, partition, aggregate_type, key, key_hash, sequence_no, previous_sequence_no)
SELECT
    %(consumer)s,
    delivered.source,
    delivered.topic,
    delivered.partition,
    delivered.aggregate_type,
    delivered.key,
    delivered.key_hash,
    delivered.sequence_no,
    0
FROM delivered
ORDER BY delivered.topic, delivered.partition, delivered.key_hash
ON CONFLICT (consumer, topic, partition, key_hash) DO UPDATE
SET previous_sequence_no = mark.sequence_no,
    sequence_no = greatest(mark.sequence_no, excluded.sequence_no)
RETURNING source, topic, partition, aggregate_type, key, previous_sequence_no
