-- Ends the session of a transaction that its client has lost, if it still waits for that client: its COMMIT never
-- arrived. One that is being committed, or waits for a standby, is left alone.
SELECT pg_terminate_backend(pid)
FROM pg_stat_activity
WHERE backend_xid = %(xid)s::xid8::xid AND state = 'idle in transaction'
