-- Begins a transaction that writes a canary, with the settings it needs, for this transaction only; filled in once, not
-- by the driver. It is a writer to the horizon, so nobody may have to wait for its client.
--
-- A scan of a table would walk all that is published; the indexes lead to what is asked for.
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL lock_timeout = %(timeout_ms)d;
SET LOCAL statement_timeout = %(timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(timeout_ms)d
