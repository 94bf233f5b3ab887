-- Begins a relay's transaction with the settings it needs, for this transaction only, so that they hold behind a
-- transaction pooler too; filled in once, not by the driver. Read committed, whatever the role's default: the claim
-- relies on it.
--
-- A statement is planned once for a connection: planning takes three times as long as claiming a few messages. That
-- generic plan is the right one, in the order of numbers through the primary key, if nothing else may be chosen. JIT
-- would compile it anew each time (100 ms). The last two time-outs free the shards of a relay that is frozen: while it
-- waits for Kafka, and (as that is not idle) while the server is still sending it messages.
--
-- The time at the end is what the age of the messages is reckoned by.
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL jit = off;
SET LOCAL plan_cache_mode = force_generic_plan;
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_memoize = off;
SET LOCAL synchronous_commit = %(synchronous_commit)b;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(transaction_timeout_ms)d;
SET LOCAL tcp_user_timeout = %(transaction_timeout_ms)d;
SELECT extract(epoch FROM clock_timestamp())::float8
