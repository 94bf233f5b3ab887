-- Says where this statement runs, and what it takes to ask later what became of the transaction.
--
-- The timeline tells a promoted standby, or a restored backup, from the server it follows. Statistics are
-- kept over an orderly restart and begin anew after a crash, and only a crash can give an xid away a second time.
SELECT
    current_setting('outbox_relay.transaction', true) AS mark,
    pg_backend_pid() AS process_id,
    pg_current_xact_id_if_assigned()::text AS xid,
    (SELECT system_identifier FROM pg_control_system()) AS system_identifier,
    CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END AS timeline,
    (SELECT extract(epoch FROM stats_reset) FROM pg_stat_bgwriter) AS statistics_began
