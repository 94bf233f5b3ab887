-- The settings of a transaction that writes a canary, for this transaction only; filled in once, not by the driver. It is
-- a writer to the horizon, so nobody may have to wait for its client.
SET LOCAL lock_timeout = %(timeout_ms)d;
SET LOCAL statement_timeout = %(timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(timeout_ms)d
