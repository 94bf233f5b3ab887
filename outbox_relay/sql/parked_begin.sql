-- The settings of an operator's transaction, for this transaction only, whatever the role or the database sets; filled
-- in by the client. Read committed: what comes after a lock must see what the holder of the lock before has committed.
--
-- With row_security = off a policy that would hide rows is an error: a message that is hidden would be taken for one
-- that was deleted. Without the index scans below each message of a key would read the whole table again, for
-- statistics of pending messages are always late.
--
-- The outbox is locked before anything else: a TRUNCATE, whose trigger empties the other tables, waits or is waited
-- for, and cannot deadlock.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
SET LOCAL client_encoding = 'UTF8';
SET LOCAL datestyle = 'ISO';
SET LOCAL row_security = off;
SET LOCAL jit = off;
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL lock_timeout = %(lock_timeout_ms)s;
SET LOCAL statement_timeout = %(statement_timeout_ms)s;
SET LOCAL idle_in_transaction_session_timeout = %(lock_timeout_ms)s;
LOCK TABLE ONLY {schema}.outbox IN ACCESS SHARE MODE
