-- The server, its database and this session's role.
SELECT
    current_setting('server_version_num')::int AS version_number,
    current_setting('server_version') AS version,
    pg_is_in_recovery() AS is_replica,
    current_setting('transaction_read_only')::boolean AS is_read_only,
    current_user::text AS role_name,
    current_database()::text AS database_name,
    EXISTS (
        SELECT FROM pg_roles WHERE rolname = 'outbox_relay' AND NOT pg_has_role(oid, 'USAGE')
    ) AS lacks_group,
    pg_has_role('pg_read_all_stats', 'USAGE') AS sees_all_sessions,
    current_setting('autovacuum')::boolean AND current_setting('track_counts')::boolean AS has_autovacuum,
    current_setting('autovacuum_freeze_max_age')::bigint AS freeze_max_age,
    age(datfrozenxid)::bigint AS xid_age,
    mxid_age(datminmxid)::bigint AS multixact_age
FROM pg_database
WHERE datname = current_database()
