-- Says what became of a transaction, and which server says so; see transaction_verify.sql. An xid that this server has
-- not given out yet is an error, one that it no longer remembers is NULL.
SELECT
    pg_xact_status(%(xid)s::xid8) AS status,
    (SELECT system_identifier FROM pg_control_system()) AS system_identifier,
    CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END AS timeline,
    (SELECT extract(epoch FROM stats_reset) FROM pg_stat_bgwriter) AS statistics_began
