-- The newest mark of each held shard, and whether anything of it is pending; a statement of its own, so that the
-- snapshot shows all that the previous holder of the shard has committed. It is read from the high end of the index,
-- whatever is dead or old below.
--
-- Each row also says which numbers these are, see last_number.sql, for the horizon was found on another connection.
SELECT
    claimed.shard,
    coalesce((
        SELECT mark.through
        FROM {schema}.outbox_published AS mark
        WHERE mark.shard = claimed.shard
        ORDER BY mark.through DESC
        LIMIT 1
    ), 0) AS through,
    (
        SELECT true
        FROM {schema}.outbox_pending AS pending
        WHERE pending.shard = claimed.shard
        ORDER BY pending.sequence_no
        LIMIT 1
    ) IS TRUE AS has_pending,
    drawn.last_value - CASE WHEN drawn.is_called THEN 0 ELSE 1 END AS last_no,
    extract(epoch FROM pg_postmaster_start_time())::float8 AS server_started_at,
    pg_relation_filenode('{schema}.outbox_sequence_no_seq')::bigint AS sequence_file
FROM unnest(%(shards)s::smallint[]) AS claimed (shard)
CROSS JOIN {schema}.outbox_sequence_no_seq AS drawn
