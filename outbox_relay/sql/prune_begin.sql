-- The settings of a transaction of pruning beside those of session_own.sql, for this transaction only; filled in once,
-- not by the driver.
--
-- Only the primary keys may be chosen, and each range is looked up by itself: with statistics of a time when the table
-- was small, a few hundred rows look like all of it. A crash of the server that takes back the last batches does no
-- harm: they are pruned again.
--
-- The last statement touches the outbox before any other table, as a TRUNCATE does.
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off;
SET LOCAL synchronous_commit = off;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(transaction_timeout_ms)d;
SELECT FROM {schema}.outbox LIMIT 0
