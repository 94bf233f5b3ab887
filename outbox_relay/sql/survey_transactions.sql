-- How old the oldest transactions are that this database has to keep in mind: in transactions since, or in seconds.
--
-- Vacuum is held back by the snapshot, or the xid, of a session of this database or of a standby's (which has no
-- database), by a prepared transaction, and by a replication slot; vacuum itself holds back no other. When a
-- transaction of another role's session began is told to members of pg_read_all_stats only: to others the longest one
-- is unknown, rather than that of their own sessions.
SELECT
    (SELECT age(datfrozenxid)::float8 FROM pg_database WHERE datname = current_database()) AS xid_age,
    greatest(
        0,
        (
            SELECT max(greatest(age(backend_xid), age(backend_xmin)))
            FROM pg_stat_activity
            WHERE pid <> pg_backend_pid()
                AND coalesce(datname, current_database()) = current_database()
                AND pid NOT IN (SELECT vacuum.pid FROM pg_stat_progress_vacuum AS vacuum)
        ),
        (SELECT max(age(transaction)) FROM pg_prepared_xacts WHERE database = current_database()),
        (SELECT max(greatest(age(xmin), age(catalog_xmin))) FROM pg_replication_slots)
    )::float8 AS oldest_xmin_age,
    CASE
        WHEN pg_has_role('pg_read_all_stats', 'USAGE') THEN (
            SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)
            FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
        )
    END::float8 AS longest_transaction_seconds,
    (
        SELECT coalesce(max(extract(epoch FROM clock_timestamp() - prepared)), 0)
        FROM pg_prepared_xacts
        WHERE database = current_database()
    )::float8 AS oldest_prepared_transaction_seconds
