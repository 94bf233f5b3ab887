-- Transactions of this database that have been open for longer than :seconds, the oldest first. Of another role's
-- session the start is only known to members of pg_read_all_stats.
SELECT
    coalesce(backend_xid::text, '0')::bigint AS xid,
    pid,
    coalesce(application_name, '') AS application_name,
    coalesce(usename, '')::text AS role_name,
    coalesce(state, '') AS state,
    extract(epoch FROM clock_timestamp() - xact_start)::float8 AS age_seconds,
    coalesce(left(query, 200), '') AS query,
    '' AS gid
FROM pg_stat_activity
WHERE datname = current_database()
    AND pid <> pg_backend_pid()
    AND backend_type = 'client backend'
    AND xact_start < clock_timestamp() - make_interval(secs => %(seconds)s)
UNION ALL
SELECT
    transaction::text::bigint,
    0,
    '',
    owner::text,
    'prepared',
    extract(epoch FROM clock_timestamp() - prepared)::float8,
    '',
    gid
FROM pg_prepared_xacts
WHERE database = current_database()
    AND prepared < clock_timestamp() - make_interval(secs => %(seconds)s)
ORDER BY age_seconds DESC
