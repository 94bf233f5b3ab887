-- Where the contents of the tables do not fit together, each with the statement that mends it; no row means ready.
--
-- Numbers are read from the high end of an index, shard by shard. The sequence is read at this moment and the rows as
-- of the beginning of the statement, so that a writer at work never makes them disagree.
WITH expected (shard) AS (
    SELECT generate_series(0, 15)
),
newest AS MATERIALIZED (
    SELECT
        coalesce(max(mark.through), 0) AS mark,
        coalesce(max(message.sequence_no), 0) AS number
    FROM expected
    LEFT JOIN LATERAL (
        SELECT outbox_published.through
        FROM {schema}.outbox_published
        WHERE outbox_published.shard = expected.shard
        ORDER BY outbox_published.through DESC
        LIMIT 1
    ) AS mark ON true
    LEFT JOIN LATERAL (
        SELECT outbox.sequence_no
        FROM {schema}.outbox
        WHERE outbox.shard = expected.shard
        ORDER BY outbox.sequence_no DESC
        LIMIT 1
    ) AS message ON true
),
drawn AS MATERIALIZED (
    SELECT last_value - CASE WHEN is_called THEN 0 ELSE 1 END AS last_no
    FROM {schema}.outbox_sequence_no_seq
)
-- The messages of a shard that has no row are never published.
SELECT
    format('outbox_shard lacks %%s', string_agg(expected.shard::text, ', ' ORDER BY expected.shard)) AS disagreement,
    format(
        'INSERT INTO %%I.outbox_shard (shard) SELECT generate_series(0, 15) ON CONFLICT DO NOTHING', %(schema)s::text
    ) AS remedy
FROM expected
WHERE expected.shard NOT IN (SELECT outbox_shard.shard FROM {schema}.outbox_shard)
HAVING count(*) > 0
UNION ALL
SELECT
    format('outbox_shard has %%s', string_agg(surplus.shard::text, ', ' ORDER BY surplus.shard)),
    format('DELETE FROM %%I.outbox_shard WHERE shard NOT BETWEEN 0 AND 15', %(schema)s::text)
FROM {schema}.outbox_shard AS surplus
WHERE surplus.shard NOT IN (SELECT expected.shard FROM expected)
HAVING count(*) > 0
UNION ALL
-- New messages would be taken for published, for marks are above them; or they would stand before older ones.
SELECT
    format(
        'the sequence went back: the next number is %%s, the newest mark is at %%s, the newest message is %%s',
        drawn.last_no + 1,
        newest.mark,
        newest.number
    ),
    format(
        'SELECT setval(%%L, %%s)',
        format('%%I.outbox_sequence_no_seq', %(schema)s::text),
        greatest(newest.mark, newest.number)
    )
FROM newest
CROSS JOIN drawn
WHERE drawn.last_no < greatest(newest.mark, newest.number)
