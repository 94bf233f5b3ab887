-- The settings of a transaction of reconciling beside those of session_own.sql, for this transaction only; filled in
-- once, not by the driver.
--
-- Rows are counted from the primary key alone, so nothing else may be chosen. A crash of the server that takes back a
-- repair takes back what came later, too.
--
-- The last statement touches the outbox before any other table, as a TRUNCATE does.
SET LOCAL plan_cache_mode = force_generic_plan;
SET LOCAL enable_memoize = off;
SET LOCAL enable_indexonlyscan = on;
SET LOCAL synchronous_commit = off;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(transaction_timeout_ms)d;
SELECT FROM {schema}.outbox LIMIT 0
