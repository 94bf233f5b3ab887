-- Replication slots that nobody reads, and what each keeps: bytes of the write-ahead log, and old row versions, counted
-- in transactions.
SELECT
    slot_name::text,
    (pg_current_wal_lsn() - restart_lsn)::float8 AS kept_bytes,
    greatest(age(xmin), age(catalog_xmin), 0) AS held_transactions
FROM pg_replication_slots
WHERE NOT active AND restart_lsn IS NOT NULL
ORDER BY slot_name
