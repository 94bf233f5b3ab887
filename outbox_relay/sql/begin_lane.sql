-- What a relay's transaction needs, set for this transaction only, so that it also holds behind a transaction pooler.
-- JIT compiles the claim anew each time (100 ms); a generic plan of it, and one that memoizes messages, are slower.
SELECT
    set_config('jit', 'off', true),
    set_config('plan_cache_mode', 'force_custom_plan', true),
    set_config('enable_memoize', 'off', true),
    set_config('synchronous_commit', %(synchronous_commit)s, true),
    set_config('lock_timeout', %(lock_timeout_ms)s, true),
    set_config('statement_timeout', %(statement_timeout_ms)s, true),
    set_config('idle_in_transaction_session_timeout', %(transaction_timeout_ms)s, true)
