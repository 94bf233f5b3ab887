-- Begins a transaction of a replay with the settings it needs, for this transaction only, so that they hold behind a
-- transaction pooler too; filled in once, not by the driver. Read committed, whatever the role's default.
--
-- Only the primary key may be chosen, as in prune_begin.sql. A crash of the server that takes back the last progress
-- does no harm: a few messages are replayed twice.
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL jit = off;
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL synchronous_commit = off;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(transaction_timeout_ms)d
