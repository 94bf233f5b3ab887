-- Begins a transaction of pruning with the settings it needs, for this transaction only, so that they hold behind a
-- transaction pooler too; filled in once, not by the driver. Read committed, whatever the role's default: what is found
-- under a lock has to be newer than the lock.
--
-- Only the primary keys may be chosen, and each range is looked up by itself: with statistics of a time when the table
-- was small, a few hundred rows look like all of it. A policy that hides rows from this role is an error, for the marks
-- count all of them. A crash of the server that takes back the last batches does no harm: they are pruned again.
--
-- The last statement touches the outbox before any other table, as a TRUNCATE does.
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL jit = off;
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off;
SET LOCAL max_parallel_workers_per_gather = 0;
SET LOCAL row_security = off;
SET LOCAL synchronous_commit = off;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(transaction_timeout_ms)d;
SELECT FROM {schema}.outbox LIMIT 0
