-- Locks at most :most of the :candidates, shards that have messages to publish and that nobody else holds, those with
-- the oldest messages first. With :takes_all the others come too, if any has work: what arrives in them can be
-- published by the same transaction. One row for each shard that is held now or has work.
--
-- Only the holder of a shard reads by its mark and moves it: with SKIP LOCKED on the messages themselves two relays
-- would send later messages of a key first. This snapshot may be older than the lock, so that marks are read by a later
-- statement; what is found here only says where to look. The probes are scalar subqueries, because EXISTS becomes a
-- join over the whole backlog.
--
-- Whether anything waits is found by going from one aggregate type to the next in the index, so that messages of topics
-- that are away cost nothing, however many there are.
WITH RECURSIVE kind (shard, type_hash) AS (
    SELECT candidate.shard, first.type_hash
    FROM unnest(%(candidates)s::smallint[]) AS candidate (shard)
    CROSS JOIN LATERAL (
        SELECT hashtextextended(pending.aggregate_type, 0) AS type_hash
        FROM {schema}.outbox_pending AS pending
        WHERE pending.shard = candidate.shard AND pending.state = 'waiting'
        ORDER BY hashtextextended(pending.aggregate_type, 0)
        LIMIT 1
    ) AS first
    WHERE %(looks_for_waiting)s
    UNION ALL
    SELECT kind.shard, next.type_hash
    FROM kind
    CROSS JOIN LATERAL (
        SELECT hashtextextended(pending.aggregate_type, 0) AS type_hash
        FROM {schema}.outbox_pending AS pending
        WHERE pending.shard = kind.shard
            AND pending.state = 'waiting'
            AND hashtextextended(pending.aggregate_type, 0) > kind.type_hash
        ORDER BY hashtextextended(pending.aggregate_type, 0)
        LIMIT 1
    ) AS next
),
waiting AS MATERIALIZED (
    SELECT kind.shard
    FROM kind
    WHERE kind.type_hash NOT IN (
        SELECT hashtextextended(held.aggregate_type, 0)
        FROM unnest(%(held_types)s::text[]) AS held (aggregate_type)
    )
),
probe AS MATERIALIZED (
    SELECT
        outbox_shard.shard,
        (
            SELECT outbox.sequence_no
            FROM {schema}.outbox
            WHERE outbox.shard = outbox_shard.shard
                AND outbox.sequence_no > (
                    SELECT coalesce((
                        SELECT mark.through
                        FROM {schema}.outbox_published AS mark
                        WHERE mark.shard = outbox_shard.shard
                        ORDER BY mark.through DESC
                        LIMIT 1
                    ), 0)
                )
                AND outbox.sequence_no <= %(through)s
            ORDER BY outbox.sequence_no
            LIMIT 1
        ) AS first_no,
        outbox_shard.shard IN (SELECT waiting.shard FROM waiting) AS has_waiting
    FROM unnest(%(candidates)s::smallint[]) AS candidate (shard)
    JOIN {schema}.outbox_shard USING (shard)
),
held AS MATERIALIZED (
    SELECT outbox_shard.shard
    FROM probe
    JOIN {schema}.outbox_shard USING (shard)
    WHERE probe.first_no IS NOT NULL
        OR probe.has_waiting
        OR (
            %(takes_all)s
            AND (SELECT bool_or(each.first_no IS NOT NULL OR each.has_waiting) FROM probe AS each)
        )
    ORDER BY probe.has_waiting DESC, probe.first_no
    LIMIT %(most)s
    FOR UPDATE OF outbox_shard SKIP LOCKED
)
SELECT
    probe.shard,
    probe.first_no,
    probe.has_waiting,
    held.shard IS NOT NULL AS is_held
FROM probe
LEFT JOIN held USING (shard)
WHERE held.shard IS NOT NULL OR probe.first_no IS NOT NULL OR probe.has_waiting
