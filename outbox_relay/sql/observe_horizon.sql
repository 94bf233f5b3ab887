-- The highest number drawn so far, and then, in a later snapshot, every transaction that may still own one of the
-- numbers up to it: those listed in the snapshot, and those from its xmax (the latest *completed* xid + 1) up to the
-- next xid to be assigned. Read committed, whatever the role's default: the second snapshot must be the later one.
-- The relays are told apart by the xmax that a claim leaves on the shard rows it locked.
BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY;
SELECT
    last_value - CASE WHEN is_called THEN 0 ELSE 1 END AS last_no,
    extract(epoch FROM pg_postmaster_start_time())::float8 AS server_started_at,
    pg_relation_filenode('{schema}.outbox_sequence_no_seq')::bigint AS sequence_file
FROM {schema}.outbox_sequence_no_seq;
SELECT
    pg_current_snapshot()::text,
    3 + age('3'::xid)::bigint AS next_xid,
    (SELECT string_agg(xmax::text, ',') FROM {schema}.outbox_shard) AS relay_xids;
COMMIT
