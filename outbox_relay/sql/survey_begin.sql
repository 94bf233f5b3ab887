-- The settings of a transaction that only looks, for this transaction only; filled in once, not by the driver. It is read
-- committed: a snapshot that lasted for the whole transaction would hold back vacuum, which is what a survey is to tell
-- of.
SET TRANSACTION READ ONLY;
SET LOCAL lock_timeout = %(lock_timeout_ms)d;
SET LOCAL statement_timeout = %(statement_timeout_ms)d;
SET LOCAL idle_in_transaction_session_timeout = %(statement_timeout_ms)d
