-- Begins a transaction of reconciling with the settings it needs, for this transaction only, so that they hold behind
-- a transaction pooler too; filled in once, not by the driver. Read committed, whatever the role's default: each
-- statement looks anew.
--
-- Rows are counted from the primary key alone, so nothing else may be chosen. A policy that hides rows from this role
-- is an error, for the marks count all of them. A crash of the server that takes back a repair takes back what came
-- later, too.
--
-- The last statement touches the outbox before any other table, as a TRUNCATE does.
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL jit = off;
SET LOCAL plan_cache_mode = force_generic_plan;
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_memoize = off;
SET LOCAL enable_indexonlyscan = on;
SET LOCAL max_parallel_workers_per_gather = 0;
SET LOCAL row_security = off;
SET LOCAL synchronous_commit = off;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(transaction_timeout_ms)d;
SELECT FROM {schema}.outbox LIMIT 0
