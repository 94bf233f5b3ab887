-- Who is behind each transaction id: a session, or a prepared transaction by its gid.
-- State, age and query of another role's session are only shown to members of pg_read_all_stats; 0 and empty otherwise.
SELECT
    wanted.xid,
    coalesce(session.pid, 0) AS pid,
    coalesce(session.application_name, '') AS application_name,
    coalesce(session.usename, prepared.owner, '') AS role_name,
    coalesce(session.state, CASE WHEN prepared.gid IS NULL THEN '' ELSE 'prepared' END) AS state,
    coalesce(
        extract(epoch FROM clock_timestamp() - coalesce(session.xact_start, prepared.prepared)), 0
    )::float8 AS age_seconds,
    coalesce(left(session.query, 200), '') AS query,
    coalesce(prepared.gid, '') AS gid
FROM unnest(%(xids)s::text[]) AS wanted (xid)
LEFT JOIN pg_stat_activity AS session ON session.backend_xid::text = wanted.xid
LEFT JOIN pg_prepared_xacts AS prepared ON prepared.transaction::text = wanted.xid
ORDER BY age_seconds DESC
