-- The settings of an operator's transaction, for this transaction only; filled in by the client. Without the index scans
-- of session_own.sql each message of a key would read the whole table again, for statistics of pending messages are
-- always late.
--
-- The outbox is locked before anything else: a TRUNCATE, whose trigger empties the other tables, waits or is waited
-- for, and cannot deadlock.
SET LOCAL lock_timeout = %(lock_timeout_ms)s;
SET LOCAL statement_timeout = %(statement_timeout_ms)s;
SET LOCAL idle_in_transaction_session_timeout = %(lock_timeout_ms)s;
LOCK TABLE ONLY {schema}.outbox IN ACCESS SHARE MODE
