-- Begins a relay's transaction with the settings it needs, for this transaction only, so that they hold behind a
-- transaction pooler too. Read committed, whatever the role's default: the claim relies on it.
--
-- JIT compiles the claim anew each time (100 ms); a generic plan of it, and one that memoizes messages, are slower.
-- The two time-outs at the end free the shards of a relay that is frozen: while it holds its messages, and (as that is
-- not idle) while the server is still sending them.
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL jit = off;
SET LOCAL plan_cache_mode = force_custom_plan;
SET LOCAL enable_memoize = off;
SET LOCAL synchronous_commit = %(synchronous_commit)s;
SET LOCAL lock_timeout = %(lock_timeout_ms)s;
SET LOCAL statement_timeout = %(statement_timeout_ms)s;
SET LOCAL idle_in_transaction_session_timeout = %(transaction_timeout_ms)s;
SET LOCAL tcp_user_timeout = %(transaction_timeout_ms)s
