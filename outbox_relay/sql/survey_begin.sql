-- Begins a transaction that only looks, with the settings it needs, for this transaction only, so that they hold behind
-- a transaction pooler too; filled in once, not by the driver. Read committed, whatever the role's default: a snapshot
-- that lasted for the whole transaction would hold back vacuum, which is what a survey is to tell of.
--
-- A scan of a table would walk all that is published; the indexes lead to what is asked for. Row level security would
-- hide messages, so that all looks published: without it PostgreSQL refuses to answer instead.
BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY;
SET LOCAL jit = off;
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL row_security = off;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(statement_timeout_ms)d
