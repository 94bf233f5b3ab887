-- Begins a transaction of a replay with the settings it needs, for this transaction only, so that they hold behind a
-- transaction pooler too; filled in once, not by the driver. Read committed, whatever the role's default.
--
-- Only indexes may be chosen: with statistics of a time when the table was small, some numbers look like all of it. A
-- policy that hides rows from this role is an error, for a replay says that it is all. A crash of the server that takes
-- back the last progress does no harm: a few messages are replayed twice.
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL client_encoding = 'UTF8';
SET LOCAL jit = off;
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL max_parallel_workers_per_gather = 0;
SET LOCAL row_security = off;
SET LOCAL synchronous_commit = off;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(transaction_timeout_ms)d
