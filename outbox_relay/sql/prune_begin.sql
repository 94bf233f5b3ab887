-- Begins a transaction of pruning with the settings it needs, for this transaction only, so that they hold behind a
-- transaction pooler too; filled in once, not by the driver. Read committed, whatever the role's default: a row that
-- changes meanwhile is looked at again, not an error.
--
-- Only the primary key may be chosen: with statistics of a time when the table was small, a few hundred ids look like
-- all of it. A crash of the server that takes back the last batches does no harm: they are pruned again.
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL jit = off;
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL synchronous_commit = off;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(transaction_timeout_ms)d
