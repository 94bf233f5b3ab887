-- The settings of a transaction of a replay beside those of session_own.sql, for this transaction only; filled in once,
-- not by the driver. A crash of the server that takes back the last progress does no harm: a few messages are replayed
-- twice.
SET LOCAL synchronous_commit = off;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(transaction_timeout_ms)d
