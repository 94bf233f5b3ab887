-- Widens a range of ids by :rows messages on either side: the id behind which it begins, and the one that it ends with.
-- Counted in messages, because ids have gaps, wide ones between partitions.
SELECT
    coalesce(
        (SELECT id FROM {schema}.outbox WHERE id < %(first)s ORDER BY id DESC OFFSET %(rows)s LIMIT 1),
        %(lowest)s::bigint - 1
    ) AS after,
    coalesce(
        (SELECT id FROM {schema}.outbox WHERE id > %(last)s ORDER BY id OFFSET %(rows)s LIMIT 1),
        %(highest)s::bigint
    ) AS last
