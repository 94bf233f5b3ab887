-- The highest number drawn so far, committed or not; all that an idle poll costs.
--
-- With it comes what the numbers belong to: another server has another start, and a sequence that was restarted has
-- another file. Numbers of two such epochs must never be compared.
SELECT
    last_value - CASE WHEN is_called THEN 0 ELSE 1 END AS last_no,
    extract(epoch FROM pg_postmaster_start_time())::float8 AS server_started_at,
    pg_relation_filenode('{schema}.outbox_sequence_no_seq')::bigint AS sequence_file
FROM {schema}.outbox_sequence_no_seq
